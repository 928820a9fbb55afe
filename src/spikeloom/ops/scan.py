"""Neurons that step through time: linear charge, threshold, reset.

    H[t] = V_rest + decay (V[t-1] - V_rest) + gain X[t]
    F[t] = H[t], or with a `scale` relu(scale H[t])
    S[t] = Theta(F[t] - V_threshold)
    V[t] = F[t] (1 - S[t]) + V_reset S[t]        hard reset, V_rest = V_reset
    V[t] = F[t] - V_threshold S[t]               soft reset (V_reset is None), V_rest = 0

Several thresholds make as many copies of this recurrence on the same input, whose spikes are added.

`scan` chooses between the reference, which is the definition, the native CPU kernel and the compiled path.
Potentials are float32 whatever the input's precision, float64 where the input is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import dispatch
from spikeloom.ops.layout import NATIVE_DTYPES, dense, fresh, like, ordered, pointer, rows_like, steps_of
from spikeloom.surrogates import SLOPE, Surrogate

Constant = float | Tensor
_compiled_count = itertools.count()
_CHUNK = 8  # steps that the compiled path unrolls at a time


def scan(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    return_v: bool = True,
    scale: Constant | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs one layer of neurons over a sequence (equations at the top of this file).

    Args:
        x: currents [T, N, ...].
        v: potentials [N, ...] before the first step, [levels, N, ...] with several thresholds; None for rest.
        decay, gain: constants of the charge; scalars of any kind, or 0-dimensional tensors that may need gradients.
        v_threshold, v_reset: potentials; v_reset None selects the soft reset.
        surrogate: its derivative replaces that of Theta.
        detach_reset: treat S[t] inside the reset as a constant in the backward pass.
        return_v: whether the caller wants the last potentials.
        scale: of the rectified charge, as decay; None for none.
        strict: fire on `>` instead of `>=`.

    Returns:
        Spikes [T, N, ...] of x's dtype, their sum over the levels, and the potentials after the last step, or None.
    """
    chosen = dispatch.choose("scan", x, NATIVE_DTYPES, compiled=True)
    if chosen == "reference":
        return scan_reference(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset, scale, strict)
    if chosen == "compiled":
        return _scan_compiled(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset, scale, strict)
    one = not isinstance(v_threshold, tuple)
    thresholds = [v_threshold] if one else list(v_threshold)
    if v is not None:
        v = (v.unsqueeze(0) if one else v).to(torch.float32)
    constants = (_scalar(decay), _scalar(gain), None if scale is None else _scalar(scale))
    slope = None
    formula = surrogate.formula
    if formula is None and torch.is_grad_enabled():
        with torch.no_grad():
            f = _scan_potentials(x, v, *constants, thresholds, v_reset, strict)
        slope = surrogate.derivative(f - _per_level(thresholds, f))
    kind, p, q = formula or (SLOPE, 0.0, 0.0)
    spikes, last = _scan(
        x, v, *constants, slope, thresholds, v_reset, strict, kind, p, q, detach_reset, return_v
    )  # fmt: skip
    if not return_v:
        return spikes, None
    return spikes, last.squeeze(0) if one else last


def fire(u: Tensor, surrogate: Surrogate, strict: bool = False, threshold: float = 0.0) -> Tensor:
    """`Theta(u - threshold)` with a surrogate's gradient, for any u [T, N, ...], one pass each way: a scan without
    memory."""
    return scan(u, None, 0.0, 1.0, threshold, None, surrogate, True, return_v=False, strict=strict)[0]


def potentials(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    scale: Constant | None = None,
    strict: bool = False,
) -> Tensor:
    """The potentials F [T, N, ...] at which `scan` decides to fire, [T, levels, N, ...] for several thresholds,
    without gradients."""
    with torch.no_grad():
        trace: list[Tensor] = []

        def watch(f: Tensor, u: Tensor) -> Tensor:
            trace.append(f)
            return _theta(u, strict)

        _steps(x, v, decay, gain, v_threshold, v_reset, watch, True, scale)
        return torch.stack(trace)


# --- the reference ----------------------------------------------------------------------------------------------------


def scan_reference(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    scale: Constant | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """`scan` in plain PyTorch: the definition, differentiated by autograd."""
    spikes, v = _steps(
        x, v, decay, gain, v_threshold, v_reset, lambda _, u: surrogate(u, strict), detach_reset, scale
    )  # fmt: skip
    return torch.stack(spikes).to(x.dtype), v


def _steps(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    fire: Callable[[Tensor, Tensor], Tensor],
    detach_reset: bool,
    scale: Constant | None,
) -> tuple[list[Tensor], Tensor]:
    rest = 0.0 if v_reset is None else v_reset
    x = x.to(_state_dtype(x))
    levels = isinstance(v_threshold, tuple)
    threshold = _per_level(v_threshold, x) if isinstance(v_threshold, tuple) else v_threshold
    if v is None:
        v = torch.full_like(x[0], rest)
        v = torch.stack([v] * len(v_threshold)) if isinstance(v_threshold, tuple) else v
    spikes: list[Tensor] = []
    for x_t in x:
        h = decay * (v - rest) + gain * x_t + rest
        f = h if scale is None else torch.relu(scale * h)
        s = fire(f, f - threshold)
        spikes.append(s.sum(0) if levels else s)
        fired = s.detach() if detach_reset else s
        v = f - threshold * fired if v_reset is None else f * (1 - fired) + v_reset * fired
    return spikes, v


def _theta(u: Tensor, strict: bool) -> Tensor:
    return (u > 0 if strict else u >= 0).to(u.dtype)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_level(thresholds: Sequence[float], x: Tensor) -> Tensor:
    """Thresholds [levels, 1, ...], to meet x [T, N, ...] step by step or potentials [levels, T, N, ...]."""
    return torch.tensor(thresholds, dtype=_state_dtype(x), device=x.device).view(-1, *(1,) * (x.dim() - 1))


# --- the native path --------------------------------------------------------------------------------------------------


def _scalar(value: Constant) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


class _Arguments:
    """The fields that `scan`'s kernels share; holds what their addresses point to."""

    def __init__(
        self,
        x: Tensor,
        v: Tensor | None,
        decay: Tensor,
        gain: Tensor,
        scale: Tensor | None,
        thresholds: Sequence[float],
        v_reset: float | None,
        strict: bool,
    ):
        self.x = dense(x)
        self.v = None if v is None else ordered(v, rows_like(len(thresholds), like(self.x, x.dtype)[0], v.dtype))
        self.threshold = torch.tensor(list(thresholds), dtype=torch.float32)
        above = torch.nextafter(self.threshold, torch.tensor(float("inf")))
        self.fire_at = above if strict else self.threshold
        self.fields: dict[str, Any] = {
            **steps_of(self.x),
            "v": pointer(self.v),
            "decay": decay.item(),
            "gain": gain.item(),
            "scale": 1.0 if scale is None else scale.item(),
            "rectified": scale is not None,
            "v_rest": 0.0 if v_reset is None else v_reset,
            "hard": v_reset is not None,
            "levels": len(thresholds),
            "threshold": self.threshold.data_ptr(),
            "fire_at": self.fire_at.data_ptr(),
        }


@torch.library.custom_op("spikeloom::scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor,
    v: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    scale: Tensor | None,
    slope: Tensor | None,
    thresholds: Sequence[float],
    v_reset: float | None,
    strict: bool,
    kind: int,
    p: float,
    q: float,
    detach_reset: bool,
    return_v: bool,
) -> tuple[Tensor, Tensor]:
    a = _Arguments(x, v, decay, gain, scale, thresholds, v_reset, strict)
    spikes = fresh(a.x, x.dtype)
    last = _last(spikes, thresholds, return_v)
    dispatch.native.scan_forward(
        **a.fields, spikes=spikes.data_ptr(), v_out=last.data_ptr() if return_v else 0, potentials=0
    )
    return spikes, last


def _last(spikes: Tensor, thresholds: Sequence[float], wanted: bool) -> Tensor:
    if wanted:
        return rows_like(len(thresholds), spikes[0], torch.float32)
    return spikes.new_empty(0, dtype=torch.float32)


@_scan.register_fake
def _(x: Tensor, v: Any, decay: Any, gain: Any, scale: Any, slope: Any, thresholds: Any, *rest: Any) -> Any:
    spikes = like(dense(x), x.dtype)
    return spikes, _last(spikes, thresholds, rest[-1])


@torch.library.custom_op("spikeloom::scan_potentials", mutates_args=(), device_types="cpu")
def _scan_potentials(
    x: Tensor,
    v: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    scale: Tensor | None,
    thresholds: Sequence[float],
    v_reset: float | None,
    strict: bool,
) -> Tensor:
    a = _Arguments(x, v, decay, gain, scale, thresholds, v_reset, strict)
    spikes = fresh(a.x, x.dtype)
    f = rows_like(len(thresholds), spikes, torch.float32)
    dispatch.native.scan_forward(**a.fields, spikes=spikes.data_ptr(), v_out=0, potentials=f.data_ptr())
    return f


@_scan_potentials.register_fake
def _(x: Tensor, v: Any, decay: Any, gain: Any, scale: Any, thresholds: Any, *_: Any) -> Tensor:
    return rows_like(len(thresholds), like(dense(x), x.dtype), torch.float32)


@torch.library.custom_op("spikeloom::scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    grad_spikes: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    decay: Tensor,
    gain: Tensor,
    scale: Tensor | None,
    slope: Tensor | None,
    thresholds: Sequence[float],
    v_reset: float | None,
    strict: bool,
    kind: int,
    p: float,
    q: float,
    detach_reset: bool,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a = _Arguments(x, v, decay, gain, scale, thresholds, v_reset, strict)
    grad_x = fresh(a.x, x.dtype)
    states = rows_like(len(thresholds), grad_x[0], torch.float32)
    grad_spikes = ordered(grad_spikes.to(x.dtype), grad_x)
    grad_last = None if grad_last is None else ordered(grad_last.to(torch.float32), states)
    slope = (
        None if slope is None else ordered(slope.to(torch.float32), rows_like(len(thresholds), grad_x, torch.float32))
    )
    grad_v = states if v is not None else x.new_empty(0, dtype=torch.float32)
    constants = torch.zeros(3, dtype=torch.float64)
    dispatch.native.scan_backward(
        **a.fields, grad_spikes=grad_spikes.data_ptr(), grad_v_out=pointer(grad_last), slope=pointer(slope),
        surrogate=kind, p=p, q=q, detach_reset=detach_reset, grad_x=grad_x.data_ptr(),
        grad_v=0 if v is None else grad_v.data_ptr(), grad_constants=constants.data_ptr() if learn else 0,
    )  # fmt: skip
    return grad_x, grad_v, constants


@_scan_backward.register_fake
def _(grad_spikes: Any, grad_last: Any, x: Tensor, v: Any, decay: Any, gain: Any, scale: Any, slope: Any,
      thresholds: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = like(dense(x), x.dtype)
    return grad_x, _last(grad_x, thresholds, v is not None), x.new_empty(3, dtype=torch.float64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, v, decay, gain, scale, slope, *ctx.constants, return_v = inputs
    ctx.return_v = return_v
    ctx.save_for_backward(x, v, decay, gain, scale, slope)
    if not return_v:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_spikes: Tensor, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, v, *constants, slope = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:5]
    grad_x, grad_v, grads = _scan_backward(
        grad_spikes, grad_last if ctx.return_v else None, x, v, *constants, slope, *ctx.constants, any(needed)
    )
    return (
        grad_x,
        grad_v if v is not None else None,
        *(grads[i].to(c.dtype) if n else None for i, (c, n) in enumerate(zip(constants, needed, strict=True))),
        *(None,) * 9,
    )


_scan.register_autograd(_differentiate, setup_context=_save)


# --- the compiled path ------------------------------------------------------------------------------------------------
# What accelerators run in eager mode: the steps of a chunk unrolled under torch.compile, forward and backward.


@lru_cache(maxsize=256)
def _compiled_chunks(
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    rectified: bool,
    strict: bool,
    steps: int,
    dtype: torch.dtype,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    rest = 0.0 if v_reset is None else v_reset

    def forward(x: Tensor, v: Tensor, decay: Tensor, gain: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        spikes, v = _steps(
            x, v, decay, gain, v_threshold, v_reset, lambda _, u: _theta(u, strict), True, scale if rectified else None
        )
        return torch.stack(spikes).to(x.dtype), v

    def backward(
        grad_spikes: Tensor, grad_v: Tensor, x: Tensor, v: Tensor, decay: Tensor, gain: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        state = _state_dtype(x)
        threshold = _per_level(v_threshold, x) if isinstance(v_threshold, tuple) else v_threshold
        starts, hs, fs, fired = [v], [], [], []
        for x_t in x.to(state):
            hs.append(decay * (starts[-1] - rest) + gain * x_t + rest)
            fs.append(torch.relu(scale * hs[-1]) if rectified else hs[-1])
            fired.append(_theta(fs[-1] - threshold, strict))
            f, s = fs[-1], fired[-1]
            starts.append(f - threshold * s if v_reset is None else f * (1 - s) + v_reset * s)
        grads: list[Tensor] = []
        sums = [torch.zeros_like(v) for _ in range(3)]
        for t in reversed(range(len(hs))):
            f = fs[t]
            slope = surrogate.derivative(f - threshold)
            keep = torch.ones_like(f) if v_reset is None else 1 - fired[t]
            if not detach_reset:
                keep = keep + slope * (-threshold if v_reset is None else v_reset - f)
            grad = grad_spikes[t].to(state) * slope + grad_v * keep
            if rectified:
                grad = grad * (f > 0)
                sums[2] = sums[2] + grad * hs[t]
                grad = grad * scale
            sums[0] = sums[0] + grad * (starts[t] - rest)
            sums[1] = sums[1] + grad * x[t].to(state)
            grad_x = gain * grad
            grads.append((grad_x.sum(0) if isinstance(v_threshold, tuple) else grad_x).to(x.dtype))
            grad_v = decay * grad
        return torch.stack(grads[::-1]), grad_v, *(s.sum() for s in sums)

    # Dynamo gives up on a code object that it has compiled 8 times: every kind of chunk gets one of its own.
    for function in (forward, backward):
        function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{next(_compiled_count)}")
    return torch.compile(forward, dynamic=True), torch.compile(backward, dynamic=True)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Tensor, decay: Tensor, gain: Tensor, scale: Tensor, functions: Callable[[int], Any]
    ) -> tuple[Tensor, Tensor]:
        spikes, starts = [], []
        for chunk in x.split(_CHUNK):
            starts.append(v)
            s, v = functions(len(chunk))[0](chunk, v, decay, gain, scale)
            spikes.append(s)
        ctx.save_for_backward(x, decay, gain, scale, *starts)
        ctx.functions = functions
        return torch.cat(spikes), v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        grad_spikes, grad_v = grads
        x, decay, gain, scale, *starts = ctx.saved_tensors
        grad_x: list[Tensor] = []
        sums: list[Any] = [0, 0, 0]
        chunks = zip(grad_spikes.split(_CHUNK), x.split(_CHUNK), starts, strict=True)
        for g, chunk, v in reversed(list(chunks)):
            grad_chunk, grad_v, *parts = ctx.functions(len(chunk))[1](g, grad_v, chunk, v, decay, gain, scale)
            grad_x.append(grad_chunk)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
        return torch.cat(grad_x[::-1]), grad_v, *sums, None


def _scan_compiled(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    scale: Constant | None,
    strict: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(x)
    shape = x.shape
    levels = (len(v_threshold),) if isinstance(v_threshold, tuple) else ()
    if v is None:
        v = x.new_full((*levels, *shape[1:]), 0.0 if v_reset is None else v_reset, dtype=dtype)

    def functions(steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return _compiled_chunks(
            v_threshold, v_reset, surrogate, detach_reset, scale is not None, strict, steps, x.dtype
        )

    constants = (decay, gain, 1.0 if scale is None else scale)
    spikes, last = _Compiled.apply(
        x.flatten(1), v.to(dtype).flatten(len(levels)),
        *(torch.as_tensor(c, dtype=dtype, device=x.device) for c in constants), functions,
    )  # fmt: skip
    return spikes.view(shape), last.view(*levels, *shape[1:])
