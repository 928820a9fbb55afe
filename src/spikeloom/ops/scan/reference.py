"""Neurons that step through time, in plain PyTorch: the definition of `ops.scan`, whose equations these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spikeloom.surrogates import Surrogate

Constant = float | Tensor


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
    """`scan` in plain PyTorch: the definition, differentiated by autograd.

    Shapes: as `scan`.
    """
    spikes, v = run_steps(
        x, v, decay, gain, v_threshold, v_reset, lambda _, u: surrogate(u, strict), detach_reset, scale
    )
    return torch.stack(spikes).to(x.dtype), v


def run_steps(
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
    x = x.to(state_dtype(x))
    levels = isinstance(v_threshold, tuple)
    threshold = per_level(v_threshold, x) if isinstance(v_threshold, tuple) else v_threshold
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


def theta(u: Tensor, strict: bool) -> Tensor:
    return (u > 0 if strict else u >= 0).to(u.dtype)


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_level(thresholds: Sequence[float], x: Tensor) -> Tensor:
    """Thresholds [levels, 1, ...], to meet x [T, N, ...] step by step or potentials [levels, T, N, ...]."""
    return torch.tensor(thresholds, dtype=state_dtype(x), device=x.device).view(-1, *(1,) * (x.dim() - 1))


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
            return theta(u, strict)

        run_steps(x, v, decay, gain, v_threshold, v_reset, watch, True, scale)
        return torch.stack(trace)
