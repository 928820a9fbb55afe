"""Which norms can be folded into which layers: by who reads whose output in a run of the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spikeloom.layers import BatchNorm, Conv1d, Conv2d, Linear, TdBN
from spikeloom.layers.stateless import has_hooks

Norm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

# What these compute is known; a class derived from them may compute anything.
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, Conv1d, Conv2d, Linear)
_NORMS = (Norm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward, TdBN.forward)


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer and the norm that alone reads its output.

    Attributes:
        layer_name, norm_names: in the network; a norm may be registered more than once.
        layer_axis: of the channels in the layer's output, from behind.
        axis: of the channels in the norm's input.
    """

    layer: Layer
    norm: Norm
    layer_name: str
    norm_names: tuple[str, ...]
    layer_axis: int
    axis: int


def find_pairs(model: nn.Module, example: Tensor) -> list[Pair]:
    """The pairs that can be folded, in the order in which they run.

    Args:
        model: in eval mode.
        example: its input; the network is run on it once.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = [m for m in names if type(m) in _LAYERS and not has_hooks(m)]
    norms = [m for m in names if isinstance(m, Norm) and type(m).forward in _NORMS and not has_hooks(m)]
    norms = [norm for norm in norms if norm.running_mean is not None and not norm.training]
    if not layers or not norms:
        return []
    watch = _Watch(layers, norms)  # pyright: ignore[reportArgumentType]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), ExitStack() as hooks:
        for module in (*layers, *norms):
            hooks.callback(module.register_forward_pre_hook(watch.begin, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(watch.end).remove)
        with watch:
            output = model(example)
    watch.read(output)
    return [
        Pair(made.layer, norm, names[made.layer][0], tuple(names[norm]), made.axis - made.rank, axis)
        for norm, (made, axis) in watch.norms.items()
        if watch.calls[norm] == watch.calls[made.layer] == 1 and watch.readers[made.layer] == {norm}
    ]


@dataclass(frozen=True)
class _Made:
    """A layer's output, or a copy of it, as it lies in memory; `axis` of its `rank` axes numbers the channels."""

    layer: Any
    axis: int
    rank: int
    channels: int
    stride: int
    offset: int

    def is_axis(self, x: Tensor, axis: int) -> bool:
        """Whether an axis of x, which lies in the same memory, numbers the channels, as no other axis does."""
        if x.shape[axis] != self.channels:
            return False
        place = torch.full((), x.storage_offset() - self.offset)
        for i, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
            steps = torch.arange(size) * stride
            place = place + steps.view(-1, *[1] * (x.dim() - 1 - i))
        # The output is dense: the digit of a place that stands for the channel.
        numbers = torch.arange(self.channels).view(-1, *[1] * (x.dim() - 1 - axis))
        return bool((place // max(self.stride, 1) % self.channels == numbers).all())


class _Watch(TorchDispatchMode):
    """Follows the outputs of layers through one run: a view is the output itself, and so is a copy.

    Attributes:
        calls: how often each layer and norm ran; a layer whose weight something else reads counts as run again.
        norms: by norm, the output that it took, and the axis of its channels.
        readers: by layer, the norms that read its output; None stands for anything else.
    """

    def __init__(self, layers: Sequence[Layer], norms: Sequence[Norm]):
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.norms: dict[Any, tuple[_Made, int]] = {}
        self.readers: dict[nn.Module, set[Any]] = {layer: set() for layer in layers}
        self._made: dict[StorageWeakRef, _Made] = {}
        self._running: list[nn.Module] = []
        self._owners: dict[StorageWeakRef, list[nn.Module]] = {}
        for layer in layers:
            for parameter in layer.parameters():
                self._owners.setdefault(_memory(parameter), []).append(layer)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(module)
        self.calls[module] += 1
        if isinstance(module, Norm):
            x = next(_tensors((args, kwargs)))
            made, axis = self._made.get(_memory(x)), 2 if isinstance(module, BatchNorm) else 1
            if made is not None:
                fits = module.num_features == made.channels and x.dim() > axis and made.is_axis(x, axis)
                self.readers[made.layer].add(module if fits else None)
                self.norms[module] = made, axis

    def end(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._running.pop()
        if isinstance(module, Layer):
            axis = output.dim() - (1 if isinstance(module, nn.Linear) else len(module.kernel_size) + 1)
            self._note(output, module, axis)

    def _note(self, output: Tensor, layer: nn.Module, axis: int) -> None:
        self._made[_memory(output)] = _Made(
            layer, axis, output.dim(), output.shape[axis], output.stride(axis), int(output.storage_offset())
        )

    def read(self, values: Any) -> None:
        """Counts whoever runs now as a reader of some values."""
        reader = self._running[-1] if self._running else None
        for x in _tensors(values):
            memory = _memory(x)
            made, owners = self._made.get(memory), self._owners.get(memory)
            if made is not None and reader is not made.layer and not isinstance(reader, Norm):
                self.readers[made.layer].add(None)
            if owners is not None and reader not in owners:
                self.calls.update(owners)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            return output
        if func is torch.ops.aten.clone.default and not self._running and (made := self._made.get(_memory(args[0]))):
            axis = next((i for i in range(args[0].dim()) if made.is_axis(args[0], i)), None)
            if axis is not None:
                self._note(output, made.layer, axis)
                return output
        self.read((args, kwargs))
        return output


def _tensors(values: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor) and x.layout == torch.strided)


def _memory(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())
