"""Weights of convolutions in the order and the numbers in which a layer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Conv, Value
from spikeloom.ops import _dispatch

FAR = 8 << 20  # bytes of a layer's weights that a core reads anew for every batch

_SHORT = 2**15 - 1  # the largest sum of 16 bits


class Packed(NamedTuple):
    """A layer's weights as its way reads them.

    Attributes:
        weight: of PyTorch's layer, or in the kernel's order: float32, of the event kernel also bfloat16, int16 or int8.
        bias, scale: [C']; a scale of integers alone.
        widen: [groups] of integers whose sums can exceed 16 bits (`EngineConv` in native/kernels.hpp); else None.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    widen: Tensor | None = None

    def fields(self) -> dict[str, int]:
        """Of the event kernel."""
        names = {torch.float32: "weight", torch.bfloat16: "half", torch.int16: "shorts", torch.int8: "bytes"}
        found = {**dict.fromkeys((*names.values(), "scale", "widen"), 0), "bias": self.bias.data_ptr()}
        found[names[self.weight.dtype]] = self.weight.data_ptr()
        for name, tensor in (("scale", self.scale), ("widen", self.widen)):
            if tensor is not None:
                found[name] = tensor.data_ptr()
        return found


def pack(step: Conv, x: Value, tensors: Mapping[str, Tensor]) -> Packed:
    """Weights in the order in which the way of the layer reads them.

    Integers are added up in 16 bits where no group of them (`_widened`) can exceed these, elsewhere as float32.
    """
    kept, real = tensors[step.weight], step.real_weight(tensors)
    bias = torch.zeros(real.shape[0]) if step.bias is None else tensors[step.bias]
    if step.way == "dense":
        return Packed(real.contiguous(memory_format=torch.channels_last), bias)
    if step.way == "direct":
        return Packed(_direct(step, real.contiguous()), bias)
    depthwise, floats = step.depthwise(kept), _Order(step, x, real)
    if kept.dtype == torch.int8 and not depthwise:
        assert x.most is not None
        assert step.scale is not None
        integers = _Order(step, x, kept.float(), integers=True)
        if integers.count < 1.5 * floats.count:  # else there are few outputs: half of every vector would be empty
            packed = integers.packed()
            widen = _widened(packed, integers.groups, integers.rows, integers.block, x.most)
            if widen is not None:
                packed = packed.to(torch.int8 if 2 * packed.numel() > FAR else torch.int16)
                return Packed(packed, bias, tensors[step.scale], widen if widen.any() else None)
    # Where the caches hold float32, taking words apart costs more than it saves.
    half = kept.dtype == torch.bfloat16 and not depthwise and 4 * floats.count > FAR
    return Packed(floats.packed(half), bias)


def _direct(step: Conv, weight: Tensor) -> Tensor:
    """The order of `engine_direct`."""
    count = torch.zeros(1, dtype=torch.int64)
    fields = {
        "in": weight.shape[1] * step.groups,
        "out": weight.shape[0],
        "kernel_height": weight.shape[2],
        "kernel_width": weight.shape[3],
        "groups": step.groups,
        "weight": weight.data_ptr(),
        "count": count.data_ptr(),
    }
    _dispatch.native.engine_pack_direct(**fields, packed=0)
    packed = torch.empty(int(count))
    _dispatch.native.engine_pack_direct(**fields, packed=packed.data_ptr())
    return packed


class _Order:
    """The event kernel's order of a layer's weights.

    Attributes:
        count: of numbers.
        groups, rows, block: how many groups of weights, rows of a group and outputs of a block there are.
    """

    def __init__(self, step: Conv, x: Value, weight: Tensor, integers: bool = False):
        counts = torch.zeros(4, dtype=torch.int64)
        self._weight = weight, counts  # the fields point to them
        self._fields = {
            "in": weight.shape[1],
            "out": weight.shape[0],
            "kernel_height": weight.shape[2],
            "kernel_width": weight.shape[3],
            "stride": step.stride,
            "depthwise": step.depthwise(weight),
            "binary": x.most == 1,
            "integers": integers,
            "weight": weight.data_ptr(),
            "counts": counts.data_ptr(),
        }
        _dispatch.native.engine_pack(**self._fields, packed=0, half=0)
        self.count, self.groups, self.rows, self.block = counts.tolist()

    def packed(self, half: bool = False) -> Tensor:
        """The weights, as float32 or bfloat16."""
        packed, halves = torch.empty(self.count), torch.empty(self.count if half else 0, dtype=torch.bfloat16)
        pointers = {"packed": packed.data_ptr(), "half": halves.data_ptr() if half else 0}
        _dispatch.native.engine_pack(**self._fields, **pointers)
        return halves if half else packed


def _widened(packed: Tensor, groups: int, rows: int, block: int, most: int) -> Tensor | None:
    """Behind which groups sums of 16 bits have to move to 32, [groups] of 0 and 1; None where one group exceeds them.

    Args:
        packed: integers [blocks, groups, rows, block], and what lies behind them.
        groups, rows, block: of them; groups are added up one after the other.
        most: the largest input.
    """
    blocks = packed.numel() // (groups * rows * block)
    weights = packed[: blocks * groups * rows * block].view(blocks, groups, rows, block)
    # What inputs could make of a group at most, up and down.
    reach = most * torch.stack([weights.clamp(min=0).sum(2), -weights.clamp(max=0).sum(2)])
    widen, total = torch.zeros(groups, dtype=torch.uint8), torch.zeros_like(reach[:, :, 0])
    for group in range(groups):
        total = total + reach[:, :, group]
        if total.max() > _SHORT:
            total = reach[:, :, group]
            if group == 0 or total.max() > _SHORT:
                return None
            widen[group - 1] = 1
    return widen
