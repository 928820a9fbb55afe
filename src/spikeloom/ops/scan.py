"""Neurons that step through time: linear charge, threshold, reset.

    H[t] = V_rest + decay (V[t-1] - V_rest) + gain X[t]
    S[t] = Theta(H[t] - V_threshold)
    V[t] = H[t] (1 - S[t]) + V_reset S[t]        hard reset, V_rest = V_reset
    V[t] = H[t] - V_threshold S[t]               soft reset (V_reset is None), V_rest = 0

`scan` chooses between the reference, which is the definition, the native CPU kernel and the compiled path.
Potentials are float32 whatever the input's precision, float64 where the input is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import dispatch
from spikeloom.surrogates import Surrogate

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_CHUNK = 8  # steps that the compiled path unrolls at a time
_HUGE = 16 << 20  # bytes above which a new tensor asks for large pages
_SLOPE = 5  # the kernels' name for a derivative handed over as a tensor


def scan(
    x: Tensor,
    v: Tensor | None,
    decay: float | Tensor,
    gain: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    return_v: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Runs one layer of neurons over a sequence (equations at the top of this file).

    Args:
        x: currents [T, N, ...].
        v: potentials [N, ...] before the first step, None for rest.
        decay, gain: constants of the charge; scalars of any kind, or 0-dimensional tensors that may need gradients.
        v_threshold, v_reset: potentials; v_reset None selects the soft reset.
        surrogate: its derivative replaces that of Theta.
        detach_reset: treat S[t] inside the reset as a constant in the backward pass.
        return_v: whether the caller wants the last potentials.

    Returns:
        Spikes [T, N, ...] of x's dtype, and the potentials [N, ...] after the last step, or None.
    """
    chosen = dispatch.choose("scan", x, NATIVE_DTYPES)
    if chosen == "reference":
        return scan_reference(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset)
    if chosen == "compiled":
        return _scan_compiled(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset)
    decay = decay if isinstance(decay, Tensor) else torch.tensor(decay, dtype=torch.float64)
    gain = gain if isinstance(gain, Tensor) else torch.tensor(gain, dtype=torch.float64)
    if v is not None:
        v = v.to(torch.float32)
    slope = None
    formula = surrogate.formula
    if formula is None and torch.is_grad_enabled():
        h = _scan_potentials(x.detach(), v, decay, gain, v_threshold, v_reset)
        slope = surrogate.derivative(h - v_threshold)
    kind, p, q = formula or (_SLOPE, 0.0, 0.0)
    spikes, last = _scan(x, v, decay, gain, slope, v_threshold, v_reset, kind, p, q, detach_reset, return_v)
    return spikes, last if return_v else None


def potentials(
    x: Tensor, v: Tensor | None, decay: float | Tensor, gain: float | Tensor, v_threshold: float, v_reset: float | None
) -> Tensor:
    """The potentials H [T, N, ...] at which `scan` decides to fire, without gradients."""
    with torch.no_grad():
        trace: list[Tensor] = []

        def watch(u: Tensor) -> Tensor:
            trace.append(u + v_threshold)
            return (u >= 0).to(u.dtype)

        _steps(x, v, decay, gain, v_threshold, v_reset, watch, detach_reset=True)
        return torch.stack(trace)


# --- the reference ----------------------------------------------------------------------------------------------------


def scan_reference(
    x: Tensor,
    v: Tensor | None,
    decay: float | Tensor,
    gain: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
) -> tuple[Tensor, Tensor]:
    """`scan` in plain PyTorch: the definition, differentiated by autograd."""
    spikes, v = _steps(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset)
    return torch.stack(spikes).to(x.dtype), v


def _steps(
    x: Tensor,
    v: Tensor | None,
    decay: float | Tensor,
    gain: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    fire: Callable[[Tensor], Tensor],
    detach_reset: bool,
) -> tuple[list[Tensor], Tensor]:
    rest = 0.0 if v_reset is None else v_reset
    x = x.to(_state_dtype(x))
    if v is None:
        v = torch.full_like(x[0], rest)
    spikes: list[Tensor] = []
    for x_t in x:
        h = decay * (v - rest) + gain * x_t + rest
        s = fire(h - v_threshold)
        spikes.append(s)
        fired = s.detach() if detach_reset else s
        v = h - v_threshold * fired if v_reset is None else h * (1 - fired) + v_reset * fired
    return spikes, v


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- the native path --------------------------------------------------------------------------------------------------
# Kernels see each step as one dense block of numbers, in whatever order the convolutions left them (channels first
# or last), and the steps of x at a stride that may be 0: an image repeated over time is read from cache.


def _is_dense(step: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(step.stride(), step.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _dense(x: Tensor) -> Tensor:
    """x in a layout the kernels take: x itself if it can be, else a copy."""
    size = x[0].numel()
    if _is_dense(x[0]) and (x.shape[0] == 1 or x.stride(0) in (size, 0)):
        return x
    return x.contiguous()


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape: one dense block a step, in the order of x's steps."""
    return torch.empty_strided(x.shape, (x[0].numel(), *x.stride()[1:]), dtype=dtype, device=x.device)


def _fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`_like`, in large pages where it is large."""
    y = _like(x, dtype)
    if y.nbytes >= _HUGE:
        dispatch.native.advise_huge(y.data_ptr(), y.nbytes)
    return y


def _ordered(y: Tensor, like: Tensor) -> Tensor:
    """y with the strides of `like` (of one step's, where y has no time): y itself if it has them, else a copy."""
    strides = like.stride()
    if all(a == b or size == 1 for a, b, size in zip(y.stride(), strides, y.shape, strict=True)):
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def _arguments(
    x: Tensor, v: Tensor | None, decay: Tensor, gain: Tensor, v_threshold: float, v_reset: float | None
) -> tuple[Any, ...]:
    size = x[0].numel()
    return (
        NATIVE_DTYPES.index(x.dtype), x.shape[0], size, x.data_ptr(), x.stride(0) if x.shape[0] > 1 else size,
        0 if v is None else v.data_ptr(), decay.item(), gain.item(), v_threshold,
        0.0 if v_reset is None else v_reset, v_reset is not None, torch.get_num_threads(),
    )  # fmt: skip


@torch.library.custom_op("spikeloom::scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor,
    v: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    slope: Tensor | None,
    v_threshold: float,
    v_reset: float | None,
    kind: int,
    p: float,
    q: float,
    detach_reset: bool,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    x = _dense(x)
    spikes = _fresh(x, x.dtype)
    v = None if v is None else _ordered(v, spikes[0])
    last = torch.empty_like(spikes[0], dtype=torch.float32) if return_v else x.new_empty(0, dtype=torch.float32)
    dispatch.native.scan_forward(
        *_arguments(x, v, decay, gain, v_threshold, v_reset), spikes.data_ptr(), last.data_ptr() if return_v else 0, 0
    )
    return spikes, last


@_scan.register_fake
def _(x: Tensor, v: Any, decay: Any, gain: Any, slope: Any, *constants: Any) -> tuple[Tensor, Tensor]:
    spikes = _like(_dense(x), x.dtype)
    return_v = constants[-1]
    return spikes, torch.empty_like(spikes[0], dtype=torch.float32) if return_v else x.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("spikeloom::scan_potentials", mutates_args=(), device_types="cpu")
def _scan_potentials(
    x: Tensor, v: Tensor | None, decay: Tensor, gain: Tensor, v_threshold: float, v_reset: float | None
) -> Tensor:
    x = _dense(x)
    spikes, h = _fresh(x, x.dtype), _fresh(x, torch.float32)
    v = None if v is None else _ordered(v, spikes[0])
    dispatch.native.scan_forward(
        *_arguments(x, v, decay, gain, v_threshold, v_reset), spikes.data_ptr(), 0, h.data_ptr()
    )
    return h


@_scan_potentials.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return _like(_dense(x), torch.float32)


@torch.library.custom_op("spikeloom::scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    grad_spikes: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    slope: Tensor | None,
    v_threshold: float,
    v_reset: float | None,
    kind: int,
    p: float,
    q: float,
    detach_reset: bool,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    grad_x = _fresh(x, x.dtype)
    step = grad_x[0]
    v = None if v is None else _ordered(v, step)
    grad_spikes = _ordered(grad_spikes.to(x.dtype), grad_x)
    grad_last = None if grad_last is None else _ordered(grad_last.to(torch.float32), step)
    slope = None if slope is None else _ordered(slope.to(torch.float32), grad_x)
    grad_v = torch.empty_like(step, dtype=torch.float32) if v is not None else x.new_empty(0, dtype=torch.float32)
    constants = torch.zeros(2, dtype=torch.float64)
    dispatch.native.scan_backward(
        *_arguments(x, v, decay, gain, v_threshold, v_reset), grad_spikes.data_ptr(),
        0 if grad_last is None else grad_last.data_ptr(), 0 if slope is None else slope.data_ptr(),
        kind, p, q, detach_reset, grad_x.data_ptr(), 0 if v is None else grad_v.data_ptr(),
        constants.data_ptr() if learn else 0,
    )  # fmt: skip
    return grad_x, grad_v, constants


@_scan_backward.register_fake
def _(grad_spikes: Any, grad_last: Any, x: Tensor, v: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = _like(_dense(x), x.dtype)
    grad_v = torch.empty_like(grad_x[0], dtype=torch.float32) if v is not None else x.new_empty(0, dtype=torch.float32)
    return grad_x, grad_v, x.new_empty(2, dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, decay, gain, slope, *ctx.constants, return_v = inputs
    ctx.return_v = return_v
    ctx.save_for_backward(x, v, decay, gain, slope)
    if not return_v:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_spikes: Tensor, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, v, decay, gain, slope = ctx.saved_tensors
    learn = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grad_x, grad_v, constants = _scan_backward(
        grad_spikes, grad_last if ctx.return_v else None, x, v, decay, gain, slope, *ctx.constants, learn
    )
    return (
        grad_x, grad_v if v is not None else None,
        constants[0].to(decay.dtype) if ctx.needs_input_grad[2] else None,
        constants[1].to(gain.dtype) if ctx.needs_input_grad[3] else None,
        *(None,) * 8,
    )  # fmt: skip


_scan.register_autograd(_differentiate, setup_context=_save)


# --- the compiled path ------------------------------------------------------------------------------------------------
# What accelerators run in eager mode: the steps of a chunk unrolled under torch.compile, forward and backward.


@lru_cache(maxsize=64)
def _compiled_chunks(
    v_threshold: float, v_reset: float | None, surrogate: Surrogate, detach_reset: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    rest = 0.0 if v_reset is None else v_reset

    def forward(x: Tensor, v: Tensor, decay: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        fire: Callable[[Tensor], Tensor] = lambda u: (u >= 0).to(u.dtype)  # noqa: E731
        spikes, v = _steps(x, v, decay, gain, v_threshold, v_reset, fire, True)
        return torch.stack(spikes).to(x.dtype), v

    def backward(
        grad_spikes: Tensor, grad_v: Tensor, x: Tensor, v: Tensor, decay: Tensor, gain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = _state_dtype(x)
        starts, hs = [v], []
        for x_t in x.to(dtype):
            h = decay * (starts[-1] - rest) + gain * x_t + rest
            hs.append(h)
            s = (h >= v_threshold).to(dtype)
            starts.append(h - v_threshold * s if v_reset is None else h * (1 - s) + v_reset * s)
        grads: list[Tensor] = []
        grad_decay, grad_gain = torch.zeros_like(v), torch.zeros_like(v)
        for t in reversed(range(len(hs))):
            h = hs[t]
            slope = surrogate.derivative(h - v_threshold)
            keep = torch.ones_like(h) if v_reset is None else (h < v_threshold).to(dtype)
            if not detach_reset:
                keep = keep + slope * (-v_threshold if v_reset is None else v_reset - h)
            grad_h = grad_spikes[t].to(dtype) * slope + grad_v * keep
            grad_decay = grad_decay + grad_h * (starts[t] - rest)
            grad_gain = grad_gain + grad_h * x[t].to(dtype)
            grads.append((gain * grad_h).to(x.dtype))
            grad_v = decay * grad_h
        return torch.stack(grads[::-1]), grad_v, grad_decay.sum(), grad_gain.sum()

    return torch.compile(forward, dynamic=True), torch.compile(backward, dynamic=True)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, decay: Tensor, gain: Tensor, functions: tuple[Callable[..., Any], ...]
    ) -> tuple[Tensor, Tensor]:
        spikes, starts = [], []
        for chunk in x.split(_CHUNK):
            starts.append(v)
            s, v = functions[0](chunk, v, decay, gain)
            spikes.append(s)
        ctx.save_for_backward(x, decay, gain, *starts)
        ctx.backward_chunk = functions[1]
        return torch.cat(spikes), v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_spikes, grad_v = grads
        x, decay, gain, *starts = ctx.saved_tensors
        grad_x: list[Tensor] = []
        grad_decay, grad_gain = torch.zeros_like(decay), torch.zeros_like(gain)
        for g, chunk, v in zip(
            reversed(grad_spikes.split(_CHUNK)), reversed(x.split(_CHUNK)), reversed(starts), strict=True
        ):
            grad_chunk, grad_v, from_decay, from_gain = ctx.backward_chunk(g, grad_v, chunk, v, decay, gain)
            grad_x.append(grad_chunk)
            grad_decay, grad_gain = grad_decay + from_decay, grad_gain + from_gain
        return torch.cat(grad_x[::-1]), grad_v, grad_decay, grad_gain, None


def _scan_compiled(
    x: Tensor,
    v: Tensor | None,
    decay: float | Tensor,
    gain: float | Tensor,
    v_threshold: float,
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(x)
    shape = x.shape
    if v is None:
        v = torch.full_like(x[0], 0.0 if v_reset is None else v_reset, dtype=dtype)
    functions = _compiled_chunks(v_threshold, v_reset, surrogate, detach_reset)
    spikes, last = _Compiled.apply(
        x.flatten(1), v.to(dtype).flatten(), torch.as_tensor(decay, dtype=dtype, device=x.device),
        torch.as_tensor(gain, dtype=dtype, device=x.device), functions,
    )  # fmt: skip
    return spikes.view(shape), last.view(shape[1:])
