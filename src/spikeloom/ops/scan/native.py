"""`ops.scan` in native kernels: what autograd keeps is the input, and of long scans the potentials every 32 steps; the
backward pass computes the others again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import like, ordered, pointer, rows_like, steps_of
from spikeloom.ops.scan.params import KernelFields, Packed, ScanParams
from spikeloom.ops.scan.reference import Constant

CHUNK = 32
"""Most steps whose potentials the backward pass has at a time."""

Constants = tuple[Tensor | None, Tensor | None, Tensor | None]

_NO_NORM = {"channels": 1, "inner": 1, "factor": 0, "shift": 0, "residual": 0}

# What every call of a kernel hands over, in this order.
_EITHER_WAY = ("x", "v", "decay", "gain", "scale", "starts")
_FORWARD = (*_EITHER_WAY, "spikes", "v_out", "potentials")
_BACKWARD = (*_EITHER_WAY, "grad_spikes", "grad_v_out", "slope", "grad_u", "grad_v", "grad_constants")


def scan_native(
    x: Tensor, v: Tensor | None, constants: Constants, slope: Tensor | None, numbers: Packed, return_v: bool
) -> tuple[Tensor, Tensor | None]:
    """Spikes [T, N, ...] and, if wanted, the last potentials [levels, N, ...].

    Args:
        x, v: as `ops.scan`.
        constants: decay, gain and scale where these are tensors.
        slope: the surrogate's derivative [levels, T, N, ...], for a surrogate that kernels do not know.
        numbers: of `ScanParams`, with decay and gain where these are numbers.
        return_v: whether the last potentials are wanted.
    """
    out = _scan(x, v, *constants, slope, numbers, return_v)
    return out.spikes, out.last if return_v else None


def scan_native_potentials(x: Tensor, v: Tensor | None, constants: Constants, numbers: Packed) -> Tensor:
    """The potentials [levels, T, N, ...] at which neurons decide to fire."""
    return _scan_potentials(x, v, *constants, numbers)


def parted(value: Constant) -> tuple[float, Tensor | None]:
    """A constant of the charge as a number for `ScanParams`, or as a tensor, which would cost a number a call more."""
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


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


def charge(
    decay: Tensor | None, gain: Tensor | None, scale: Tensor | None, params: ScanParams
) -> tuple[float, float, float]:
    """The constants decay, gain and scale of a scan, as numbers."""
    return (
        params.decay if decay is None else decay.item(),
        params.gain if gain is None else gain.item(),
        1.0 if scale is None else scale.item(),
    )


def starts_like(levels: int, spikes: Tensor) -> Tensor | None:
    """Room for the potentials with which all chunks but the first begin, [(chunks - 1) levels, N, ...]."""
    steps = spikes.shape[0]
    return rows_like((steps - 1) // CHUNK * levels, spikes[0], torch.float32) if steps > CHUNK else None


class _Kernel(NamedTuple):
    """A kernel that has read all its arguments but some, and what their addresses point to."""

    run: Callable[..., None]
    params: ScanParams
    fields: KernelFields


@lru_cache(maxsize=1024)
def bound_kernel(
    backward: bool,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    rectified: bool,
    numbers: Packed,
    threads: int,
) -> _Kernel:
    """The kernel for inputs of one layout."""
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    params = ScanParams.unpack(numbers)
    found = params.kernel_fields()
    fields = {**steps_of(x), "threads": threads, "chunk": min(shape[0], CHUNK), "rectified": rectified}
    fields.update(_NO_NORM, **found.forward)
    del fields["x"]
    if backward:
        fields.update(found.backward, grad_sum=0, sum_steps=False, grad_norm=0)
        run = _dispatch.native.bound_scan_backward(fields, _BACKWARD)
    else:
        fields.update(sum=0, add=0)
        run = _dispatch.native.bound_scan_forward(fields, _FORWARD)
    return _Kernel(run, params, found)


def _bound(backward: bool, x: Tensor, scale: Tensor | None, numbers: Sequence[float]) -> _Kernel:
    return bound_kernel(
        backward, x.shape, x.stride(), x.dtype, scale is not None, tuple(numbers), torch.get_num_threads()
    )


# --- forward ----------------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    x: Tensor
    v: Tensor | None
    decay: Tensor | None
    gain: Tensor | None
    scale: Tensor | None
    slope: Tensor | None
    numbers: list[float]
    return_v: bool


class _Scanned(NamedTuple):
    spikes: Tensor
    last: Tensor | None
    starts: Tensor | None


def _allocate(i: _Inputs) -> _Scanned:
    spikes, levels = like(i.x, i.x.dtype), ScanParams.levels_of(i.numbers)
    last = rows_like(levels, spikes[0], torch.float32) if i.return_v else None
    return _Scanned(spikes, last, starts_like(levels, spikes))


def _fill(i: _Inputs, out: _Scanned) -> None:
    x = ordered(i.x, out.spikes, repeated=True)
    kernel = _bound(False, x, i.scale, i.numbers)
    v = None if i.v is None else ordered(i.v, rows_like(kernel.params.levels, out.spikes[0], i.v.dtype))
    constants = charge(i.decay, i.gain, i.scale, kernel.params)
    starts, last = pointer(out.starts), pointer(out.last)
    kernel.run(x.data_ptr(), pointer(v), *constants, starts, out.spikes.data_ptr(), last, 0)


class _PotentialInputs(NamedTuple):
    x: Tensor
    v: Tensor | None
    decay: Tensor | None
    gain: Tensor | None
    scale: Tensor | None
    numbers: list[float]


def _allocate_potentials(i: _PotentialInputs) -> Tensor:
    return rows_like(ScanParams.levels_of(i.numbers), like(i.x, i.x.dtype), torch.float32)


def _fill_potentials(i: _PotentialInputs, out: Tensor) -> None:
    spikes = like(i.x, i.x.dtype)
    x = ordered(i.x, spikes, repeated=True)
    kernel = _bound(False, x, i.scale, i.numbers)
    v = None if i.v is None else ordered(i.v, rows_like(kernel.params.levels, spikes[0], i.v.dtype))
    constants = charge(i.decay, i.gain, i.scale, kernel.params)
    kernel.run(x.data_ptr(), pointer(v), *constants, 0, spikes.data_ptr(), 0, out.data_ptr())


# --- backward ---------------------------------------------------------------------------------------------------------


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    grad_last: Tensor | None
    x: Tensor
    v: Tensor | None
    decay: Tensor | None
    gain: Tensor | None
    scale: Tensor | None
    slope: Tensor | None
    starts: Tensor | None
    numbers: list[float]
    learn: bool


class _Gradients(NamedTuple):
    """Of x, v and the three constants; the last is float64 [3]."""

    x: Tensor
    v: Tensor | None
    constants: Tensor | None


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    grad_x = like(i.x, i.x.dtype)
    grad_v = None if i.v is None else rows_like(ScanParams.levels_of(i.numbers), grad_x[0], torch.float32)
    return _Gradients(grad_x, grad_v, i.x.new_empty(3, dtype=torch.float64) if i.learn else None)


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    x = ordered(i.x, out.x, repeated=True)
    kernel = _bound(True, x, i.scale, i.numbers)
    grad_spikes = ordered(i.grad_spikes, out.x, x.dtype)
    v, grad_last, slope, levels = i.v, i.grad_last, i.slope, kernel.params.levels
    if v is not None or grad_last is not None:
        states = rows_like(levels, out.x[0], torch.float32) if out.v is None else out.v
        v = None if v is None else ordered(v, states)
        grad_last = None if grad_last is None else ordered(grad_last, states, torch.float32)
    slope = None if slope is None else ordered(slope, rows_like(levels, out.x, torch.float32), torch.float32)
    kernel.run(
        x.data_ptr(),
        pointer(v),
        *charge(i.decay, i.gain, i.scale, kernel.params),
        pointer(i.starts),
        grad_spikes.data_ptr(),
        pointer(grad_last),
        pointer(slope),
        out.x.data_ptr(),
        pointer(out.v),
        pointer(out.constants),
    )


def _save(ctx: Any, i: _Inputs, out: _Scanned) -> None:
    ctx.numbers = i.numbers
    ctx.save_for_backward(i.x, i.v, i.decay, i.gain, i.scale, i.slope, out.starts)
    ctx.set_materialize_grads(False)
    unwanted = [t for t in (None if i.return_v else out.last, out.starts) if t is not None]
    if unwanted:
        ctx.mark_non_differentiable(*unwanted)


def _differentiate(ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None, _: None) -> tuple[Any, ...]:
    x, v, decay, gain, scale, slope, starts = ctx.saved_tensors
    _, _, *needed, _, _, _ = ctx.needs_input_grad
    grad_spikes = torch.zeros_like(x) if grad_spikes is None else grad_spikes
    learn = True in needed
    found = _scan_backward(grad_spikes, grad_last, x, v, decay, gain, scale, slope, starts, ctx.numbers, learn)
    grads = (None, None, None)
    if learn:
        grads = (found.constants[i] if wanted else None for i, wanted in enumerate(needed))
    return found.x, None if v is None else found.v, *grads, None, None, None


_scan = native_op("scan", _Inputs, _allocate, _fill, _save, _differentiate)
_scan_potentials = native_op("scan_potentials", _PotentialInputs, _allocate_potentials, _fill_potentials)
_scan_backward = native_op("scan_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
