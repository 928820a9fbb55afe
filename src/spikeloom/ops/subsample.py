"""Every second position of an image between channels of zeros: two passes less than a pool over one position, a padding
and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops._custom_op import autograd_function


def subsample(x: Tensor, before: int, after: int) -> Tensor:
    """x[:, :, ::2, ::2] with channels of zeros on both sides, in x's memory order; so is the gradient.

    Args:
        x: [N, C, H, W].
        before, after: channels of zeros.

    Returns:
        [N, before + C + after, ceil(H / 2), ceil(W / 2)].
    """
    return _subsample(x, before, after)


def _zeros(x: Tensor, shape: tuple[int, ...], order: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order).zero_()


def _order(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _forward(x: Tensor, before: int, after: int) -> Tensor:
    N, C, H, W = x.shape
    y = _zeros(x, (N, before + C + after, (H + 1) // 2, (W + 1) // 2), _order(x))
    y[:, before : before + C].copy_(x[:, :, ::2, ::2])
    return y


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.before, _ = inputs
    ctx.shape, ctx.order = x.shape, _order(x)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # In the input's order, whatever the gradient's: it meets the convolutions' in every block before.
    grad_x = _zeros(grad, ctx.shape, ctx.order)
    grad_x[:, :, ::2, ::2].copy_(grad[:, ctx.before : ctx.before + ctx.shape[1]])
    return grad_x, None, None


_subsample = autograd_function("subsample", _forward, _save, _differentiate)
