"""Products with a matrix over time, then the threshold: the PSN family (Fang et al. 2023, PSN, Eqs. 4-10).

    PSN          H = W X + b,              S = Theta(H)         W [T, T], b [T] = -B
    masked PSN   H = (W . M_k) X + b,      S = Theta(H)         M_k: terms t - k + 1 to t
    sliding PSN  H[t] = sum_i w_i X[t - k + 1 + i] + b          w [k], b a scalar

One W mixes time for all neurons of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import NATIVE_DTYPES, as_rows, dense, fresh, from_rows, like, ordered, pointer, steps_of
from spikeloom.ops.scan import fire
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
    with torch.autocast(x.device.type, enabled=False):
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
            slope = surrogate.derivative(_psn_potentials(x, weight, bias, order, sliding))
    kind, p, q = formula or (SLOPE, 0.0, 0.0)
    return _psn(x, weight, bias, slope, order, sliding, kind, p, q)


def _fields(x: Tensor, weight: Tensor, bias: Tensor, order: int, sliding: bool) -> dict[str, Any]:
    return {
        **steps_of(x),
        "order": order,
        "sliding": sliding,
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
    }


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    order: int,
    sliding: bool,
    kind: int,
    p: float,
    q: float,
) -> Tensor:
    x, weight, bias = dense(x), weight.float().contiguous(), bias.float().contiguous()
    spikes = fresh(x, x.dtype)
    _dispatch.native.band_forward(**_fields(x, weight, bias, order, sliding), spikes=spikes.data_ptr(), potentials=0)
    return spikes


def _fake(x: Tensor, *_: Any) -> Tensor:
    return like(dense(x), x.dtype)


def _potentials(x: Tensor, weight: Tensor, bias: Tensor, order: int, sliding: bool) -> Tensor:
    x, weight, bias = dense(x), weight.float().contiguous(), bias.float().contiguous()
    spikes, h = fresh(x, x.dtype), fresh(x, torch.float32)
    _dispatch.native.band_forward(
        **_fields(x, weight, bias, order, sliding), spikes=spikes.data_ptr(), potentials=h.data_ptr()
    )
    return h


def _fake_potentials(x: Tensor, *_: Any) -> Tensor:
    return like(dense(x), torch.float32)


def _backward(
    grad_spikes: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slope: Tensor | None,
    order: int,
    sliding: bool,
    kind: int,
    p: float,
    q: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = dense(x), weight.float().contiguous(), bias.float().contiguous()
    grad_x = fresh(x, x.dtype)
    grad_spikes = ordered(grad_spikes, grad_x, x.dtype)
    slope = None if slope is None else ordered(slope, grad_x, torch.float32)
    grad_weight, grad_bias = torch.zeros_like(weight, dtype=torch.float64), torch.zeros_like(bias, dtype=torch.float64)
    _dispatch.native.band_backward(
        **_fields(x, weight, bias, order, sliding),
        grad_spikes=grad_spikes.data_ptr(),
        slope=pointer(slope),
        surrogate=kind,
        p=p,
        q=q,
        grad_x=grad_x.data_ptr(),
        grad_weight=grad_weight.data_ptr(),
        grad_bias=grad_bias.data_ptr(),
    )
    return grad_x, grad_weight.float(), grad_bias.float()


def _fake_backward(grad_spikes: Any, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(dense(x), x.dtype), torch.empty_like(weight).float(), torch.empty_like(bias).float()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.order, ctx.sliding, ctx.kind, ctx.p, ctx.q = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_spikes: Tensor) -> tuple[Any, ...]:
    x, weight, bias, slope = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _psn_backward(
        grad_spikes, x, weight, bias, slope, ctx.order, ctx.sliding, ctx.kind, ctx.p, ctx.q
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *(None,) * 6


_psn = NativeOp("psn", _forward, _fake, _save, _differentiate)
_psn_potentials = NativeOp("psn_potentials", _potentials, _fake_potentials)
_psn_backward = NativeOp("psn_backward", _backward, _fake_backward)
