"""ParaLIF's firing functions `s = Phi(m)`, instantaneous in the membrane (Yarga and Wood 2024, ParaLIF, Sec. 3.3).

A rule (stochastic, threshold, or difference) acts on the membrane, possibly after a map into a bounded range:

    gs            Gumbel-softmax over the logits (m, -m), straight-through
    sb trb        Bernoulli with p = sigmoid(m), relu(tanh(m)); the probability stands in for the draw's derivative
    t st tt trt   1 where the mapped potential is above the threshold
    d sd td trd   1 where the mapped potential rises by more than the threshold in one step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops.scan import fire
from spikeloom.surrogates import Sigmoid, Surrogate

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda m: m,
    "s": torch.sigmoid,
    "t": torch.tanh,
    "tr": lambda m: torch.relu(torch.tanh(m)),
}

# Name -> (map, rule). The nine of the paper's tables, and the two with relu(tanh) that the code has besides.
FIRING: dict[str, tuple[str, str]] = {
    "gs": ("", "gumbel"),
    "sb": ("s", "bernoulli"),
    "trb": ("tr", "bernoulli"),
    "d": ("", "difference"),
    "sd": ("s", "difference"),
    "td": ("t", "difference"),
    "trd": ("tr", "difference"),
    "t": ("", "threshold"),
    "st": ("s", "threshold"),
    "tt": ("t", "threshold"),
    "trt": ("tr", "threshold"),
}


class _Bernoulli(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return torch.bernoulli(p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (p,) = ctx.saved_tensors
        return grads[0] * p

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (p,) = ctx.saved_tensors
        return tangents[0] * p


def bernoulli(p: Tensor) -> Tensor:
    """Spikes drawn with probability p; in the backward pass `ds/dp := p`."""
    return _Bernoulli.apply(p)


def gumbel(m: Tensor, uniform: Tensor | None = None) -> Tensor:
    """A hard sample of the Gumbel-softmax over (m, -m) at temperature 1, with the soft sample's gradient.

    The soft sample is `sigmoid(2 m + g0 - g1)`, so this is a sigmoid surrogate on `2 m` plus logistic noise; a neuron
    fires with probability `sigmoid(2 m)`.

    Args:
        m: membrane [T, N, ...].
        uniform: the numbers in (0, 1) behind g0 and g1, [T, N, ..., 2]; drawn if None.
    """
    if uniform is None:
        # The difference of two Gumbel variables is logistic: one draw.
        noise = torch.logit(torch.rand_like(m, dtype=torch.float32).clamp(1e-7, 1 - 1e-7)).to(m.dtype)
    else:
        g = -torch.log(-torch.log(uniform))
        noise = g[..., 0] - g[..., 1]
    return fire(2 * m + noise, Sigmoid(1.0), strict=True)


def fire_by(
    name: str, m: Tensor, threshold: float | Tensor, surrogate: Surrogate, before: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Spikes of a firing function.

    Args:
        name: in `FIRING`.
        m: membrane [T, N, ...].
        threshold: of the threshold and difference rules.
        surrogate: theirs.
        before: the mapped potential [N, ...] one step before the first, for differences; None for 0.

    Returns:
        Spikes [T, N, ...], and for differences the last mapped potential, else None.
    """
    mapped, rule = MAPS[FIRING[name][0]], FIRING[name][1]
    if rule == "gumbel":
        return gumbel(m), None
    y = mapped(m)
    if rule == "bernoulli":
        return bernoulli(y), None
    if rule == "threshold":
        return _above(y, threshold, surrogate), None
    first = torch.zeros_like(y[:1]) if before is None else before.unsqueeze(0).to(y.dtype)
    rise = y - torch.cat([first, y[:-1]])
    return _above(rise, threshold, surrogate), y[-1]


def _above(u: Tensor, threshold: float | Tensor, surrogate: Surrogate) -> Tensor:
    if isinstance(threshold, Tensor):  # a learned one, or one a feature
        if threshold.dim():
            threshold = threshold.to(u.device, u.dtype)
        return fire(u - threshold, surrogate, strict=True)
    return fire(u, surrogate, strict=True, threshold=threshold)
