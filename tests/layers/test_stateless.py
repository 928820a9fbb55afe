"""Layers without memory: `torch.nn` on the folded sequence, and a repeated image computed once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spikeloom.encode import as_sequence, repeat
from spikeloom.layers import (
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    PadShortcut,
    TdBN,
    each_step,
    repeats,
)

PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d": (lambda: Conv2d(4, 6, 3, 2, 1), lambda: nn.Conv2d(4, 6, 3, 2, 1), (4, 7, 5)),
    "Conv2d_groups": (lambda: Conv2d(4, 8, 3, groups=2), lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 7, 5)),
    "Conv1d": (lambda: Conv1d(4, 6, 3, dilation=2), lambda: nn.Conv1d(4, 6, 3, dilation=2), (4, 9)),
    "Linear": (lambda: Linear(5, 3), lambda: nn.Linear(5, 3), (5,)),
    "MaxPool2d": (lambda: MaxPool2d(3, 2, 1), lambda: nn.MaxPool2d(3, 2, 1), (4, 7, 5)),
    "AvgPool2d": (lambda: AvgPool2d(2), lambda: nn.AvgPool2d(2), (4, 7, 5)),
    "AvgPool1d": (lambda: AvgPool1d(3), lambda: nn.AvgPool1d(3), (4, 9)),
    "Flatten": (Flatten, lambda: nn.Flatten(1), (4, 7, 5)),
    "GlobalAvgPool": (GlobalAvgPool, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)), (4, 7, 5)),
}


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_on_the_folded_tensor(name: str, shape: tuple[int, int]) -> None:
    ours, theirs = (make() for make in PAIRS[name][:2])
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*shape, *PAIRS[name][2], requires_grad=True)
    a, b = ours(x), theirs(x.flatten(0, 1)).unflatten(0, shape)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(a)
    for got, expected in zip(
        torch.autograd.grad(a, [x, *ours.parameters()], upstream),
        torch.autograd.grad(b, [x, *theirs.parameters()], upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["Conv2d", "Conv1d", "Linear"])
def test_parameters_are_those_of_torch(name: str) -> None:
    ours, theirs = (make().state_dict() for make in PAIRS[name][:2])
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_repeat_shares_memory() -> None:
    x = torch.randn(2, 3)
    y = repeat(x, 4)
    assert y.shape == (4, 2, 3)
    assert y.data_ptr() == x.data_ptr()
    assert repeats(y)
    assert not repeats(repeat(x, 1)), "one step repeats nothing"
    assert not repeats(y.contiguous())
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        repeat(x, 0)


def test_as_sequence() -> None:
    image, sequence = torch.zeros(2, 3, 4, 4), torch.zeros(5, 2, 3, 4, 4)
    assert as_sequence(image, 6, dims=4).shape == (6, 2, 3, 4, 4)
    assert as_sequence(sequence, 6, dims=4) is sequence
    with pytest.raises(ValueError, match=r"a batch of 4 axes or a sequence of 5, got shape \(3, 4\)"):
        as_sequence(torch.zeros(3, 4), 6, dims=4)


def test_each_step_calls_once_for_a_repeated_image() -> None:
    calls: list[tuple[int, ...]] = []

    def double(y: Tensor) -> Tensor:
        calls.append(tuple(y.shape))
        return y * 2

    x = torch.randn(2, 3)
    once = each_step(double, repeat(x, 5))
    assert calls == [(2, 3)]
    assert repeats(once)
    assert torch.equal(once, repeat(x, 5) * 2)
    each_step(double, repeat(x, 5).contiguous())
    assert calls == [(2, 3), (10, 3)]


@pytest.mark.parametrize("again", [True, False], ids=["repeated", "not"])
def test_each_step_adds_up_the_gradients_of_a_repeated_image(again: bool) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    grad = repeat(torch.randn(2, 3), 5) if again else torch.randn(5, 2, 3)
    (found,) = torch.autograd.grad(each_step(lambda y: y * 2, repeat(x, 5)), x, grad)
    torch.testing.assert_close(found, 2 * grad.sum(0))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (make, shape) for name, (make, _, shape) in PAIRS.items()},
    "BatchNorm": (lambda: BatchNorm(4), (4, 7, 5)),
    "TdBN": (lambda: TdBN(4, 0.5), (4, 7, 5)),
    "TdBN_outside": (lambda: TdBN(4, 0.5, eps_outside=True), (4, 7, 5)),
    "PadShortcut": (lambda: PadShortcut(4, 8), (4, 7, 5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_repeated_image_equals_repeated_computation(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    once, many = make().double().train(training), make().double().train(training)
    many.load_state_dict(once.state_dict())
    image = torch.randn(3, *shape, dtype=torch.float64) * 2 + 1
    a, b = (image.clone().requires_grad_() for _ in range(2))
    y, z = once(repeat(a, 5)), many(repeat(b, 5).contiguous())
    assert repeats(y)
    assert not repeats(z)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(z)
    y.backward(upstream)
    z.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    for p, q in zip(once.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)
    for p, q in zip(once.buffers(), many.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_repeated_image_costs_one_convolution() -> None:
    conv, image = Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)
    counts = []
    for x in (repeat(image, 6), repeat(image, 6).contiguous()):
        with FlopCounterMode(display=False) as counter:
            conv(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == 6 * counts[0] > 0


def test_channels_last_passes_through() -> None:
    x = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    for layer in (Conv2d(3, 4, 3).to(memory_format=torch.channels_last), MaxPool2d(2), BatchNorm(3)):
        assert layer(x).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_max_pool_of_spikes_is_spikes() -> None:
    s = torch.randint(0, 2, (3, 2, 4, 6, 6)).float()
    assert set(MaxPool2d(2)(s).unique().tolist()) <= {0.0, 1.0}
