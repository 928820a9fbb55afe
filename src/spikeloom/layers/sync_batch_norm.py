"""Batch statistics of all processes that train together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes(group: Any) -> int:
    """How many processes a group has, None being all; 1 where none were started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    """The sum over all processes, and in the backward pass the sum of what comes back in each of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(grad, ctx.group), None


def _summed(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def moments(y: Tensor, steps: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (factor 1 / n) [C] of y [N, C, ...] over all processes of a group, and n.

    Each process sends three numbers a channel, in float64: what they have in common cancels there without loss.

    Args:
        y: of this process; the sizes of others may differ.
        steps: how often y counts.
        group: None for all processes.

    Raises:
        ValueError: y is empty.
    """
    if y.numel() == 0:
        raise ValueError(f"synchronised statistics need an element in every process, got shape {tuple(y.shape)}")
    variance, mean = torch.var_mean(y if y.dtype == torch.float64 else y.float(), [0, *range(2, y.dim())], correction=0)
    count = y.numel() // y.shape[1] * steps
    first, second = mean.double(), variance.double() + mean.double().square()
    n, first, second = _Sum.apply(torch.stack([torch.ones_like(first), first, second]) * count, group)  # pyright: ignore
    first, second = first / n, second / n
    return first.to(mean.dtype), (second - first.square()).clamp_min(0).to(mean.dtype), n
