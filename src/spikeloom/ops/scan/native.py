"""`ops.scan` in native kernels: what autograd keeps is the input, and of long scans the potentials every 32 steps; the
backward pass computes the others again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import dense, fresh, like, ordered, pointer, rows_like, steps_of
from spikeloom.ops.scan.reference import Constant

Numbers = tuple[float, ...]
"""Thresholds, reset and surrogate of a scan, as a custom op can take them; here with the charge's decay and gain in
front, where those are fixed."""

CHUNK = 32
"""Most steps whose potentials the backward pass has at a time."""

NO_NORM = {"channels": 1, "inner": 1, "factor": 0, "shift": 0, "residual": 0}


def firing_numbers(
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    strict: bool,
    detach_reset: bool,
    formula: tuple[int, float, float],
) -> Numbers:
    """Packs what `firing` unpacks."""
    thresholds = v_threshold if isinstance(v_threshold, tuple) else (v_threshold,)
    return (math.nan if v_reset is None else v_reset, strict, detach_reset, *formula, *thresholds)


def levels_of(numbers: Sequence[float]) -> int:
    """How many thresholds stand behind the six other numbers."""
    return len(numbers) - 6


def _levels(numbers: Sequence[float]) -> int:
    """The same where fixed constants of the charge stand in front."""
    return levels_of(numbers) - 2


class Firing(NamedTuple):
    """The kernels' fields of thresholds, reset and surrogate, and the tensors that their addresses point to."""

    levels: int
    forward: dict[str, Any]
    backward: dict[str, Any]
    kept: tuple[Tensor, Tensor]


@lru_cache(maxsize=1024)
def firing(numbers: Numbers) -> Firing:
    """The fields of some packed numbers."""
    v_reset, strict, detach_reset, kind, p, q, *thresholds = numbers
    threshold = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
    fire_at = torch.nextafter(threshold, torch.full_like(threshold, math.inf)) if strict else threshold
    soft = math.isnan(v_reset)
    forward = {
        "v_rest": 0.0 if soft else v_reset,
        "hard": not soft,
        "levels": len(thresholds),
        "threshold": threshold.data_ptr(),
        "fire_at": fire_at.data_ptr(),
    }
    backward = {"surrogate": int(kind), "p": p, "q": q, "detach_reset": bool(detach_reset)}
    return Firing(len(thresholds), forward, backward, (threshold, fire_at))


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


_kept_scalar = lru_cache(maxsize=1024)(_scalar)


def as_tensor(value: Constant) -> Tensor:
    """A constant as the ops take it: a scalar tensor."""
    if isinstance(value, Tensor):
        return value
    # While something traces it may be a fake tensor, which the next call could not use.
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()  # pyright: ignore
    return (_scalar if traced else _kept_scalar)(float(value))


def starts_like(levels: int, spikes: Tensor) -> Tensor | None:
    """Room for the potentials with which all chunks but the first begin, [(chunks - 1) levels, N, ...]."""
    steps = spikes.shape[0]
    return rows_like((steps - 1) // CHUNK * levels, spikes[0], torch.float32) if steps > CHUNK else None


# What every call hands over, in this order.
_EITHER_WAY = ("x", "v", "decay", "gain", "scale", "starts")
_FORWARD = (*_EITHER_WAY, "spikes", "v_out", "potentials")
_BACKWARD = (*_EITHER_WAY, "grad_spikes", "grad_v_out", "slope", "grad_u", "grad_v", "grad_constants")


class Bound(NamedTuple):
    """A kernel that has read all its arguments but some, and what their addresses point to."""

    run: Callable[..., None]
    firing: Firing


@lru_cache(maxsize=1024)
def bound(
    backward: bool,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    rectified: bool,
    numbers: Numbers,
    threads: int,
) -> Bound | None:
    """The kernel for inputs of one layout; None where kernels do not take the layout."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if dense(x) is not x:
        return None
    a = firing(numbers[2:])
    fields = {**steps_of(x), "threads": threads, "chunk": min(shape[0], CHUNK), "rectified": rectified}
    fields.update(NO_NORM, **a.forward)
    del fields["x"]
    if backward:
        fields.update(a.backward, grad_sum=0, sum_steps=False, grad_norm=0)
        run = _dispatch.native.bound_scan_backward(fields, _BACKWARD)
    else:
        fields.update(sum=0, add=0)
        run = _dispatch.native.bound_scan_forward(fields, _FORWARD)
    return Bound(run, a)


def _prepare(
    backward: bool, x: Tensor, v: Tensor | None, scale: Tensor | None, numbers: Sequence[float]
) -> tuple[Tensor, Tensor | None, Bound]:
    settings = scale is not None, tuple(numbers), torch.get_num_threads()
    kernel = bound(backward, x.shape, x.stride(), x.dtype, *settings)
    if kernel is None:
        return _prepare(backward, dense(x), v, scale, numbers)
    v = None if v is None else ordered(v, rows_like(kernel.firing.levels, like(x, x.dtype)[0], v.dtype))
    return x, v, kernel


def charge(
    decay: Tensor | None, gain: Tensor | None, scale: Tensor | None, numbers: Sequence[float]
) -> tuple[float, float, float]:
    """The constants decay, gain and scale: of tensors, or the fixed ones in front of the other numbers."""
    return (
        numbers[0] if decay is None else decay.item(),
        numbers[1] if gain is None else gain.item(),
        1.0 if scale is None else scale.item(),
    )


def _forward(
    x: Tensor,
    v: Tensor | None,
    decay: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    slope: Tensor | None,
    numbers: list[float],
    return_v: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, v, kernel = _prepare(False, x, v, scale, numbers)
    levels = kernel.firing.levels
    spikes = fresh(x, x.dtype)
    last = rows_like(levels, spikes[0], torch.float32) if return_v else None
    starts = starts_like(levels, spikes)
    kernel.run(
        x.data_ptr(),
        pointer(v),
        *charge(decay, gain, scale, numbers),
        pointer(starts),
        spikes.data_ptr(),
        pointer(last),
        0,
    )
    return spikes, last, starts


def _fake(x: Tensor, v: Any, decay: Any, gain: Any, scale: Any, slope: Any, numbers: Any, return_v: bool) -> Any:
    spikes, levels = like(dense(x), x.dtype), _levels(numbers)
    last = rows_like(levels, spikes[0], torch.float32) if return_v else None
    return spikes, last, starts_like(levels, spikes)


def _potentials(
    x: Tensor, v: Tensor | None, decay: Tensor | None, gain: Tensor | None, scale: Tensor | None, numbers: list[float]
) -> Tensor:
    x, v, kernel = _prepare(False, x, v, scale, numbers)
    spikes = fresh(x, x.dtype)
    f = rows_like(kernel.firing.levels, spikes, torch.float32)
    kernel.run(x.data_ptr(), pointer(v), *charge(decay, gain, scale, numbers), 0, spikes.data_ptr(), 0, f.data_ptr())
    return f


def _fake_potentials(x: Tensor, v: Any, decay: Any, gain: Any, scale: Any, numbers: Any) -> Tensor:
    return rows_like(_levels(numbers), like(dense(x), x.dtype), torch.float32)


def _backward(
    grad_spikes: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    decay: Tensor | None,
    gain: Tensor | None,
    scale: Tensor | None,
    slope: Tensor | None,
    starts: Tensor | None,
    numbers: list[float],
    learn: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, v, kernel = _prepare(True, x, v, scale, numbers)
    levels = kernel.firing.levels
    grad_x = fresh(x, x.dtype)
    grad_spikes = ordered(grad_spikes, grad_x, x.dtype)
    grad_v = None
    if v is not None or grad_last is not None:
        states = rows_like(levels, grad_x[0], torch.float32)
        grad_last = None if grad_last is None else ordered(grad_last, states, torch.float32)
        grad_v = None if v is None else states
    slope = None if slope is None else ordered(slope, rows_like(levels, grad_x, torch.float32), torch.float32)
    constants = x.new_empty(3, dtype=torch.float64) if learn else None
    kernel.run(
        x.data_ptr(),
        pointer(v),
        *charge(decay, gain, scale, numbers),
        pointer(starts),
        grad_spikes.data_ptr(),
        pointer(grad_last),
        pointer(slope),
        grad_x.data_ptr(),
        pointer(grad_v),
        pointer(constants),
    )
    return grad_x, grad_v, constants


def _fake_backward(
    grad_spikes: Any,
    grad_last: Any,
    x: Tensor,
    v: Any,
    decay: Any,
    gain: Any,
    scale: Any,
    slope: Any,
    starts: Any,
    numbers: Any,
    learn: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_x = like(dense(x), x.dtype)
    grad_v = None if v is None else rows_like(_levels(numbers), grad_x[0], torch.float32)
    return grad_x, grad_v, x.new_empty(3, dtype=torch.float64) if learn else None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
    *tensors, ctx.numbers, return_v = inputs
    _, last, starts = output
    ctx.save_for_backward(*tensors, starts)
    ctx.set_materialize_grads(False)
    unwanted = [t for t in (None if return_v else last, starts) if t is not None]
    if unwanted:
        ctx.mark_non_differentiable(*unwanted)


def _differentiate(ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None, _: None) -> tuple[Any, ...]:
    x, v, decay, gain, scale, slope, starts = ctx.saved_tensors
    _, _, *needed, _, _, _ = ctx.needs_input_grad
    grad_spikes = torch.zeros_like(x) if grad_spikes is None else grad_spikes
    learn = True in needed
    grad_x, grad_v, sums = _scan_backward(
        grad_spikes, grad_last, x, v, decay, gain, scale, slope, starts, ctx.numbers, learn
    )
    grads = (None, None, None)
    if learn:
        grads = (
            sums[i].to(c.dtype) if n else None
            for i, (c, n) in enumerate(zip((decay, gain, scale), needed, strict=True))
        )
    return grad_x, None if v is None else grad_v, *grads, None, None, None


_scan = NativeOp("scan", _forward, _fake, _save, _differentiate)
_scan_potentials = NativeOp("scan_potentials", _potentials, _fake_potentials)
_scan_backward = NativeOp("scan_backward", _backward, _fake_backward)


def scan_native(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    scale: Constant | None,
    slope: Tensor | None,
    numbers: Numbers,
    return_v: bool,
) -> tuple[Tensor, Tensor | None]:
    """Spikes [T, N, ...] and, if wanted, the last potentials [levels, N, ...]."""
    spikes, last, _ = _scan(x, v, *_constants(decay, gain, scale), slope, (*_fixed(decay, gain), *numbers), return_v)
    return spikes, last if return_v else None


def scan_native_potentials(
    x: Tensor, v: Tensor | None, decay: Constant, gain: Constant, scale: Constant | None, numbers: Numbers
) -> Tensor:
    """The potentials [levels, T, N, ...] at which neurons decide to fire."""
    return _scan_potentials(x, v, *_constants(decay, gain, scale), (*_fixed(decay, gain), *numbers))


def _constants(
    decay: Constant, gain: Constant, scale: Constant | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The constants that are tensors; fixed ones of the charge, as numbers, cost a call less."""
    return (
        decay if isinstance(decay, Tensor) else None,
        gain if isinstance(gain, Tensor) else None,
        None if scale is None else as_tensor(scale),
    )


def _fixed(decay: Constant, gain: Constant) -> tuple[float, float]:
    return 0.0 if isinstance(decay, Tensor) else decay, 0.0 if isinstance(gain, Tensor) else gain
