"""Batch normalisation over time, its threshold-dependent forms, and the unit of norm and neuron."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import BatchNorm, Conv2d, NormSpike, TdBN
from spikeloom.layers.norm import add_to_branches
from spikeloom.neurons import IF, LIF
from spikeloom.stream import Stream

FORMS = {
    "multiplier": {"form": "multiplier"},
    "affine": {"form": "affine"},
    "eps_outside": {"eps_outside": True},
    "affine_eps_outside": {"form": "affine", "eps_outside": True},
}
SHAPES = [(4, 3, 5, 6, 7), (1, 8, 5), (3, 4, 5), (2, 3, 5, 9)]


def randomise(norm: nn.Module) -> None:
    for p in norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)


@pytest.mark.parametrize(("training", "momentum"), [(True, 0.3), (True, None), (False, 0.3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_that_of_torch_on_the_folded_tensor(
    shape: tuple[int, ...], training: bool, momentum: float | None
) -> None:
    ours, theirs = BatchNorm(5, eps=1e-3, momentum=momentum), nn.BatchNorm1d(5, 1e-3, momentum)
    randomise(ours)
    nn.init.uniform_(ours.running_mean)
    nn.init.uniform_(ours.running_var, 1, 2)
    theirs.load_state_dict(ours.state_dict())
    ours.train(training)
    theirs.train(training)
    for _ in range(3):
        x = (torch.randn(shape) * 3 + 1).requires_grad_()
        y = ours(x)
        folded = x.flatten(0, 1)
        z = theirs(folded.flatten(2) if folded.dim() > 2 else folded).view(shape)
        torch.testing.assert_close(y, z)
        upstream = torch.randn(shape)
        for got, expected in zip(
            torch.autograd.grad(y, [x, *ours.parameters()], upstream),
            torch.autograd.grad(z, [x, *theirs.parameters()], upstream),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for got, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(got, expected)
    assert ours.num_batches_tracked == (3 if training else 0)


def test_state_is_that_of_torch() -> None:
    assert list(BatchNorm(5).state_dict()) == list(TdBN(5).state_dict()) == list(nn.BatchNorm2d(5).state_dict())
    assert isinstance(BatchNorm(5), nn.BatchNorm2d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 1, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_one_element_per_channel(form: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = (BatchNorm(5) if form is None else TdBN(5, 0.5, **FORMS[form])).train()
    randomise(norm)
    if dtype == torch.float64:
        norm.double()
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.flatten(), norm.bias.to(dtype))
    y.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().flatten().to(norm.running_mean.dtype))
    assert norm.running_var.isfinite().all()
    assert (norm.running_var > 0).all()
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("form", [None, *FORMS])
def test_constant_channels_have_finite_gradients(form: str | None) -> None:
    norm = (BatchNorm(3) if form is None else TdBN(3, 0.5, **FORMS[form])).train()
    x = torch.full((2, 2, 3, 4, 4), 0.7, requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-2)
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_precision(form: str | None, dtype: torch.dtype) -> None:
    # float64 all through; bfloat16 activations with float32 statistics, as under autocast.
    norm = (BatchNorm(5) if form is None else TdBN(5, 0.5, **FORMS[form])).train()
    full = (BatchNorm(5) if form is None else TdBN(5, 0.5, **FORMS[form])).train()
    x = torch.randn(4, 3, 5, 6, 6, dtype=torch.float64) * 2 + 3
    if dtype == torch.float64:
        norm.double()
        y = norm(x)
        assert y.dtype == torch.float64
        flat = x.movedim(2, 0).flatten(1)
        scale = 1.0 if form is None else 0.5
        deviation = (
            flat.std(1, correction=0) if form and "outside" in form else (flat.var(1, correction=0) + 1e-5).sqrt()
        )
        if form and "outside" in form:
            deviation = deviation + 1e-5
        expected = (x - flat.mean(1).view(5, 1, 1)) / deviation.view(5, 1, 1) * scale
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_mean, 0.1 * flat.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * flat.var(1), rtol=1e-12, atol=1e-12)
        return
    low = x.to(torch.bfloat16)
    y = norm(low)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), full(low.float()), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(norm.running_mean, full.running_mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, full.running_var, rtol=1e-2, atol=1e-3)
    norm.eval()
    assert norm(low).dtype == torch.bfloat16


# --- tdBN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 2**-0.5])
@pytest.mark.parametrize("v_threshold", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("form", FORMS)
def test_tdbn_starts_at_the_threshold(form: str, v_threshold: float, alpha: float) -> None:
    norm = TdBN(5, v_threshold, alpha, **FORMS[form]).train()
    x = torch.randn(4, 6, 5, 8, 8) * torch.tensor([0.3, 1.0, 5.0, 20.0, 2.0]).view(5, 1, 1) + 7
    y = norm(x).movedim(2, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(1, correction=0), torch.full((5,), alpha * v_threshold), rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["multiplier", "affine"])
def test_tdbn_is_scaled_batch_norm(form: str, training: bool) -> None:
    x = torch.randn(4, 3, 5, 6, 6) * 3 + 1
    plain = nn.BatchNorm2d(5).train(training)
    norm = TdBN(5, 0.6, 0.7, **FORMS[form]).train(training)
    expected = plain(x.flatten(0, 1)).view_as(x) * (0.6 * 0.7)
    torch.testing.assert_close(norm(x), expected)
    for got, wanted in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_tdbn_weights_of_the_two_forms() -> None:
    multiplier, affine = TdBN(3, 0.5, 0.8), TdBN(3, 0.5, 0.8, form="affine")
    assert multiplier.weight.tolist() == [1, 1, 1]
    torch.testing.assert_close(affine.weight.detach(), torch.full((3,), 0.4))
    x, upstream = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    a, b = multiplier(x), affine(x)
    torch.testing.assert_close(a, b)
    a.backward(upstream)
    b.backward(upstream)
    # One function, another learning rate: the multiplier scales the weight's gradient, not the bias's.
    assert multiplier.weight.grad is not None
    assert affine.weight.grad is not None
    torch.testing.assert_close(multiplier.weight.grad, affine.weight.grad * 0.4)
    torch.testing.assert_close(multiplier.bias.grad, affine.bias.grad)


def test_eps_outside_the_root() -> None:
    # A channel of deviation 1e-3: sqrt(var + eps) and sqrt(var) + eps differ threefold.
    x = torch.randn(4, 8, 1, 8, 8) * 1e-3
    inside, outside = TdBN(1), TdBN(1, eps_outside=True)
    deviation = x.std(correction=0)
    torch.testing.assert_close(inside(x), (x - x.mean()) / (deviation**2 + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outside(x), (x - x.mean()) / (deviation + 1e-5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outside.running_var, 0.9 + 0.1 * x.var().view(1))


@pytest.mark.parametrize("form", [None, *FORMS])
def test_fusion_into_the_convolution_before(form: str | None) -> None:
    conv = Conv2d(3, 5, 3).double()
    norm = (BatchNorm(5) if form is None else TdBN(5, 0.6, 0.7, **FORMS[form])).double()
    randomise(norm)
    for _ in range(3):
        norm(conv(torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)))
    norm.eval()
    x = torch.randn(4, 2, 3, 6, 6, dtype=torch.float64)
    expected = norm(conv(x))
    outside = form is not None and "outside" in form
    deviation = norm.running_var.sqrt() + norm.eps if outside else (norm.running_var + norm.eps).sqrt()
    factor = norm.scaled_weight() / deviation
    fused = Conv2d(3, 5, 3).double()
    with torch.no_grad():
        fused.weight.copy_(conv.weight * factor.view(-1, 1, 1, 1))
        fused.bias.copy_(norm.bias + factor * (conv.bias - norm.running_mean))  # pyright: ignore
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused(x), expected, rtol=1e-9, atol=1e-9)


def test_tdbn_refuses_unknown_forms() -> None:
    with pytest.raises(ValueError, match="form must be 'multiplier' or 'affine', got 'other'"):
        TdBN(3, form="other")  # pyright: ignore[reportArgumentType]


def test_settings_are_shown() -> None:
    assert "scale=0.5, eps_outside=True" in repr(TdBN(3, 0.5, eps_outside=True))


def test_sum_of_two_branches_keeps_the_threshold() -> None:
    alpha = add_to_branches(2)
    assert alpha == pytest.approx(2**-0.5)
    norms = [TdBN(4, 0.5, alpha).train() for _ in range(2)]
    total = sum(norm(torch.randn(4, 16, 4, 16, 16) * 3) for norm in norms)
    assert isinstance(total, Tensor)
    assert total.std().item() == pytest.approx(0.5, rel=0.02)


# --- the unit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
def test_norm_spike_is_norm_residual_neuron(residual: bool) -> None:
    unit = NormSpike(4, lambda: LIF(decay_input=False)).train()
    norm, neuron = BatchNorm(4).train(), LIF(decay_input=False)
    x = torch.randn(5, 3, 4, 6, 6)
    r = torch.randn(5, 3, 4, 6, 6) if residual else None
    u = norm(x) if r is None else norm(x) + r
    s, total = unit.with_sum(x, r)
    torch.testing.assert_close(total, u, rtol=1e-5, atol=1e-5)  # the fused op rounds in an order of its own
    assert torch.equal(s, neuron(total))
    assert s.sum() > 50
    assert torch.equal(unit(x, r), s)
    assert unit.norm.num_batches_tracked == 2


def test_norm_spike_takes_any_norm_and_neuron() -> None:
    unit = NormSpike(4, lambda: IF(0.6), lambda channels: TdBN(channels, 0.6))
    assert isinstance(unit.norm, TdBN)
    assert unit.neuron.v_threshold == 0.6  # pyright: ignore
    assert {name for name, _ in unit.named_parameters()} == {"norm.weight", "norm.bias"}


def test_norm_spike_streams() -> None:
    unit: Any = NormSpike(4, LIF).double().eval()
    x = torch.randn(5, 3, 4, 2, 2, dtype=torch.float64) * 3
    stream = Stream(unit)
    assert torch.equal(torch.cat([stream(x_t[None]) for x_t in x]), unit(x))
