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
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import by_channels, fresh, like, ordered, pointer, rows_like, steps_by_channels
from spikeloom.ops.scan.native import CHUNK, Numbers, as_tensor, firing, levels_of, starts_like
from spikeloom.ops.scan.reference import Constant


class NormScan(NamedTuple):
    """What `norm_scan` gives.

    Attributes:
        spikes: [T, N, C, ...], `add` included.
        sum: U, or empty.
        v: the last potentials [levels, N, C, ...], or empty.
        mean, variance: of the batch [C], the variance with the factor 1 / n; those given, in evaluation.
    """

    spikes: Tensor
    sum: Tensor
    v: Tensor
    mean: Tensor
    variance: Tensor


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
    numbers: Numbers,
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
        decay, gain, numbers: of the scan (`scan_native.firing_numbers`).
        return_sum, return_v: whether the caller wants U and the last potentials.
    """
    mean, variance = statistics or (None, None)
    *found, _ = _norm_scan(
        x,
        residual,
        add,
        v,
        weight,
        bias,
        mean,
        variance,
        as_tensor(decay),
        as_tensor(gain),
        numbers,
        eps,
        eps_outside,
        return_sum,
        return_v,
    )
    return NormScan(*found)


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


def _single(x: Tensor, channels: int, frozen: bool) -> bool:
    """Whether batch statistics are of one element a channel."""
    return not frozen and x.numel() // channels == (x.shape[0] if _repeats(x) else 1)


def _repeats(x: Tensor) -> bool:
    return x.shape[0] > 1 and x.stride(0) == 0


def _moments(x: Tensor, layout: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance (factor 1 / n) of every channel, float32."""
    mean = x.new_empty(layout["channels"], dtype=torch.float32)
    variance = torch.empty_like(mean)
    fields = steps_by_channels(x, layout)
    if _repeats(x):
        fields["steps"] = 1
    _dispatch.native.moments(**fields, mean=mean.data_ptr(), variance=variance.data_ptr())
    return mean, variance


def _charge_fields(decay: Tensor, gain: Tensor) -> dict[str, Any]:
    return {"decay": decay.item(), "gain": gain.item(), "scale": 1.0, "rectified": False}


def _no_potentials(x: Tensor) -> Tensor:
    """Stands for potentials that nobody wants."""
    return x.new_empty(0, dtype=torch.float32)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    add: Tensor | None,
    v: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    numbers: list[float],
    eps: float,
    eps_outside: bool,
    return_sum: bool,
    return_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    x, layout = by_channels(x)
    a = firing(tuple(numbers))
    single = _single(x, layout["channels"], mean is not None)
    if mean is None or variance is None:
        mean, variance = _moments(x, layout)
    else:
        mean, variance = mean.float().clone(), variance.float().clone()
    factor = weight.float() * _inverse(variance, eps, eps_outside, single)
    shift = bias.float() - mean * factor
    spikes = fresh(x, x.dtype)
    total = fresh(x, x.dtype) if return_sum else x.new_empty(0)
    last = rows_like(a.levels, spikes[0], torch.float32) if return_v else _no_potentials(x)
    starts = starts_like(a.levels, spikes)
    residual = None if residual is None else ordered(residual, spikes)
    add = None if add is None else ordered(add, spikes)
    v = None if v is None else ordered(v, rows_like(a.levels, spikes[0], v.dtype))
    _dispatch.native.scan_forward(
        **steps_by_channels(x, layout),
        **_charge_fields(decay, gain),
        **a.forward,
        chunk=min(x.shape[0], CHUNK),
        factor=factor.data_ptr(),
        shift=shift.data_ptr(),
        residual=pointer(residual),
        v=pointer(v),
        spikes=spikes.data_ptr(),
        sum=total.data_ptr() if return_sum else 0,
        add=pointer(add),
        v_out=last.data_ptr() if return_v else 0,
        potentials=0,
        starts=pointer(starts),
    )
    return spikes, total, last, mean, variance, starts


def _fake(
    x: Tensor,
    residual: Any,
    add: Any,
    v: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    decay: Any,
    gain: Any,
    numbers: Any,
    eps: Any,
    eps_outside: Any,
    return_sum: bool,
    return_v: bool,
) -> Any:
    x, layout = by_channels(x)
    C = layout["channels"]
    spikes = like(x, x.dtype)
    total = torch.empty_like(spikes) if return_sum else x.new_empty(0)
    last = rows_like(levels_of(numbers), spikes[0], torch.float32) if return_v else _no_potentials(x)
    mean, starts = x.new_empty(C, dtype=torch.float32), starts_like(levels_of(numbers), spikes)
    return spikes, total, last, mean, torch.empty_like(mean), starts


def _backward(
    grad_spikes: Tensor,
    grad_sum: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    v: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    decay: Tensor,
    gain: Tensor,
    starts: Tensor | None,
    numbers: list[float],
    eps: float,
    eps_outside: bool,
    frozen: bool,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, layout = by_channels(x)
    a, C = firing(tuple(numbers)), layout["channels"]
    # A repeated image gets the sum of its steps.
    repeated = _repeats(x) and residual is None
    k = _inverse(variance, eps, eps_outside, _single(x, C, frozen))
    factor = weight.float() * k
    shift = bias.float() - mean * factor
    template = like(x, x.dtype) if repeated else fresh(x, x.dtype)
    # With a residual its gradient is dL/dU itself; without, dL/dU is turned into dL/dX where it lies.
    grad_u = rows_like(1, template[0], x.dtype) if repeated else template
    grad_spikes = ordered(grad_spikes, template, x.dtype)
    grad_sum = None if grad_sum is None else ordered(grad_sum, template, x.dtype)
    residual = None if residual is None else ordered(residual, template)
    states = rows_like(a.levels, template[0], torch.float32) if v is not None or grad_last is not None else None
    if states is not None:
        v = None if v is None else ordered(v, states)
        grad_last = None if grad_last is None else ordered(grad_last, states, torch.float32)
    sums = x.new_empty(2, C, dtype=torch.float64)
    constants = x.new_empty(3 if learn else 0, dtype=torch.float64)
    fields = steps_by_channels(x, layout)
    _dispatch.native.scan_backward(
        **fields,
        **_charge_fields(decay, gain),
        **a.forward,
        **a.backward,
        chunk=min(x.shape[0], CHUNK),
        factor=factor.data_ptr(),
        shift=shift.data_ptr(),
        residual=pointer(residual),
        v=pointer(v),
        grad_spikes=grad_spikes.data_ptr(),
        grad_sum=pointer(grad_sum),
        grad_v_out=pointer(grad_last),
        starts=pointer(starts),
        slope=0,
        grad_u=grad_u.data_ptr(),
        sum_steps=repeated,
        grad_v=0 if v is None else pointer(states),
        grad_constants=constants.data_ptr() if learn else 0,
        grad_norm=sums.data_ptr(),
    )
    passed, passed_x = sums[0], sums[1] - mean * sums[0]  # of dL/dU, and of dL/dU (X - mean)
    grad_weight, grad_bias = (passed_x * k).float(), passed.float()
    slope, offset = torch.zeros_like(factor), torch.zeros_like(factor)
    if not frozen:
        curved = weight.double() * _narrowing(variance, k, eps_outside) * passed_x / (x.numel() // C)
        slope, offset = (-curved).float(), (mean * curved - factor * passed / (x.numel() // C)).float()
    if repeated:  # every step gets its part of the sum
        factor, fields["steps"] = factor / fields["steps"], 1
    grad_x = grad_u if residual is None else fresh(x, x.dtype)
    _dispatch.native.affine(
        **fields,
        g=grad_u.data_ptr(),
        a=factor.data_ptr(),
        b=slope.data_ptr(),
        c=offset.data_ptr(),
        out=grad_x.data_ptr(),
    )
    grad_v = _no_potentials(x) if v is None or states is None else states
    return grad_x, x.new_empty(0) if residual is None else grad_u, grad_v, grad_weight, grad_bias, constants


def _fake_backward(
    grad_spikes: Any,
    grad_sum: Any,
    grad_last: Any,
    x: Tensor,
    residual: Any,
    v: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    decay: Any,
    gain: Any,
    starts: Any,
    numbers: Any,
    eps: Any,
    eps_outside: Any,
    frozen: Any,
    learn: bool,
) -> Any:
    x, layout = by_channels(x)
    C = layout["channels"]
    whole = like(x, x.dtype)
    grad_x = rows_like(1, whole[0], x.dtype) if _repeats(x) and residual is None else whole
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(whole)
    grad_v = _no_potentials(x) if v is None else rows_like(levels_of(numbers), whole[0], torch.float32)
    per_channel = x.new_empty(C, dtype=torch.float32)
    constants = x.new_empty(3 if learn else 0, dtype=torch.float64)
    return grad_x, grad_residual, grad_v, per_channel, torch.empty_like(per_channel), constants


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, add, v, weight, bias, mean, _, decay, gain, *ctx.settings, return_sum, return_v = inputs
    _, total, last, batch_mean, batch_variance, starts = output
    ctx.frozen, ctx.added = mean is not None, add is not None
    ctx.save_for_backward(x, residual, v, weight, bias, batch_mean, batch_variance, decay, gain, starts)
    ctx.set_materialize_grads(False)
    unwanted = [t for t, wanted in ((total, return_sum), (last, return_v)) if not wanted]
    ctx.mark_non_differentiable(batch_mean, batch_variance, *unwanted, *([] if starts is None else [starts]))


def _differentiate(
    ctx: Any, grad_spikes: Tensor | None, grad_sum: Tensor | None, grad_last: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, residual, v, weight, bias, mean, variance, decay, gain, starts = ctx.saved_tensors
    learn = ctx.needs_input_grad[8] or ctx.needs_input_grad[9]
    if grad_spikes is None:
        grad_spikes = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if ctx.added:
        # This gradient is handed on as it is. In another layout it would meet the convolutions' in every block before.
        grad_spikes = ordered(grad_spikes, like(by_channels(x)[0], x.dtype))
    grad_x, grad_residual, grad_v, grad_weight, grad_bias, sums = _norm_scan_backward(
        grad_spikes,
        grad_sum,
        grad_last,
        x,
        residual,
        v,
        weight,
        bias,
        mean,
        variance,
        decay,
        gain,
        starts,
        *ctx.settings,
        ctx.frozen,
        learn,
    )
    return (
        grad_x.expand(x.shape),
        None if residual is None else grad_residual,
        grad_spikes if ctx.added else None,
        None if v is None else grad_v,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        None,
        None,
        sums[0].to(decay.dtype) if ctx.needs_input_grad[8] else None,
        sums[1].to(gain.dtype) if ctx.needs_input_grad[9] else None,
        *(None,) * 5,
    )


_norm_scan = NativeOp("norm_scan", _forward, _fake, _save, _differentiate)
_norm_scan_backward = NativeOp("norm_scan_backward", _backward, _fake_backward)
