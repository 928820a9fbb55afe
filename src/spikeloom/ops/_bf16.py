"""Where products of bfloat16 are computed in float32 and only what is kept is bfloat16.

On processors without its instructions PyTorch's own products take 8 to 100 times as long as in float32: half the memory
for about float32's time. With them, oneDNN's gradient of some convolutions is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@functools.cache
def bfloat16_is_emulated() -> bool:
    """Whether this processor lacks what PyTorch's bfloat16 products need (x86: AVX-512)."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def narrower_than_stride(x: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's bfloat16 gradient of the weight of a convolution of x [..., W] holds memory that nobody wrote
    (docs/notes/onednn-weight-gradients.md)."""
    return x.shape[-1] < stride[-1]


def bf16_product(function: Callable[..., Tensor], *tensors: Tensor | None, single: bool = False) -> Tensor:
    """`function(*tensors)`; where it is bfloat16 by type or autocast and the processor has none, of float32 and rounded
    after; with `single` whatever the processor has."""
    first = tensors[0]
    assert first is not None
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    rounded = first.dtype == torch.bfloat16 or (autocast and first.dtype == torch.float32)
    if not rounded or first.device.type != "cpu" or not (single or bfloat16_is_emulated()):
        return function(*tensors)
    with torch.autocast("cpu", enabled=False):
        return function(*(None if tensor is None else tensor.float() for tensor in tensors)).to(torch.bfloat16)
