"""Products with a matrix over time, then the threshold: the PSN family (Fang et al. 2023, PSN, Eqs. 4-10).

    PSN          H = W X + b,              S = Theta(H)         W [T, T], b [T] = -B
    masked PSN   H = (W . M_k) X + b,      S = Theta(H)         M_k: terms t - k + 1 to t
    sliding PSN  H[t] = sum_i w_i X[t - k + 1 + i] + b          w [k], b a scalar

One W mixes time for all neurons of a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.modes import without_autocast
from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import NATIVE_DTYPES, as_rows, from_rows, like, ordered, pointer, steps_of, sums_like
from spikeloom.ops.scan import fire
from spikeloom.ops.scan.params import surrogate_number
from spikeloom.surrogates import SLOPE, Surrogate

# Up to this many steps the whole product is done in cache, block by block; beyond it a library's GEMM is faster.
_SMALL_T = 32


def psn(x: Tensor, weight: Tensor, bias: Tensor, surrogate: Surrogate, order: int | None = None) -> Tensor:
    """PSN, or with an `order` k the masked PSN whose mask is fully on.

    Args:
        x: currents [T, N, ...].
        weight: [T, T]; with an order, entries outside the band are not read and get no gradient.
        bias: [T], minus the threshold of every step.
        surrogate: its derivative replaces that of Theta.
        order: how many steps, up to the present one, a step sees.

    Returns:
        Spikes [T, N, ...] of x's dtype.
    """
    steps = x.shape[0]
    banded = order is not None and order < steps
    if _dispatch.choose("psn", x, NATIVE_DTYPES) == "native" and (banded or steps <= _SMALL_T):
        return _native(x, weight, bias, surrogate, 0 if order is None else min(order, steps), False)
    if order is not None:
        weight = weight * band_mask(steps, order, weight)
    return fire(over_time(x, weight, bias), surrogate).to(x.dtype)


def sliding_psn(x: Tensor, weight: Tensor, bias: Tensor, surrogate: Surrogate) -> Tensor:
    """Sliding PSN of order k.

    Args:
        x: currents [T, N, ...], any T.
        weight: [k], the last for the present step.
        bias: scalar, minus the threshold.
        surrogate: its derivative replaces that of Theta.

    Returns:
        Spikes [T, N, ...] of x's dtype.
    """
    steps, order = x.shape[0], weight.shape[0]
    if _dispatch.choose("sliding_psn", x, NATIVE_DTYPES) == "native":
        return _native(x, weight, bias.view(1), surrogate, order, True)
    return fire(over_time(x, sliding_matrix(weight, steps), bias.expand(steps)), surrogate).to(x.dtype)


def over_time(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The matrix product over time, `weight @ x + bias`: [T, N, ...] -> float32 (float64) [T, N, ...]."""
    rows, order = as_rows(x)
    rows = rows.to(weight.dtype)
    with without_autocast(x):
        h = weight @ rows if bias is None else torch.addmm(bias.unsqueeze(1), weight, rows)
    return from_rows(h, x.shape, order)


def band_mask(steps: int, order: int, like: Tensor) -> Tensor:
    """M_k [T, T]: 1 where the term t - k + 1 <= j <= t."""
    ones = torch.ones(steps, steps, dtype=like.dtype, device=like.device)
    return ones.tril().triu(1 - order)


def sliding_matrix(weight: Tensor, steps: int) -> Tensor:
    """The banded [T, T] whose every row repeats the k weights: entry (t, j) is `weight[k - 1 - (t - j)]`."""
    order = weight.shape[0]
    t = torch.arange(steps, device=weight.device)
    lag = t.unsqueeze(1) - t
    inside = (lag >= 0) & (lag < order)
    return weight[(order - 1 - lag).clamp(0, order - 1)] * inside


def _native(x: Tensor, weight: Tensor, bias: Tensor, surrogate: Surrogate, order: int, sliding: bool) -> Tensor:
    slope = None
    formula = surrogate.formula
    if formula is None and torch.is_grad_enabled():
        with torch.no_grad():
            slope = surrogate.checked_derivative(_psn_potentials(x, weight, bias, order, sliding))
    return _psn(x, weight, bias, slope, order, sliding, *(formula or SLOPE))


class _Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    slope: Tensor | None
    order: int
    sliding: bool
    kind: str
    p: float
    q: float


class _PotentialInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    order: int
    sliding: bool


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor
    slope: Tensor | None
    order: int
    sliding: bool
    kind: str
    p: float
    q: float


class _Gradients(NamedTuple):
    """Of x, and in float64 of weight and bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def _fields(i: _Inputs | _PotentialInputs | _BackwardInputs, template: Tensor) -> tuple[dict[str, Any], Any]:
    """The kernels' arguments, and the tensors to which they point."""
    x = ordered(i.x, template, repeated=True)
    weight, bias = i.weight.float().contiguous(), i.bias.float().contiguous()
    pointers = {"weight": weight.data_ptr(), "bias": bias.data_ptr()}
    return {**steps_of(x), "order": i.order, "sliding": i.sliding, **pointers}, (x, weight, bias)


def _allocate(i: _Inputs) -> Tensor:
    return like(i.x, i.x.dtype)


def _fill(i: _Inputs, spikes: Tensor) -> None:
    fields, _kept = _fields(i, spikes)
    _dispatch.native.psn_forward(**fields, spikes=spikes.data_ptr(), potentials=0)


def _allocate_potentials(i: _PotentialInputs) -> Tensor:
    return like(i.x, torch.float32)


def _fill_potentials(i: _PotentialInputs, h: Tensor) -> None:
    spikes = like(i.x, i.x.dtype)
    fields, _kept = _fields(i, h)
    _dispatch.native.psn_forward(**fields, spikes=spikes.data_ptr(), potentials=h.data_ptr())


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    return _Gradients(like(i.x, i.x.dtype), sums_like(i.weight), sums_like(i.bias))


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    fields, _kept = _fields(i, out.x)
    grad_spikes = ordered(i.grad_spikes, out.x, i.x.dtype)
    slope = None if i.slope is None else ordered(i.slope, out.x, torch.float32)
    _dispatch.native.psn_backward(
        **fields,
        grad_spikes=grad_spikes.data_ptr(),
        slope=pointer(slope),
        surrogate=surrogate_number(i.kind),
        p=i.p,
        q=i.q,
        grad_x=out.x.data_ptr(),
        grad_weight=out.weight.zero_().data_ptr(),
        grad_bias=out.bias.zero_().data_ptr(),
    )


def _save(ctx: Any, i: _Inputs, spikes: Tensor) -> None:
    ctx.save_for_backward(*i[:4])
    ctx.settings = i[4:]


def _differentiate(ctx: Any, grad_spikes: Tensor) -> tuple[Any, ...]:
    x, weight, bias, slope = ctx.saved_tensors
    found = _psn_backward(grad_spikes, x, weight, bias, slope, *ctx.settings)
    return found.x, found.weight, found.bias, *(None,) * 6


_psn = native_op("psn", _Inputs, _allocate, _fill, _save, _differentiate)
_psn_potentials = native_op("psn_potentials", _PotentialInputs, _allocate_potentials, _fill_potentials)
_psn_backward = native_op("psn_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
