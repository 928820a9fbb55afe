"""SynA-ResNet (Shan et al. 2024, "OR residual connection achieving comparable accuracy to ADD residual connection").

    O = OR(A(S), B(S)),   OR(a, b) = a + b - a b

A is Conv - BN - SN - Conv - BN - MA - SN and B, in the three units that change shape, Conv1x1 - BN - IA - SN. Every
convolution but the stem receives spikes. IA can shut a shortcut for good, which is then pruned without a trace
(`analyse.papers.pruning`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.layers import (
    COMBINE,
    Axis,
    BatchNorm,
    Conv2d,
    Linear,
    MaxPool2d,
    NormSpike,
    SynapticAttention,
    each_step,
    residual_stages,
)
from spikeloom.models._residual import ResidualNet
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF, make_neuron

Layout = Literal["static", "gesture", "cifar10_dvs"]


class SynAUnit(nn.Module):
    """`g(A, B)` of a branch A and a shortcut B, or A alone where there is none: as built, or pruned.

    Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], spikes for OR.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None, combine: str):
        super().__init__()
        self.branch, self.shortcut, self.combine = branch, shortcut, COMBINE[combine]

    def forward(self, s: Tensor) -> Tensor:
        a = self.branch(s)
        return a if self.shortcut is None else self.combine(a, self.shortcut(s))


class ResizeTo(nn.Module):
    """Adaptive average pool of each step: [T, N, C, H, W] -> [T, N, C, size, size]."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return each_step(lambda y: F.adaptive_avg_pool2d(y, self.size), x)


@MODELS.register
def syna_resnet18(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = LIF,
    T: int = 16,
    layout: Layout = "static",
    attention: Axis | None = "time",
    ma: bool = True,
    ia: bool = True,
    combine: str = "or",
) -> ResidualNet:
    """SynA-ResNet of 18 layers.

    Args:
        in_channels, num_classes, neuron: as every model.
        T: repeats of a static image; time attention takes sequences of this length alone.
        layout: the stem and the places of MA. "static" (CIFAR-10, MNIST): behind the second convolution of every unit;
            "gesture": only of the units of the first stage and of those that change shape; "cifar10_dvs": behind the
            first convolution of every unit.
        attention: what MA and IA weigh; None for neither.
        ma, ia: modulation on branches; inhibition on shortcuts.
        combine: g, a name of `layers.COMBINE`.
    """

    def attend(gate: nn.Module, wanted: bool, channels: int, kernel: int = 3) -> list[nn.Module]:
        return [SynapticAttention(attention, gate, T, channels, kernel)] if wanted and attention else []

    def make(channels: int, width: int, stride: int) -> SynAUnit:
        same_shape = stride == 1 and channels == width
        place = 0 if layout == "cifar10_dvs" else 1
        modulated = ma and (layout != "gesture" or width == 64 or not same_shape)
        branch = nn.Sequential()
        for i, (inputs, step) in enumerate(((channels, stride), (width, 1))):
            kernel = 7 if layout == "gesture" and width == 64 else 3
            branch.extend(
                [
                    Conv2d(inputs, width, 3, step, 1, bias=False),
                    BatchNorm(width),
                    *attend(nn.Sigmoid(), modulated and i == place, width, kernel),
                    make_neuron(neuron, width),
                ]
            )
        shortcut = None
        if not same_shape:
            shortcut = nn.Sequential(
                Conv2d(channels, width, 1, stride, bias=False),
                BatchNorm(width),
                *attend(make_neuron(neuron, width), ia, width),
                make_neuron(neuron, width),
            )
        return SynAUnit(branch, shortcut, combine)

    stem: nn.Module = Conv2d(in_channels, 64, 3, padding=1, bias=False)
    if layout == "gesture":
        stem = Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    elif layout == "cifar10_dvs":
        stem = nn.Sequential(ResizeTo(48), Conv2d(in_channels, 64, 3, 2, 1, bias=False))
    return ResidualNet(
        stem=stem,
        stem_spike=NormSpike(64, neuron),
        stem_pool=None if layout == "static" else MaxPool2d(3, 2, 1),
        blocks=residual_stages(make, 64, ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))),
        head=Linear(512, num_classes),
        T=T,
    )
