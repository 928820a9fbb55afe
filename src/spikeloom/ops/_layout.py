"""How kernels see memory: each step as one dense block of numbers, in whatever order the convolutions left them
(channels first or last), and the steps of an input at a stride that may be 0: an image repeated over time is read
from cache."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from spikeloom.ops import _dispatch

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_HUGE = 16 << 20  # bytes above which a new tensor asks for large pages


@cache
def dtype_number(dtype: torch.dtype) -> int:
    """The kernels' number of an element type in `NATIVE_DTYPES`."""
    return _dispatch.enum_number("Dtype", str(dtype).removeprefix("torch."))


def _is_dense(x: Tensor) -> bool:
    """Whether the steps of x [T, ...] are dense blocks, side by side or all the same one."""
    expected = 1
    for stride, size in sorted(zip(x.stride()[1:], x.shape[1:], strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return x.shape[0] == 1 or x.stride(0) in (expected, 0)


def step_size(x: Tensor) -> int:
    """Elements of one step."""
    return x.numel() // max(x.shape[0], 1)


def large_pages(y: Tensor) -> Tensor:
    """An empty tensor as it is; where it is large, its memory is to come in large pages."""
    if type(y) is Tensor and y.nbytes >= _HUGE and y.is_cpu:
        _dispatch.native.advise_huge(y.data_ptr(), y.nbytes)
    return y


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of x's shape as kernels write it: one dense block a step, in the order of x's steps.

    Steps of x that are not dense, or lie at other distances than kernels know, give C order.
    """
    if x.is_contiguous():
        y = torch.empty_like(x) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)  # a type takes time to read
    elif not _is_dense(x):
        y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    else:
        y = torch.empty_strided(x.shape, (step_size(x), *x.stride()[1:]), dtype=dtype, device=x.device)
    return large_pages(y)


def rows_like(count: int, step: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor [count, *step.shape] of dense blocks in the order of a dense step."""
    return torch.empty_strided((count, *step.shape), (step.numel(), *step.stride()), dtype=dtype, device=step.device)


def states_like(template: Tensor) -> Tensor:
    """An empty pair of states [2, N, ...], float32, in the order of a template's steps."""
    return rows_like(2, template[0], torch.float32)


def sums_like(parameter: Tensor) -> Tensor:
    """An empty float64 tensor of a parameter's shape, in C order, for its gradient: autograd gives it its type."""
    return torch.empty_like(parameter, dtype=torch.float64, memory_format=torch.contiguous_format)


def ordered(y: Tensor, template: Tensor, dtype: torch.dtype | None = None, repeated: bool = False) -> Tensor:
    """y with the strides of a template of its shape, and of a type if given: y itself if it has them, else a copy.

    With `repeated` one step that stands for all, with a stride of 0, stays so.
    """
    if dtype is not None and y.dtype != dtype:
        y = y.to(dtype)
    strides = template.stride()
    if y.stride() == strides or all(
        a == b or size == 1 or (repeated and a == axis == 0)
        for axis, (a, b, size) in enumerate(zip(y.stride(), strides, y.shape, strict=True))
    ):
        return y
    if repeated and y.shape[0] > 1 and y.stride(0) == 0:
        return ordered(y[:1], template[:1]).expand(y.shape)
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


def empty_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor [N, C, H, W] of x's dtype in channels-last memory, with its strides in odd sizes too."""
    _, C, H, W = shape
    return large_pages(torch.empty_strided(shape, (H * W * C, 1, W * C, C), dtype=x.dtype, device=x.device))


def pointer(tensor: Tensor | None) -> int:
    """A tensor's address, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def steps_of(x: Tensor) -> dict[str, int]:
    """The fields of a kernel's arguments that describe its dense input."""
    steps, size = x.shape[0], step_size(x)
    return {
        "dtype": dtype_number(x.dtype),
        "steps": steps,
        "size": size,
        "x": x.data_ptr(),
        "x_stride": x.stride(0) if steps > 1 else size,
        "threads": torch.get_num_threads(),
    }


def like_by_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`like` for kernels with constants a channel: x [T, N, C, ...] in channels first or channels last, or C order."""
    y = like(x, dtype)
    return y if _inner(y) else torch.empty_like(y, memory_format=torch.contiguous_format)


def _inner(y: Tensor) -> int:
    """How many elements of one channel lie side by side in y [T, N, C, ...] from `like`; 0 in other orders of axes."""
    if y.is_contiguous():
        return max(1, y.shape[3:].numel())
    return int(y.movedim(2, -1).is_contiguous())


def steps_by_channels(x: Tensor, template: Tensor) -> dict[str, int]:
    """`steps_of` of x, arranged as a template from `like_by_channels`, with the fields that say where channels are."""
    return {**steps_of(x), "channels": x.shape[2], "inner": _inner(template)}


def as_rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """x [T, ...] as a view [T, size] (a copy only if x is not dense), and the order of axes that made it."""
    x = x if _is_dense(x) else x.contiguous()
    order = [0, *sorted(range(1, x.dim()), key=lambda axis: -x.stride(axis))]
    return x.permute(order).flatten(1), order


def from_rows(rows: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """The inverse of `as_rows`, for a result of the same size."""
    permuted = rows.view([shape[axis] for axis in order])
    return permuted.permute([order.index(axis) for axis in range(len(order))])
