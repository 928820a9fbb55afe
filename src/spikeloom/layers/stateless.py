"""Layers without memory, applied to every step of a sequence [T, N, ...]; integers become the default float type.

Weights have the names and shapes of `torch.nn`, so those of an ordinary network load. A sequence that repeats one
image (its steps share memory, as `encode.repeat` makes them) is computed once and repeated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.encode import floating
from spikeloom.modes import exporting
from spikeloom.ops import _dispatch, depthwise
from spikeloom.ops._bf16 import bf16_product, narrower_than_stride
from spikeloom.ops._custom_op import eager
from spikeloom.ops._layout import NATIVE_DTYPES, in_channels_last, settled
from spikeloom.ops.conv import overruns, spike_conv, spike_conv_through, takes
from spikeloom.ops.pool import max_pool
from spikeloom.ops.pool import takes as takes_pool


def repeats(x: Tensor) -> bool:
    """Whether all steps of x are one and the same memory."""
    return x.shape[0] > 1 and x.stride(0) == 0


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody looks at what passes through one of the modules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for module in modules for name in hooks)


_MAPS = {3: "features", 4: "C, L", 5: "C, H, W", 6: "C, D, H, W"}


def axes_of(x: object) -> int:
    """The number of axes of a tensor; -1 of anything else."""
    return x.dim() if isinstance(x, Tensor) else -1


def check_axes(layer: nn.Module, x: object, axes: int, more: bool = False) -> Tensor:
    """x as floating-point numbers; refuses what is no sequence of so many axes, or `more`.

    Images [N, C, H, W] would be taken for steps.
    """
    x = floating(x, layer)
    if x.dim() < axes or (x.dim() > axes and not more):
        raise ValueError(
            f"{type(layer).__name__} takes a sequence [T, N, {_MAPS[axes]}], got shape {tuple(x.shape)}: one step is "
            "x[None], and layers.Repeat(net, T) shows it images T times"
        )
    return x


class _Repeat(torch.autograd.Function):
    """`y.expand(steps, ...)`, whose gradient does not read a step that comes back repeated more than once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, steps: int) -> Tensor:
        return y.expand(steps, *y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad[0] * grad.shape[0] if repeats(grad) else grad.sum(0), None


def each_step(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function of [N, ...] to each step of x [T, N, ...]; once if the steps repeat."""
    if repeats(x):
        y = _settled(function(_settled(x[0])))
        return _Repeat.apply(y, x.shape[0]) if eager(y) else y.expand(x.shape[0], *y.shape)  # pyright: ignore[reportReturnType]
    return unfold(function(fold(x)), x)


def fold(x: Tensor) -> Tensor:
    """The steps of x [T, N, ...] as one batch [T N, ...]."""
    # Flattening an axis of size one would leave the other one's stride open (`ops._layout.settled`).
    return _settled(x.squeeze(0) if _is_one_step(x) else x.flatten(0, 1))


def unfold(y: Tensor, x: Tensor) -> Tensor:
    """The inverse of `fold`: [T N, ...] as the steps [T, N, ...] that x has."""
    y = _settled(y)
    return y.unsqueeze(0) if _is_one_step(x) else y.unflatten(0, x.shape[:2])


def _is_one_step(x: Tensor) -> bool:
    return x.shape[0] == 1 and not _is_traced()  # a graph is for any number of steps


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None  # pyright: ignore


def _settled(x: Tensor) -> Tensor:
    return settled(x) if x.dim() > 3 and torch.is_grad_enabled() else x


def channels_last(x: Tensor) -> Tensor:
    """Images [T, N, C, H, W] in the order of memory in which a CPU computes convolutions fastest.

    Layers keep the order of their input, so a network is asked once, at its entry. Weights may stay as they are.
    """
    return each_step(in_channels_last, x) if x.is_cpu and not _is_traced() else x


def concatenated(*maps: Tensor) -> Tensor:
    """Maps [T, N, C, H, W] of as many steps and images behind one another in C, in the order of memory of the first."""
    # PyTorch keeps the order of four axes alone.
    if _is_traced():
        return torch.cat(maps, 2)
    return unfold(torch.cat([fold(x) for x in maps], 1), maps[0])


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d` on each step: [T, N, C, L] -> [T, N, C', L']."""

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 4)
        single = narrower_than_stride(input, self.stride)
        return each_step(lambda x: bf16_product(self._conv_forward, x, self.weight, self.bias, single=single), input)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on each step: [T, N, C, H, W] -> [T, N, C', H', W'].

    On channels-last memory of a CPU, large plain convolutions use the zeros of their input (`ops.conv`), and
    those of every channel by itself have an op of their own (`ops.depthwise`).

    Attributes:
        dense: leave all that to PyTorch, whatever the input.
    """

    dense: bool = False

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 5)
        return each_step(self._step, input)

    def through(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution of x, and x for a shortcut, whose gradient is then added inside the convolution's own."""
        x = check_axes(self, x, 5)
        if repeats(x) or has_hooks(self) or self.bias is not None:
            return self(x), x
        flat = fold(x)
        found = self._plan(flat)
        if found is None or found[0].func is not spike_conv or found[1] is not flat:
            return self(x), x
        op, _, weight = found
        y, flat = spike_conv_through(flat, weight, **op.keywords)
        return unfold(y, x), unfold(flat, x)

    def _step(self, x: Tensor) -> Tensor:
        found = self._plan(x)
        if found is None:
            single = narrower_than_stride(x, self.stride)
            return bf16_product(self._conv_forward, x, self.weight, self.bias, single=single)
        op, x, weight = found
        y = op(x, weight)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype)[:, None, None])

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padded = self.padding_mode != "zeros"  # then PyTorch pads beforehand
        if (
            self.groups > 1
            or not overruns(weight, self.stride)
            or not (padded or self.padding in ((0, 0), "valid"))
            or not input.is_cpu
            or exporting()  # whose readers know the convolution
        ):
            return super()._conv_forward(input, weight, bias)
        if padded:
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        # Unlike a slice, a pool over one position keeps channels-last gradients so.
        return F.conv2d(F.avg_pool2d(input, 1, self.stride), weight, bias)

    def _plan(self, x: Tensor) -> tuple[functools.partial[Tensor], Tensor, Tensor] | None:
        """An op that does better than PyTorch's, with x and the weight in its type."""
        op = self._native(x) if eager(x) and not self.dense else None
        if op is None:
            return None
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        native = x.dtype == weight.dtype and _dispatch.choose("convolution", x, NATIVE_DTYPES) == "native"
        return (op, x, weight) if native else None

    def _native(self, x: Tensor) -> functools.partial[Tensor] | None:
        """The op of x and the weight that can do better than PyTorch's."""
        (stride, across), padding = self.stride, self.padding
        if stride != across or isinstance(padding, str) or self.dilation != (1, 1) or self.padding_mode != "zeros":
            return None
        down, side = int(padding[0]), int(padding[1])
        if self.groups == 1 and down == side and takes(x, self.weight, stride, down):
            return functools.partial(spike_conv, stride=stride, padding=down)
        if self.groups > 1 and depthwise.takes(x, self.weight, (down, side)):
            return functools.partial(depthwise.depthwise_conv, stride=stride, padding=(down, side))
        return None


class Linear(nn.Linear):
    """`torch.nn.Linear` on each step: [T, N, ..., features] -> [T, N, ..., features']."""

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 3, more=True)
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear takes a sequence [T, N, {self.in_features}], got shape {tuple(input.shape)}: it is made for "
                "inputs of another size"
            )
        return each_step(lambda x: bf16_product(F.linear, x, self.weight, self.bias), input)


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` on each step; spikes in, spikes out. Channels-last memory of a CPU has `ops.pool`.

    Shapes: [T, N, C, H, W] -> [T, N, C, H', W'].
    """

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 5)
        return each_step(self._step, input)

    def _step(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        if (
            isinstance(kernel, int)
            and isinstance(stride, int)
            and isinstance(padding, int)
            and self.dilation in (1, (1, 1))
            and not (self.ceil_mode or self.return_indices)
            and eager(x)
            and takes_pool(x, kernel, stride, padding)
            and _dispatch.choose("max_pool", x, NATIVE_DTYPES) == "native"
        ):
            return max_pool(x, kernel, stride, padding)
        return super().forward(x)  # pyright: ignore[reportReturnType] - no indices asked for


class AvgPool2d(nn.AvgPool2d):
    """`torch.nn.AvgPool2d` on each step.

    Shapes: [T, N, C, H, W] -> [T, N, C, H', W'].
    """

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 5)
        return each_step(super().forward, input)


class AvgPool1d(nn.AvgPool1d):
    """`torch.nn.AvgPool1d` on each step.

    Shapes: [T, N, C, L] -> [T, N, C, L'].
    """

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 4)
        return each_step(super().forward, input)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with one mask for all steps, so that a mean over time is dropped as a whole.

    Shapes: [T, N, ...] -> [T, N, ...].
    """

    def forward(self, input: Tensor) -> Tensor:
        input = check_axes(self, input, 3, more=True)
        return input * super().forward(torch.ones_like(input[0])) if self.training else input


class _OfMaps(nn.Module):
    """A layer of maps of `dims` axes, which are said: of four axes nobody knows [N, C, H, W] from [T, N, C, L]."""

    def __init__(self, dims: int = 3):
        super().__init__()
        if dims not in (2, 3, 4):
            raise ValueError(f"dims must be 2 for maps [C, L], 3 for [C, H, W] or 4 for [C, D, H, W], got {dims!r}")
        self.dims = dims

    def extra_repr(self) -> str:
        return "" if self.dims == 3 else f"dims={self.dims}"


class GlobalAvgPool(_OfMaps):
    """Mean over all positions: [T, N, C, H, W] -> [T, N, C].

    Args:
        dims: axes of the maps: 3 for [C, H, W], 2 for [C, L].
    """

    def forward(self, x: Tensor) -> Tensor:
        x = check_axes(self, x, self.dims + 2)
        return each_step(lambda y: y.flatten(2).mean(2), x)


class Flatten(_OfMaps):
    """[T, N, C, H, W] -> [T, N, features]; features stay as they are.

    Args:
        dims: axes of the maps: 3 for [C, H, W], 2 for [C, L].
    """

    def forward(self, x: Tensor) -> Tensor:
        if axes_of(x) != 3:
            check_axes(self, x, self.dims + 2)
        return each_step(lambda y: y.flatten(1), x)
