"""How kernels see memory: each step as one dense block of numbers, in whatever order the convolutions left them
(channels first or last), and the steps of an input at a stride that may be 0: an image repeated over time is read
from cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spikeloom.ops import _dispatch

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_DTYPE = {dtype: number for number, dtype in enumerate(NATIVE_DTYPES)}
_HUGE = 16 << 20  # bytes above which a new tensor asks for large pages


def _is_dense(step: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(step.stride(), step.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """x [T, ...] in a layout the kernels take: x itself if it can be, else a copy."""
    if x.is_contiguous():
        return x
    size = step_size(x)
    if _is_dense(x[0]) and (x.shape[0] == 1 or x.stride(0) in (size, 0)):
        return x
    return x.contiguous()


def step_size(x: Tensor) -> int:
    """Elements of one step."""
    return x.numel() // max(x.shape[0], 1)


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape: one dense block a step, in the order of x's steps."""
    if x.is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    return torch.empty_strided(x.shape, (step_size(x), *x.stride()[1:]), dtype=dtype, device=x.device)


def fresh(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`like`, in large pages where it is large."""
    y = like(x, dtype)
    if y.nbytes >= _HUGE:
        _dispatch.native.advise_huge(y.data_ptr(), y.nbytes)
    return y


def rows_like(count: int, step: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor [count, *step.shape] of dense blocks in the order of a dense step."""
    return torch.empty_strided((count, *step.shape), (step.numel(), *step.stride()), dtype=dtype, device=step.device)


def ordered(y: Tensor, template: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y with the strides of a template of its shape, and of a type if given: y itself if it has them, else a copy."""
    if dtype is not None and y.dtype != dtype:
        y = y.to(dtype)
    strides = template.stride()
    if y.stride() == strides or all(
        a == b or size == 1 for a, b, size in zip(y.stride(), strides, y.shape, strict=True)
    ):
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def settled(x: Tensor) -> Tensor:
    """Images [N, C, ...] with the strides that their order in memory has, for x and for the gradient that comes back.

    An axis of size one may have any stride, and views leave all kinds. PyTorch tells channels first from channels last
    by the strides of all axes, in places by two rules that disagree on such an axis: its batch norm then gives wrong
    gradients. x keeps its memory; without an axis of size one it is returned as it is.
    """
    N, C, *space = x.shape
    if C == 1 or (N > 1 and 1 not in space) or math.prod(space) == 1:
        return x
    if x.is_contiguous():
        return x.reshape(-1).view(x.shape)
    return in_channels_last(x) if x.movedim(1, -1).is_contiguous() else x


def in_channels_last(x: Tensor) -> Tensor:
    """Images [N, C, ...] in channels-last memory, with its strides where sizes of one leave them open too."""
    last = x.movedim(1, -1)
    return last.reshape(-1).view(last.shape).movedim(-1, 1)


def pointer(tensor: Tensor | None) -> int:
    """A tensor's address, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def steps_of(x: Tensor) -> dict[str, int]:
    """The fields of a kernel's arguments that describe its dense input."""
    steps, size = x.shape[0], step_size(x)
    return {
        "dtype": _DTYPE[x.dtype],
        "steps": steps,
        "size": size,
        "x": x.data_ptr(),
        "x_stride": x.stride(0) if steps > 1 else size,
        "threads": torch.get_num_threads(),
    }


def channels_of(x: Tensor) -> tuple[int, int] | None:
    """Of a dense x [T, N, C, ...]: C, and how many elements of one channel lie side by side.

    None where the axes lie in an order that is neither channels first nor channels last.
    """
    C = x.shape[2]
    step = x[0]
    inner = max(1, step.shape[2:].numel())
    if step.is_contiguous():
        return C, inner
    last = step.movedim(1, -1)
    return (C, 1) if last.is_contiguous() else None


def by_channels(x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """x [T, N, C, ...] as kernels with constants a channel take it, copied if its axes lie in no order of theirs, and
    the fields that say where its channels are."""
    x = dense(x)
    layout = channels_of(x)
    if layout is None:
        x = x.contiguous()
        layout = channels_of(x)
    assert layout is not None
    return x, {"channels": layout[0], "inner": layout[1]}


def steps_by_channels(x: Tensor, layout: dict[str, int]) -> dict[str, int]:
    """`steps_of` with the fields of `by_channels`."""
    return {**steps_of(x), **layout}


def as_rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """x [T, ...] as a view [T, size] (a copy only if x is not dense), and the order of axes that made it."""
    x = dense(x)
    order = [0, *sorted(range(1, x.dim()), key=lambda axis: -x.stride(axis))]
    return x.permute(order).flatten(1), order


def from_rows(rows: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """The inverse of `as_rows`, for a result of the same size."""
    permuted = rows.view([shape[axis] for axis in order])
    return permuted.permute([order.index(axis) for axis in range(len(order))])
