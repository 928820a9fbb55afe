"""`ops.scan` on accelerators in eager mode: the steps of a chunk unrolled under torch.compile, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops._custom_op import first_order
from spikeloom.ops.scan.reference import Constant, per_level, run_steps, state_dtype, theta
from spikeloom.surrogates import Surrogate

_compiled_count = itertools.count()
_CHUNK = 8  # steps that are unrolled at a time


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
        spikes, v = run_steps(
            x, v, decay, gain, v_threshold, v_reset, lambda _, u: theta(u, strict), True, scale if rectified else None
        )
        return torch.stack(spikes).to(x.dtype), v

    def backward(
        grad_spikes: Tensor, grad_v: Tensor, x: Tensor, v: Tensor, decay: Tensor, gain: Tensor, scale: Tensor
    ) -> tuple[Tensor, ...]:
        state = state_dtype(x)
        threshold = per_level(v_threshold, x) if isinstance(v_threshold, tuple) else v_threshold
        starts, hs, fs, fired = [v], [], [], []
        for x_t in x.to(state):
            hs.append(decay * (starts[-1] - rest) + gain * x_t + rest)
            fs.append(torch.relu(scale * hs[-1]) if rectified else hs[-1])
            fired.append(theta(fs[-1] - threshold, strict))
            f, s = fs[-1], fired[-1]
            starts.append(f - threshold * s if v_reset is None else f * (1 - s) + v_reset * s)
        grads: list[Tensor] = []
        sums = [torch.zeros_like(v) for _ in range(3)]
        for t in reversed(range(len(hs))):
            f = fs[t]
            slope = surrogate.checked_derivative(f - threshold)
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
    @first_order("scan")  # what is kept of a chunk is its start, without the graph that made it
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
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


def scan_compiled(
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
    dtype = state_dtype(x)
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
        x.flatten(1),
        v.to(dtype).flatten(len(levels)),
        *(torch.as_tensor(c, dtype=dtype, device=x.device) for c in constants),
        functions,
    )
    return spikes.view(shape), last.view(*levels, *shape[1:])
