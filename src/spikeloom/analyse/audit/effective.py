"""Effective operations: those whose weight and whose input are both not 0, at positions that exist, without biases.

NeuroBench counts its effective MACs and ACs so (Yik et al. 2025, synaptic operations). All counts are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 16  # elements that stay in the cache


def of_convolution(x: Tensor, weight: Tensor, transposed: bool, geometry: tuple[Any, ...], spikes: bool) -> float:
    """Of a convolution; padding is no input.

    The products of an input are the nonzero weights that reach an output from its position. So the inputs of all images
    are counted by position, and one convolution with the number of such weights, over outputs, adds up the products.

    Args:
        x: [N, C, ...].
        weight: as `torch.nn.functional.conv2d`, or `conv_transpose2d`.
        transposed: which of them.
        geometry: stride, padding, dilation, output padding and groups.
        spikes: whether x is known to be 0 and 1.
    """
    *shape, groups = geometry
    stride, padding, dilation, output_padding = shape
    counts = _by_position(x, spikes)[None].double()
    connected = (weight != 0).double()
    # All outputs of a group become one.
    fan_out = connected.sum(1, keepdim=True) if transposed else connected.unflatten(0, (groups, -1)).sum(1)
    products = torch.ops.aten.convolution.default(
        counts, fan_out, None, stride, padding, dilation, transposed, output_padding, groups
    )
    return float(products.sum())


def of_product(a: Tensor, b: Tensor) -> float:
    """Of [..., n, k] times [..., k, m]."""
    return float(((a != 0).sum(-2, dtype=torch.float64) * (b != 0).sum(-1, dtype=torch.float64)).sum())


def count_nonzero(x: Tensor) -> int:
    """How many elements are not 0; `torch.count_nonzero` takes ten times as long."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    flat, total = x.permute(order).reshape(-1), 0
    buffer = x.new_empty(min(_CHUNK, len(flat)), dtype=torch.float32)
    for chunk in flat.split(_CHUNK):
        total += int(torch.ne(chunk, 0, out=buffer[: len(chunk)]).sum())
    return total


def _by_position(x: Tensor, spikes: bool) -> Tensor:
    """How many of the first axis are not 0, float32 of the other axes' shape."""
    order = sorted(range(1, x.dim()), key=x.stride, reverse=True)
    rows = x.permute(0, *order)
    if spikes:
        counts = rows.sum(0, dtype=torch.float32)
    else:
        counts, buffer = (torch.zeros_like(rows[0], dtype=torch.float32) for _ in range(2))
        for row in rows:
            counts += torch.ne(row, 0, out=buffer)
    back = [order.index(axis) for axis in range(1, x.dim())]
    return counts.permute(back)
