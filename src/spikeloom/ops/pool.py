"""The largest of every window, on channels-last memory.

PyTorch's own keeps an index of eight bytes for every output and clears the input's gradient before it adds to it. Here
a byte says which place of its window won, and every gradient is written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import NATIVE_DTYPES, fresh


def max_pool(x: Tensor, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """`torch.nn.functional.max_pool2d`: of equal values the first one wins, and NaN wins over all.

    Args:
        x: [N, C, H, W], channels-last, float32 or bfloat16.
        kernel, stride, padding: of both axes; the padding is at most half the kernel.

    Returns:
        [N, C, H', W'], channels-last.
    """
    return _pool(x, kernel, stride, padding, x.requires_grad and torch.is_grad_enabled())[0]


def takes(x: Tensor, kernel: int, stride: int, padding: int) -> bool:
    """Whether the op can pool x [N, C, H, W] so; what PyTorch refuses is left to it."""
    return (
        0 < kernel <= 16
        and stride > 0
        and 0 <= 2 * padding <= kernel
        and x.dim() == 4
        and x.dtype in NATIVE_DTYPES
        and x.numel() > 0
        and min(x.shape[2:]) + 2 * padding >= kernel
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _fields(x: Tensor, kernel: int, stride: int, padding: int) -> dict[str, Any]:
    """The kernels' arguments for images of x's shape; the caller fills what it uses."""
    N, C, H, W = x.shape
    return {
        "dtype": NATIVE_DTYPES.index(x.dtype),
        "images": N,
        "height": H,
        "width": W,
        "channels": C,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "x": 0,
        "y": 0,
        "winners": 0,
        "grad_y": 0,
        "grad_x": 0,
        "threads": torch.get_num_threads(),
    }


def _fake(x: Tensor, kernel: int, stride: int, padding: int, keep: bool) -> tuple[Tensor, Tensor | None]:
    rows, columns = ((size + 2 * padding - kernel) // stride + 1 for size in x.shape[2:])
    y = x.new_empty(x.shape[0], rows, columns, x.shape[1]).permute(0, 3, 1, 2)
    return y, torch.empty_like(y, dtype=torch.uint8) if keep else None


def _forward(x: Tensor, kernel: int, stride: int, padding: int, keep: bool) -> tuple[Tensor, Tensor | None]:
    x = x.contiguous(memory_format=torch.channels_last)
    y, winners = _fake(x, kernel, stride, padding, keep)
    _dispatch.native.max_pool_forward(
        **_fields(x, kernel, stride, padding)
        | {"x": x.data_ptr(), "y": y.data_ptr(), "winners": 0 if winners is None else winners.data_ptr()}
    )
    return y, winners


def _like_images(winners: Tensor, grad: Tensor, height: int, width: int) -> Tensor:
    return grad.new_empty(winners.shape[0], height, width, winners.shape[1]).permute(0, 3, 1, 2)


def _backward(grad: Tensor, winners: Tensor, height: int, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_x = fresh(_like_images(winners, grad, height, width), grad.dtype)
    _dispatch.native.max_pool_backward(
        **_fields(grad_x, kernel, stride, padding)
        | {"winners": winners.data_ptr(), "grad_y": grad.data_ptr(), "grad_x": grad_x.data_ptr()}
    )
    return grad_x


def _fake_backward(
    grad: Tensor, winners: Tensor, height: int, width: int, kernel: int, stride: int, padding: int
) -> Tensor:
    return _like_images(winners, grad, height, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
    x, *window, _ = inputs
    _, winners = output
    ctx.settings = [*x.shape[2:], *window]
    if winners is not None:
        ctx.mark_non_differentiable(winners)
        ctx.save_for_backward(winners)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (winners,) = ctx.saved_tensors
    return _pool_backward(grad, winners, *ctx.settings), None, None, None, None


_pool = NativeOp("max_pool", _forward, _fake, _save, _differentiate)
_pool_backward = NativeOp("max_pool_backward", _backward, _fake_backward)
