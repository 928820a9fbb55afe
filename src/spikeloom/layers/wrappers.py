"""From layers of `torch.nn` to sequences, and from networks of sequences to images."""

from __future__ import annotations

import re
from collections.abc import Generator

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.documentation import page
from spikeloom.encode import floating, repeat
from spikeloom.layers.stateless import axes_of, check_axes, each_step
from spikeloom.neurons.base import Neuron

# Layers of torch.nn, beside those named ...1d to ...3d, that read the first axis as the batch.
_OF_BATCHES = {"ChannelShuffle", "Flatten", "GroupNorm", "LocalResponseNorm", "Unflatten", "Upsample"}
_OURS = {
    **{name: name for name in ("Conv1d", "Conv2d", "MaxPool2d", "AvgPool1d", "AvgPool2d", "Flatten")},
    "BatchNorm1d": "BatchNorm",
    "BatchNorm2d": "BatchNorm",
}


class PerStep(nn.Module):
    """A layer of `torch.nn`, or several, on every step of a sequence: T and N become one axis.

        PerStep(nn.AdaptiveAvgPool2d(1)), PerStep(nn.GroupNorm(8, 64)), PerStep(nn.LayerNorm(128)),
        PerStep(nn.ConvTranspose2d(64, 32, 2, 2)), PerStep(nn.Conv3d(1, 8, 3)), PerStep(nn.MaxPool1d(2))

    A repeated image is computed once, with one draw of what is random, and repeated again.

    Args:
        module: from a tensor [N, ...] to another. It holds no neurons and no layers of sequences.

    Shapes: [T, N, ...] -> [T, N, ...].

    Raises:
        TypeError: module holds what takes sequences itself.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        for name, part in module.named_modules():
            if isinstance(part, Neuron) or type(part).__module__.startswith("spikeloom.layers."):
                raise TypeError(
                    f"PerStep is for layers of torch.nn, which take [N, ...], but {name or 'this module'} is "
                    f"{type(part).__name__}, which takes sequences [T, N, ...]: leave it outside"
                )
        self.module = module
        self._least, self._most = _axes(module)

    def forward(self, x: Tensor) -> Tensor:
        if not self._least <= axes_of(x) <= self._most:
            # Of a layer without a number of dimensions three axes are the least.
            check_axes(self.module, x, self._most if self._most <= 6 else 3)
        return each_step(self._step, x)

    def _step(self, x: Tensor) -> Tensor:
        y = self.module(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"PerStep takes modules that give one tensor; {type(self.module).__name__} gives {type(y).__name__}"
            )
        return y


def _axes(module: nn.Module) -> tuple[int, int]:
    """The least and the largest number of axes of a sequence, by the first layer that wants a certain one."""
    for part in module.modules():
        if found := _dimensions(part):
            # A norm of one dimension takes features [N, C] as well.
            return 3 + found - isinstance(part, nn.BatchNorm1d), 3 + found
    return 3, 64


def _dimensions(module: nn.Module) -> int:
    """1 to 3 for layers of `torch.nn` whose names end so, and what is made from them; 0 for others."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.nn.") and (found := re.search(r"([123])d$", kind.__name__)):
            return int(found[1])
    return 0


class Repeat(nn.Module):
    """Shows a network of sequences every image T times: [N, ...] -> net([T, N, ...]).

        Repeat(nn.Sequential(layers.Conv2d(3, 8, 3), LIF(), layers.Flatten(), layers.Linear(8 * 30 * 30, 10)), T=4)

    Layers without memory compute a repeated image once.

    Args:
        net: takes sequences.
        T: how often, at least 1.

    Shapes: [N, ...] -> what `net` makes of [T, N, ...].

    Raises:
        ValueError: T below 1.
        TypeError: net is a chain with a layer of `torch.nn` that reads the first axis as the batch.
    """

    def __init__(self, net: nn.Module, T: int):
        super().__init__()
        for name, layer in _chain(net, ""):
            kind = type(layer).__name__
            if _of_batches(layer):
                ours = f"spikeloom.layers.{_OURS[kind]} or " if kind in _OURS else ""
                raise TypeError(
                    f"Repeat gives its network sequences [T, N, ...], but layer {name} is torch.nn.{kind}, which reads "
                    f"the first axis as the batch: use {ours}spikeloom.layers.PerStep(torch.nn.{kind}(...)), "
                    f"see {page('neurons', 'networks-of-your-own')}"
                )
        self.net, self.T = net, count("T", T)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(repeat(floating(x), self.T))

    def extra_repr(self) -> str:
        return f"T={self.T}"


def _chain(net: nn.Module, name: str) -> Generator[tuple[str, nn.Module]]:
    """The layers of a chain, each of which receives what the one before it gives. What other modules do is theirs."""
    if type(net) is not nn.Sequential:
        yield name or "net", net
        return
    for child, part in net.named_children():
        yield from _chain(part, f"{name}.{child}" if name else child)


def _of_batches(layer: nn.Module) -> bool:
    kind = type(layer)
    if not kind.__module__.startswith("torch.nn."):
        return False
    if isinstance(layer, nn.Flatten) and layer.start_dim >= 2:
        return False
    return kind.__name__ in _OF_BATCHES or _dimensions(layer) > 0
