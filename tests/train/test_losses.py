"""Losses against their equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spikeloom.train.losses import LOSSES, PER_STEP, ce_count, mse_count, mse_onehot, sdt, tet

T, N, C = 5, 7, 4


@pytest.fixture
def logits() -> Tensor:
    return (3 * torch.randn(T, N, C, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def y() -> Tensor:
    return torch.randint(C, (N,))


def onehot(y: Tensor) -> Tensor:
    return torch.eye(C, dtype=torch.float64)[y]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c targets_c log softmax(logits)_c, the mean over images; both [N, classes]."""
    log_partition = torch.log(torch.exp(logits).sum(1, keepdim=True))
    return -(targets * (logits - log_partition)).sum(1).mean()


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, logits)
    return grad


def test_registered_losses_are_scalars(logits: Tensor, y: Tensor) -> None:
    assert {"sdt", "tet", "mse_onehot"} <= set(LOSSES)
    for name in LOSSES:
        assert LOSSES[name](logits, y).shape == ()


def test_sdt(logits: Tensor, y: Tensor) -> None:
    loss = sdt(logits, y)
    torch.testing.assert_close(loss, cross_entropy(logits.mean(0), onehot(y)))
    # dL/dO(t) = (S(mean O) - onehot) / T, the same at every step; the loss is a mean over the batch
    expected = (logits.mean(0).softmax(1) - onehot(y)) / (T * N)
    torch.testing.assert_close(gradient(loss, logits), expected.expand(T, N, C).detach())


def test_tet(logits: Tensor, y: Tensor) -> None:
    loss = tet(logits, y)
    torch.testing.assert_close(loss, sum((cross_entropy(step, onehot(y)) for step in logits), torch.zeros(())) / T)
    # dL/dO(t) = (S(O(t)) - onehot) / T, each step its own
    torch.testing.assert_close(gradient(loss, logits), ((logits.softmax(2) - onehot(y)) / (T * N)).detach())


def test_the_labels_are_not_mixed_up_over_time() -> None:
    # Image n is right at every step: flattening [T, N] in another order than the labels would show.
    y = torch.tensor([0, 1, 2])
    logits = 50 * torch.eye(4)[y].repeat(T, 1, 1)
    assert tet(logits, y).item() < 1e-6
    assert sdt(logits, y).item() < 1e-6


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_step(y: Tensor, label_smoothing: float) -> None:
    logits = torch.randn(1, N, C, dtype=torch.float64, requires_grad=True)
    one, other = sdt(logits, y, label_smoothing), tet(logits, y, label_smoothing=label_smoothing)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one, logits), gradient(other, logits))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_sdt_is_at_most_tet(scale: float) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(T, 1, C, dtype=torch.float64, generator=generator)
        y = torch.randint(C, (1,), generator=generator)
        assert sdt(logits, y).item() < tet(logits, y).item()  # strictly: the softmax differs from step to step


def test_sdt_is_tet_iff_steps_differ_by_a_constant(y: Tensor) -> None:
    logits = torch.randn(1, N, C, dtype=torch.float64) + torch.randn(T, N, 1, dtype=torch.float64)
    torch.testing.assert_close(sdt(logits, y), tet(logits, y), rtol=1e-12, atol=0)
    logits[1, :, 0] += 0.1
    assert sdt(logits, y).item() < tet(logits, y).item() - 1e-6


@pytest.mark.parametrize("target", [1.0, -0.5])
def test_lam(logits: Tensor, y: Tensor, target: float) -> None:
    mean_square = ((logits - target) ** 2).sum() / (T * N * C)
    torch.testing.assert_close(tet(logits, y, lam=1.0, target=target), mean_square)
    mixed = tet(logits, y, lam=0.05, target=target)
    torch.testing.assert_close(mixed, 0.95 * tet(logits, y) + 0.05 * mean_square)
    expected = (1 - 0.05) * (logits.softmax(2) - onehot(y)) / (T * N) + 0.05 * 2 * (logits - target) / (T * N * C)
    torch.testing.assert_close(gradient(mixed, logits), expected.detach())


def test_lam_towards_the_labels(logits: Tensor, y: Tensor) -> None:
    mean_square = ((logits - onehot(y)) ** 2).sum() / (T * N * C)
    torch.testing.assert_close(tet(logits, y, lam=1.0, target="onehot"), mean_square)
    mixed = tet(logits, y, lam=0.05, target="onehot")
    torch.testing.assert_close(mixed, 0.95 * tet(logits, y) + 0.05 * mean_square)


def test_mse_onehot(logits: Tensor, y: Tensor) -> None:
    loss = mse_onehot(logits, y)
    torch.testing.assert_close(loss, ((logits.mean(0) - onehot(y)) ** 2).sum() / (N * C))
    expected = 2 * (logits.mean(0) - onehot(y)) / (T * N * C)
    torch.testing.assert_close(gradient(loss, logits), expected.expand(T, N, C).detach())
    assert mse_onehot(onehot(y).expand(T, N, C), y).item() == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_labels_may_be_weights_of_classes(logits: Tensor, y: Tensor, name: str) -> None:
    torch.testing.assert_close(LOSSES[name](logits, onehot(y)), LOSSES[name](logits, y))


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_of_each_step(logits: Tensor, y: Tensor, name: str) -> None:
    """Those that methods which step may take are the mean of what they give for each step; the others are not."""
    steps = torch.stack([LOSSES[name](logits[t : t + 1], y) for t in range(T)]).mean()
    assert torch.allclose(LOSSES[name](logits, y), steps) == (name in PER_STEP)


def test_defaults_of_the_regulariser(logits: Tensor, y: Tensor) -> None:
    assert torch.equal(tet(logits, y), tet(logits, y, lam=0.0))
    assert torch.equal(tet(logits, y, lam=0.3), tet(logits, y, lam=0.3, target=1.0))


def test_label_smoothing(logits: Tensor, y: Tensor) -> None:
    eps = 0.1
    targets = (1 - eps) * onehot(y) + eps / C
    torch.testing.assert_close(sdt(logits, y, eps), cross_entropy(logits.mean(0), targets))
    expected = sum((cross_entropy(step, targets) for step in logits), torch.zeros(())) / T
    torch.testing.assert_close(tet(logits, y, label_smoothing=eps), expected)
    expected_gradient = (logits.mean(0).softmax(1) - targets) / (T * N)
    torch.testing.assert_close(gradient(sdt(logits, y, eps), logits), expected_gradient.expand(T, N, C).detach())


def test_an_undecided_network_has_the_entropy_of_its_classes(y: Tensor) -> None:
    for loss in (sdt, tet):
        assert loss(torch.zeros(T, N, C), y).item() == pytest.approx(math.log(C))


def test_large_logits_stay_finite(y: Tensor) -> None:
    logits = torch.full((T, N, C), -1e4)
    logits[..., 0] = 1e4
    for loss in (sdt, tet):
        assert loss(logits, y).isfinite()


def test_counts_by_hand() -> None:
    spikes = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]]])  # counts 3 and 1
    y = torch.tensor([0])
    assert ce_count(spikes, y).item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert mse_count(spikes, y).item() == pytest.approx((1 + 1) / 2 / 4)
    # Targets of 2 (three quarters of 4 steps less one) and 1 spikes: only the whole numbers below count.
    assert mse_count(spikes, y, correct_rate=0.7, incorrect_rate=0.3).item() == pytest.approx((1 + 0) / 2 / 4)
