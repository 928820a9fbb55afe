"""Where the values of a tensor come from: the operation that wrote them, and over how many values each is a mean.

What follows an average pooling is no multiple of one factor if the windows differ in size (at borders that are not
padded, with `ceil_mode`, behind adaptive pooling, or where two poolings meet). The size of every window is kept, and
moves with the values, so that the spikes that were pooled can be counted.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikeloom.analyse.audit.layer import Operand
from spikeloom.analyse.audit.value_types import TensorSummary

# Operations that hand on what they receive; views need no entry, they share memory.
_THROUGH = {
    "clone",
    "_to_copy",
    "cat",
    "stack",
    "copy_",
    "constant_pad_nd",
    "index",
    "index_select",
    "repeat",
    "roll",
    "flip",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool2d",
    "reflection_pad2d",
    "gather",
}
_SUMS, _FIRES = {"add", "sub", "rsub", "sum"}, {"heaviside", "sign"}

_CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("convolution", "addmm", "mm", "bmm", "baddbmm", "scaled_dot_product"), "a layer without a neuron behind it"),
    (("scan", "gated_scan", "band", "norm_scan"), "a neuron that fires integers"),
    (("batch_norm", "cudnn_batch_norm", "layer_norm", "group_norm"), "a norm without a neuron behind it"),
    (("add", "sub", "rsub"), "a sum ({shortcut} shortcut)"),
    (("avg_pool", "adaptive_avg_pool", "mean"), "average pooling"),
    (("mul",), "a product with {values} values (a gate or a scale)"),
    (("relu", "gelu", "silu", "sigmoid", "tanh", "softmax", "hardtanh", "clamp"), "an activation that does not spike"),
)

Windows = float | Tensor | None
"""Over how many values each is a mean: 1 if it is none; a number if it is the same for all; a tensor; None: unknown."""


@dataclass
class Origin:
    """The operation that wrote a piece of memory, in which module, and what was seen there.

    Attributes:
        op, module: of what wrote it.
        windows: of its elements; a tensor has one axis, in the order of the memory.
        summaries: what was seen in its views.
    """

    op: str
    module: str
    windows: Windows = 1.0
    summaries: dict[Any, TensorSummary] = field(default_factory=dict)

    def explain(self, operand: Operand) -> str:
        """What made these values."""
        if self.op == "input":
            return "the data themselves"
        name = self.op.strip("_").removeprefix("native_").strip("_")
        values, shortcut = ("real", "membrane") if operand.input == "real" else (operand.input, "ADD")
        for starts, text in _CAUSES:
            if name.startswith(starts):
                return f"{text.format(values=values, shortcut=shortcut)} in {self.module or 'the model'}"
        return f"{name} in {self.module or 'the model'}"


UNSEEN = Origin("a tensor from outside", "")


class Origins:
    """The origins of all memory in one run of a network.

    Args:
        x: the data.
    """

    def __init__(self, x: Tensor | None = None):
        self._known = {} if x is None else {memory(x): Origin("input", "")}
        self._averaged = False  # whether anything was, so far

    def of(self, x: Tensor) -> Origin:
        """The origin of what x is a view of."""
        return self._known.get(memory(x), UNSEEN)

    def windows(self, x: Tensor) -> Windows:
        """Over how many values each of x is a mean; a tensor has the shape of x."""
        found = self.of(x).windows
        if not isinstance(found, Tensor):
            return found
        if len(found) * x.element_size() != x.untyped_storage().nbytes():
            return None  # the memory is read as another type
        return found.as_strided(x.shape, x.stride(), x.storage_offset())

    def wrote(self, func: Any, module: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        """An operation finished: memory that it made, or changed, comes from it."""
        name, changes = func.overloadpacket.__name__, func._schema.is_mutable
        reads = list(tensors((args, kwargs)))
        known = {memory(tensor) for tensor in reads}
        source = reads[-1] if name == "copy_" else reads[0] if name in _THROUGH and reads else None
        origin = self._known.get(memory(source)) if source is not None else None
        windows = self._windows(func, args, kwargs, reads, results)
        op, module = (name, module) if origin is None else (origin.op, origin.module)
        for tensor in tensors(results):
            if changes or memory(tensor) not in known:  # else a view
                self.set(tensor, op, module, windows, changes)

    def set(self, x: Tensor, op: str, module: str, windows: Windows = 1.0, changed: bool = False) -> None:
        """The memory of x comes from an operation of a module; if that `changed` it, the rest of it stays."""
        before = self.of(x).windows if changed else 1.0
        if before is None:
            windows = None
        elif isinstance(windows, Tensor) or (windows is not None and changed and not _same(before, windows)):
            elements = x.untyped_storage().nbytes() // x.element_size()
            flat = before * torch.ones(elements, device=x.device)
            view = flat.as_strided(x.shape, x.stride(), x.storage_offset())
            view.copy_(windows) if isinstance(windows, Tensor) else view.fill_(windows)
            windows = flat
        self._known[memory(x)] = Origin(op, module, windows)

    def _windows(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reads: list[Tensor], results: Any
    ) -> Windows:
        """Over how many values each of a result is a mean."""
        name = func.overloadpacket.__name__
        if name in _POOLS:
            self._averaged = True
            return self._pooled(func, args, kwargs, results)
        if not self._averaged or func.namespace != "aten" or name in _FIRES:
            return 1.0
        result = next(tensors(results), None)
        read: list[Any] = [self.windows(x) for x in reads if x.is_floating_point()]
        if result is None or not result.is_floating_point() or all(_same(w, 1.0) for w in read):
            return 1.0
        if any(w is None for w in read):
            return None
        name = name.removesuffix("_") if func._schema.is_mutable else name
        if name in ("mul", "neg") or (name == "div" and all(_same(w, 1.0) for w in read[1:])):
            return functools.reduce(operator.mul, read)
        if all(_same(w, read[0]) for w in read):
            return read[0] if name in _THROUGH or name in _SUMS else 1.0
        return self._varying(name, func, args, kwargs, result)

    def _varying(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Windows:
        """Of a result of values from windows of different sizes."""
        if name in ("clone", "_to_copy", "copy"):
            return self._as_tensor(args[-1])
        if name in _THROUGH and "max_pool" not in name:
            return func(*_each(self._as_tensor, args), **kwargs)
        if name in _SUMS and not func._schema.is_mutable:
            return _ratio(func(*_each(self._sums, args), **kwargs), result)
        return None

    def _pooled(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Windows:
        x, sizes = args[0], _POOLS[func.overloadpacket.__name__](result, *args, **kwargs)
        inner = self.windows(x)
        if isinstance(inner, Tensor):
            return _ratio(sizes * func(self._sums(x), *args[1:], **kwargs), result)
        return None if inner is None else sizes * inner

    def _as_tensor(self, x: Tensor) -> Tensor:
        """The windows of x; x itself if it holds no values but indices."""
        found = self.windows(x) if x.is_floating_point() else x
        return found if isinstance(found, Tensor) else torch.full((1,), found or 1.0, device=x.device).expand(x.shape)

    def _sums(self, x: Tensor) -> Tensor:
        """What x is the mean of, summed up."""
        return x * self._as_tensor(x) if x.is_floating_point() else x


def _same(a: Windows, b: Windows) -> bool:
    return isinstance(a, float) and isinstance(b, float) and a == b


def _ratio(sums: Tensor, means: Tensor) -> Tensor:
    return torch.where(means == 0, 1.0, sums / means)


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Arguments of an operation with a function of its tensors in their place."""
    if isinstance(value, tuple | list):
        return type(value)(_each(function, part) for part in value)
    return function(value) if isinstance(value, Tensor) else value


def _fixed(
    axes: int,
    result: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> float | Tensor:
    """Elements in each window of `torch.nn.AvgPool2d` and its siblings."""
    if divisor_override is not None:
        return float(divisor_override)
    lengths: list[Tensor] = []
    for axis in range(-axes, 0):
        kernel, step, pad = (of[axis if len(of) == axes else 0] for of in (kernel_size, stride or kernel_size, padding))
        size = x.shape[axis]
        start = torch.arange(result.shape[axis]) * step - pad
        end = (start + kernel).clamp(max=size + pad)
        lengths.append(end - start if count_include_pad else end.clamp(max=size) - start.clamp(min=0))
    return _areas(lengths, x.device)


def _adaptive(axes: int, result: Tensor, x: Tensor, output_size: Sequence[int]) -> float | Tensor:
    """Elements in each window of `torch.nn.AdaptiveAvgPool2d` and its siblings."""
    lengths: list[Tensor] = []
    for axis in range(-axes, 0):
        size, parts = x.shape[axis], result.shape[axis]
        index = torch.arange(parts)
        lengths.append(((index + 1) * size + parts - 1) // parts - index * size // parts)
    return _areas(lengths, x.device)


def _mean(result: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> float:
    return x.numel() / max(1, result.numel())


def _areas(lengths: list[Tensor], device: torch.device) -> float | Tensor:
    """Products of the windows' lengths along each axis, one number if they are equal."""
    areas = lengths[0]
    for length in lengths[1:]:
        areas = areas[..., None] * length
    first = float(areas.flatten()[0]) if areas.numel() else 1.0
    return first if bool((areas == first).all()) else areas.to(device, torch.float32)


_POOLS: dict[str, Callable[..., float | Tensor]] = {
    **{f"avg_pool{axes}d": functools.partial(_fixed, axes) for axes in (1, 2, 3)},
    **{f"_adaptive_avg_pool{axes}d": functools.partial(_adaptive, axes) for axes in (2, 3)},
    "mean": _mean,
}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in the arguments or results of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            if isinstance(part, Tensor):
                yield part
            elif isinstance(part, tuple | list | dict):
                yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def memory(tensor: Tensor) -> int:
    """What a tensor shares with its views."""
    return tensor.untyped_storage().data_ptr()
