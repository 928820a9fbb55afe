"""Convolution of every channel by its own filter, on channels-last memory.

There is next to no arithmetic in it, so it is a matter of reading whole vectors of channels; oneDNN's gradients of
small maps take many times as long (docs/notes/convolution-kernels.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import op_with_weight
from spikeloom.ops._layout import NATIVE_DTYPES, dtype_number, empty_images


def depthwise_conv(x: Tensor, weight: Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """`torch.nn.functional.conv2d` with as many groups as channels.

    Args:
        x: [N, C, H, W], channels-last, float32 or bfloat16.
        weight: [C, 1, k, l] of the same type. Sums are float32 whatever the type.
        stride: of both axes.
        padding: of rows and columns.

    Returns:
        [N, C, H', W'], channels-last.
    """
    return _conv(x, weight, stride, *padding)


def takes(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether x [N, C, H, W] and the weight of a grouped convolution are what the op takes.

    A filter larger than the padded image is left to PyTorch, which says so.
    """
    return (
        weight.shape[:2] == (x.shape[1], 1)
        and x.dtype in NATIVE_DTYPES
        and x.numel() > 0
        and all(size + 2 * pad >= k for size, pad, k in zip(x.shape[2:], padding, weight.shape[2:], strict=True))
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _fields(x: Tensor, weight: Tensor, stride: int, pad_height: int, pad_width: int) -> dict[str, Any]:
    """The kernels' arguments; the caller fills what it uses. The weight is float32 [k, l, C]."""
    N, C, H, W = x.shape
    return {
        "dtype": dtype_number(x.dtype),
        "images": N,
        "height": H,
        "width": W,
        "channels": C,
        "kernel_height": weight.shape[0],
        "kernel_width": weight.shape[1],
        "stride": stride,
        "pad_height": pad_height,
        "pad_width": pad_width,
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "y": 0,
        "grad_y": 0,
        "grad_x": 0,
        "grad_weight": 0,
        "threads": torch.get_num_threads(),
    }


def _by_taps(weight: Tensor) -> Tensor:
    """[C, 1, k, l] -> float32 [k, l, C]."""
    return weight[:, 0].permute(1, 2, 0).float().contiguous()


def _allocate(x: Tensor, weight: Tensor, stride: int, pad_height: int, pad_width: int) -> Tensor:
    rows = (x.shape[2] + 2 * pad_height - weight.shape[2]) // stride + 1
    columns = (x.shape[3] + 2 * pad_width - weight.shape[3]) // stride + 1
    return empty_images(x, (x.shape[0], x.shape[1], rows, columns))


def _forward(x: Tensor, weight: Tensor, stride: int, pad_height: int, pad_width: int) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y, taps = _allocate(x, weight, stride, pad_height, pad_width), _by_taps(weight)
    _dispatch.native.depthwise_forward(**_fields(x, taps, stride, pad_height, pad_width) | {"y": y.data_ptr()})
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, pad_height: int, pad_width: int, need: list[bool]
) -> tuple[Tensor, Tensor]:
    x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad.to(x.dtype)))
    taps = _by_taps(weight)
    fields = _fields(x, taps, stride, pad_height, pad_width) | {"grad_y": grad.data_ptr()}
    grad_x, grad_weight = x.new_empty(0), x.new_empty(0)
    if need[0]:
        grad_x = empty_images(x, x.shape)
        _dispatch.native.depthwise_input(**fields | {"grad_x": grad_x.data_ptr()})
    if need[1]:
        found = torch.empty_like(taps)
        _dispatch.native.depthwise_weight(**fields | {"grad_weight": found.data_ptr()})
        grad_weight = found.permute(2, 0, 1).unsqueeze(1).to(weight.dtype).contiguous()
    return grad_x, grad_weight


_conv = op_with_weight("depthwise_conv", _forward, _allocate, _backward)
