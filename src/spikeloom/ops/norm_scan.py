"""Batch normalisation and the neurons behind it as one op, for training and inference.

    U[t] = weight (X[t] - mean) k + bias + residual[t]      k = 1 / sqrt(var + eps), or 1 / (sqrt(var) + eps)
    S[t] from U by `ops.scan`,     output S[t] + add[t]

Forward reads X twice, for the statistics and for the scan, and writes spikes. Backward computes the potentials again:
one pass writes dL/dU and sums it and dL/dU X by channel, a second one makes dL/dX of these in place. Kept are X, the
residual, the statistics, and of long scans the potentials every 32 steps. The definition is the composition of norm,
sum and neuron in `layers.NormSpike`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import like_by_channels, ordered, pointer, rows_like, steps_by_channels
from spikeloom.ops.scan.native import CHUNK, as_tensor, starts_like
from spikeloom.ops.scan.params import ScanParams
from spikeloom.ops.scan.reference import Constant


class NormScan(NamedTuple):
    """What `norm_scan` gives.

    Attributes:
        spikes: [T, N, C, ...], `add` included.
        sum: U, where it was wanted.
        v: the last potentials [levels, N, C, ...], where they were wanted.
        mean, variance: of the batch [C], the variance with the factor 1 / n; those given, in evaluation.
        starts: potentials with which chunks of a long scan begin, for the backward pass.
    """

    spikes: Tensor
    sum: Tensor | None
    v: Tensor | None
    mean: Tensor
    variance: Tensor
    starts: Tensor | None


def norm_scan(
    x: Tensor,
    residual: Tensor | None,
    add: Tensor | None,
    v: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    eps_outside: bool,
    decay: Constant,
    gain: Constant,
    params: ScanParams,
    return_sum: bool,
    return_v: bool,
) -> NormScan:
    """Runs the equations at the top of this file.

    Args:
        x: [T, N, C, ...], float32 or bfloat16; a repeated image is read from cache, and its statistics taken once.
        residual, add: [T, N, C, ...] of x's dtype, or None.
        v: potentials before the first step [levels, N, C, ...]; None for rest.
        weight, bias: [C], float32.
        statistics: mean and variance [C] of an evaluation; None takes those of x.
        eps, eps_outside: where eps stands in k.
        decay, gain: of the charge.
        params: of the scan, without decay and gain.
        return_sum, return_v: whether the caller wants U and the last potentials.
    """
    mean, variance = statistics or (None, None)
    norm = (weight, bias, mean, variance)
    charge = (as_tensor(decay), as_tensor(gain))
    return _norm_scan(x, residual, add, v, *norm, *charge, params.pack(), eps, eps_outside, return_sum, return_v)


def _inverse(variance: Tensor, eps: float, eps_outside: bool, single: bool) -> Tensor:
    """k; of a single element a channel, which is its own mean, exactly nothing is left."""
    if single:
        return torch.zeros_like(variance)
    if not eps_outside:
        return torch.rsqrt(variance + eps)
    return 1 / (variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt() + eps)


def _narrowing(variance: Tensor, k: Tensor, eps_outside: bool) -> Tensor:
    """-2 dk / d variance, float64."""
    if not eps_outside:
        return k.double() ** 3
    return k.double().square() / variance.clamp_min(torch.finfo(torch.float32).tiny).double().sqrt()


def _single(x: Tensor, frozen: bool) -> bool:
    """Whether batch statistics are of one element a channel."""
    return not frozen and x.numel() // x.shape[2] == (x.shape[0] if _repeats(x) else 1)


def _repeats(x: Tensor) -> bool:
    return x.shape[0] > 1 and x.stride(0) == 0


def _charge_fields(decay: Tensor, gain: Tensor) -> dict[str, Any]:
    return {"decay": decay.item(), "gain": gain.item(), "scale": 1.0, "rectified": False}


# --- forward ----------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    x: Tensor
    residual: Tensor | None
    add: Tensor | None
    v: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    variance: Tensor | None
    decay: Tensor
    gain: Tensor
    numbers: list[float]
    eps: float
    eps_outside: bool
    return_sum: bool
    return_v: bool


def _allocate(i: _Inputs) -> NormScan:
    spikes, levels = like_by_channels(i.x, i.x.dtype), ScanParams.levels_of(i.numbers)
    mean = i.x.new_empty(i.x.shape[2], dtype=torch.float32)
    return NormScan(
        spikes,
        sum=like_by_channels(i.x, i.x.dtype) if i.return_sum else None,
        v=rows_like(levels, spikes[0], torch.float32) if i.return_v else None,
        mean=mean,
        variance=torch.empty_like(mean),
        starts=starts_like(levels, spikes),
    )


def _fill(i: _Inputs, out: NormScan) -> None:
    x, params = ordered(i.x, out.spikes, repeated=True), ScanParams.unpack(i.numbers)
    fields = steps_by_channels(x, out.spikes)
    if i.mean is None or i.variance is None:
        moments = {**fields, "steps": 1} if _repeats(x) else fields
        _dispatch.native.moments(**moments, mean=out.mean.data_ptr(), variance=out.variance.data_ptr())
    else:
        out.mean.copy_(i.mean)
        out.variance.copy_(i.variance)
    factor = i.weight.float() * _inverse(out.variance, i.eps, i.eps_outside, _single(x, i.mean is not None))
    shift = i.bias.float() - out.mean * factor
    residual = None if i.residual is None else ordered(i.residual, out.spikes)
    add = None if i.add is None else ordered(i.add, out.spikes)
    v = None if i.v is None else ordered(i.v, rows_like(params.levels, out.spikes[0], i.v.dtype))
    _dispatch.native.scan_forward(
        **fields,
        **_charge_fields(i.decay, i.gain),
        **params.kernel_fields().forward,
        chunk=min(x.shape[0], CHUNK),
        factor=factor.data_ptr(),
        shift=shift.data_ptr(),
        residual=pointer(residual),
        v=pointer(v),
        spikes=out.spikes.data_ptr(),
        sum=pointer(out.sum),
        add=pointer(add),
        v_out=pointer(out.v),
        potentials=0,
        starts=pointer(out.starts),
    )


# --- backward ---------------------------------------------------------------------------------------------------------


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    grad_sum: Tensor | None
    grad_last: Tensor | None
    x: Tensor
    residual: Tensor | None
    v: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    decay: Tensor
    gain: Tensor
    starts: Tensor | None
    numbers: list[float]
    eps: float
    eps_outside: bool
    frozen: bool
    learn: bool


class _Gradients(NamedTuple):
    """Of x, for all steps or for a repeated image one sum; of the others, None where there is none."""

    x: Tensor
    residual: Tensor | None
    v: Tensor | None
    weight: Tensor
    bias: Tensor
    constants: Tensor | None


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    # A repeated image gets the sum of its steps.
    repeated = _repeats(i.x) and i.residual is None
    grad_x = like_by_channels(i.x[:1] if repeated else i.x, i.x.dtype)
    weight = i.x.new_empty(i.x.shape[2], dtype=torch.float32)
    levels = ScanParams.levels_of(i.numbers)
    return _Gradients(
        grad_x,
        residual=None if i.residual is None else like_by_channels(i.x, i.x.dtype),
        v=None if i.v is None else rows_like(levels, grad_x[0], torch.float32),
        weight=weight,
        bias=torch.empty_like(weight),
        constants=i.x.new_empty(3, dtype=torch.float64) if i.learn else None,
    )


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    template = like_by_channels(i.x, i.x.dtype) if out.x.shape[0] != i.x.shape[0] else out.x
    x, params, C = ordered(i.x, template, repeated=True), ScanParams.unpack(i.numbers), i.x.shape[2]
    repeated = _repeats(x) and i.residual is None
    k = _inverse(i.variance, i.eps, i.eps_outside, _single(x, i.frozen))
    factor = i.weight.float() * k
    shift = i.bias.float() - i.mean * factor
    # With a residual its gradient is dL/dU itself; without, dL/dU is turned into dL/dX where it lies.
    grad_u = out.x if out.residual is None else out.residual
    grad_spikes = ordered(i.grad_spikes, template, x.dtype)
    grad_sum = None if i.grad_sum is None else ordered(i.grad_sum, template, x.dtype)
    residual = None if i.residual is None else ordered(i.residual, template)
    v, grad_last = i.v, i.grad_last
    if v is not None or grad_last is not None:
        states = rows_like(params.levels, template[0], torch.float32) if out.v is None else out.v
        v = None if v is None else ordered(v, states)
        grad_last = None if grad_last is None else ordered(grad_last, states, torch.float32)
    sums = x.new_empty(2, C, dtype=torch.float64)
    fields, kernel_fields = steps_by_channels(x, template), params.kernel_fields()
    _dispatch.native.scan_backward(
        **fields,
        **_charge_fields(i.decay, i.gain),
        **kernel_fields.forward,
        **kernel_fields.backward,
        chunk=min(x.shape[0], CHUNK),
        factor=factor.data_ptr(),
        shift=shift.data_ptr(),
        residual=pointer(residual),
        v=pointer(v),
        grad_spikes=grad_spikes.data_ptr(),
        grad_sum=pointer(grad_sum),
        grad_v_out=pointer(grad_last),
        starts=pointer(i.starts),
        slope=0,
        grad_u=grad_u.data_ptr(),
        sum_steps=repeated,
        grad_v=pointer(out.v),
        grad_constants=pointer(out.constants),
        grad_norm=sums.data_ptr(),
    )
    passed, passed_x = sums[0], sums[1] - i.mean * sums[0]  # of dL/dU, and of dL/dU (X - mean)
    if not i.frozen:
        # Of a constant channel the difference of two rounded sums is left, which k magnifies.
        passed_x *= i.variance > 0
    out.weight.copy_(passed_x * k)
    out.bias.copy_(passed)
    slope, offset = torch.zeros_like(factor), torch.zeros_like(factor)
    if not i.frozen:
        curved = i.weight.double() * _narrowing(i.variance, k, i.eps_outside) * passed_x / (x.numel() // C)
        slope, offset = (-curved).float(), (i.mean * curved - factor * passed / (x.numel() // C)).float()
    if repeated:  # every step gets its part of the sum
        factor, fields["steps"] = factor / fields["steps"], 1
    _dispatch.native.affine(
        **fields,
        g=grad_u.data_ptr(),
        a=factor.data_ptr(),
        b=slope.data_ptr(),
        c=offset.data_ptr(),
        out=out.x.data_ptr(),
    )


def _save(ctx: Any, i: _Inputs, out: NormScan) -> None:
    ctx.settings = i.numbers, i.eps, i.eps_outside
    ctx.frozen, ctx.added = i.mean is not None, i.add is not None
    norm = (i.weight, i.bias, out.mean, out.variance)
    ctx.save_for_backward(i.x, i.residual, i.v, *norm, i.decay, i.gain, out.starts)
    ctx.set_materialize_grads(False)
    results = ((out.sum, i.return_sum), (out.v, i.return_v), (out.starts, False))
    unwanted = [t for t, wanted in results if t is not None and not wanted]
    ctx.mark_non_differentiable(out.mean, out.variance, *unwanted)


def _differentiate(
    ctx: Any, grad_spikes: Tensor | None, grad_sum: Tensor | None, grad_last: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, residual, v, weight, bias, mean, variance, decay, gain, starts = ctx.saved_tensors
    learn = ctx.needs_input_grad[8] or ctx.needs_input_grad[9]
    if grad_spikes is None:
        grad_spikes = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if ctx.added:
        # This gradient is handed on as it is. In another layout it would meet the convolutions' in every block before.
        grad_spikes = ordered(grad_spikes, like_by_channels(x, x.dtype))
    grads = (grad_spikes, grad_sum, grad_last)
    norm = (weight, bias, mean, variance)
    found = _norm_scan_backward(*grads, x, residual, v, *norm, decay, gain, starts, *ctx.settings, ctx.frozen, learn)
    return (
        found.x.expand(x.shape),
        None if residual is None else found.residual,
        grad_spikes if ctx.added else None,
        None if v is None else found.v,
        found.weight,
        found.bias,
        None,
        None,
        found.constants[0] if ctx.needs_input_grad[8] else None,
        found.constants[1] if ctx.needs_input_grad[9] else None,
        *(None,) * 5,
    )


_norm_scan = native_op("norm_scan", _Inputs, _allocate, _fill, _save, _differentiate)
_norm_scan_backward = native_op("norm_scan_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
