"""What PyTorch does with an op besides computing it. Native kernels serve none of these modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active  # pyright: ignore

# Whether `torch.jit.trace` records: it sees operators, and not what a kernel does with their memory.
tracing: Callable[[], bool] = torch._C._is_tracing  # pyright: ignore


def exporting() -> bool:
    """Whether `torch.export` traces. `torch.compiler.is_exporting` says so of `torch.compile` too, in PyTorch 2.9."""
    return torch.compiler._is_exporting_flag  # pyright: ignore[reportPrivateUsage]


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is at work: both need plain PyTorch."""
    return _functorch() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Computes inside in the precision of x. The meta device, of shapes alone, has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
