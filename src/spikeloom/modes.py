"""What PyTorch does with an op besides computing it. Native kernels serve none of these modes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore

# Whether `torch.jit.trace` records: it sees operators, and not what a kernel does with their memory.
tracing: Callable[[], bool] = torch._C._is_tracing  # pyright: ignore


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work: both need plain PyTorch."""
    return _functorch() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
