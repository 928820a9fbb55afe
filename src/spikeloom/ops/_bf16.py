"""bfloat16 on processors without its instructions: there PyTorch's own products take 8 to 100 times as long as in
float32. The sums are then float32's and only what is kept is bfloat16: half the memory for about float32's time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def bfloat16_is_emulated() -> bool:
    """Whether this processor lacks what PyTorch's bfloat16 products need (x86: AVX-512)."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_product(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`function(*tensors)`; where it is bfloat16 by type or autocast and the processor has none, of float32 and rounded
    after."""
    first = tensors[0]
    assert first is not None
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    rounded = first.dtype == torch.bfloat16 or (autocast and first.dtype == torch.float32)
    if not rounded or first.device.type != "cpu" or not bfloat16_is_emulated():
        return function(*tensors)
    with torch.autocast("cpu", enabled=False):
        return function(*(None if tensor is None else tensor.float() for tensor in tensors)).to(torch.bfloat16)
