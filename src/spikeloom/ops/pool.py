"""The largest of every window, on channels-last memory.

PyTorch's own keeps an index of eight bytes for every output and clears the input's gradient before it adds to it. Here
a byte says which place of its window won, and every gradient is written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import NATIVE_DTYPES, dtype_number, empty_images, pointer


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
        "dtype": dtype_number(x.dtype),
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


class _Inputs(NamedTuple):
    x: Tensor
    kernel: int
    stride: int
    padding: int
    keep: bool


class _BackwardInputs(NamedTuple):
    grad: Tensor
    winners: Tensor
    height: int
    width: int
    kernel: int
    stride: int
    padding: int


class _Pooled(NamedTuple):
    y: Tensor
    winners: Tensor | None


def _allocate(i: _Inputs) -> _Pooled:
    rows, columns = ((size + 2 * i.padding - i.kernel) // i.stride + 1 for size in i.x.shape[2:])
    y = empty_images(i.x, (i.x.shape[0], i.x.shape[1], rows, columns))
    return _Pooled(y, torch.empty_like(y, dtype=torch.uint8) if i.keep else None)


def _fill(i: _Inputs, out: _Pooled) -> None:
    x = i.x.contiguous(memory_format=torch.channels_last)
    fields = _fields(x, i.kernel, i.stride, i.padding)
    fields |= {"x": x.data_ptr(), "y": out.y.data_ptr(), "winners": pointer(out.winners)}
    _dispatch.native.max_pool_forward(**fields)


def _allocate_gradient(i: _BackwardInputs) -> Tensor:
    return empty_images(i.grad, (*i.winners.shape[:2], i.height, i.width))


def _fill_gradient(i: _BackwardInputs, grad_x: Tensor) -> None:
    grad = i.grad.contiguous(memory_format=torch.channels_last)
    fields = _fields(grad_x, i.kernel, i.stride, i.padding)
    fields |= {"winners": i.winners.data_ptr(), "grad_y": grad.data_ptr(), "grad_x": grad_x.data_ptr()}
    _dispatch.native.max_pool_backward(**fields)


def _save(ctx: Any, i: _Inputs, out: _Pooled) -> None:
    ctx.settings = (*i.x.shape[2:], i.kernel, i.stride, i.padding)
    if out.winners is not None:
        ctx.mark_non_differentiable(out.winners)
        ctx.save_for_backward(out.winners)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (winners,) = ctx.saved_tensors
    return _pool_backward(grad, winners, *ctx.settings), None, None, None, None


_pool = native_op("max_pool", _Inputs, _allocate, _fill, _save, _differentiate)
_pool_backward = native_op("max_pool_backward", _BackwardInputs, _allocate_gradient, _fill_gradient)
