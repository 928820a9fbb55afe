"""DS-ResNet with multi-level firing (Feng et al. 2022, MLF), and with spatial attention, TET and SLTT.

    O = SN(F(S)) + S        a shape-changing shortcut is Conv1x1 - tdBN - SN

the SEW ADD block with MLF neurons (three levels, outputs 0 to 3) and norms of standard deviation 0.6, the first
threshold. A later paper adds two modules of spatial attention, and trains with TET and SLTT. Its figure that places
them is lost, and its section 3.4 speaks of every convolution block: `sam` is "stages" (or True), one behind each of the
first two stages, or "blocks", one in every block in front of its last norm, where outputs stay spikes. A module behind
the last stage, where no norm follows, shuts its gate within 20 steps, and training stays at chance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from spikeloom.checks import count
from spikeloom.encode import Frames
from spikeloom.layers import (
    Conv2d,
    Linear,
    NormSpike,
    SEWBlock,
    SpatialAttention,
    TdBN,
    VanillaBlock,
    basic_branch,
    conv_shortcut,
    residual_stages,
)
from spikeloom.models._init import kaiming
from spikeloom.models._residual import ResidualNet
from spikeloom.models.registry import MODELS
from spikeloom.neurons import MLF

Attention = bool | Literal["stages", "blocks"]
"""Where modules of spatial attention stand; True is "stages"."""

# The released code divides by sqrt(var) + eps.
ds_norm = functools.partial(TdBN, v_threshold=0.6, eps_outside=True)


def ds_mlf() -> MLF:
    """Levels at 0.6, 1.6 and 2.6, decay 1/4, a rectangular surrogate of width 1; fires at a level (Eq. 3, u >= V_th).

    The released code fires above it only: `functools.partial(MLF, strict=True)`.
    """
    return MLF()


class InputNorm(TdBN):
    """`ds_norm` whose weight 1 and bias 0 are constants, made where they are used."""

    def __init__(self, channels: int):
        super().__init__(channels, v_threshold=0.6, eps_outside=True)
        del self.weight, self.bias

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return torch.ones_like(self.running_mean)
        if name == "bias":
            return torch.zeros_like(self.running_mean)
        return super().__getattr__(name)


def ds_block(
    in_channels: int,
    out_channels: int,
    stride: int,
    neuron: Callable[[], nn.Module],
    vanilla: bool,
    sam: bool = False,
) -> SEWBlock | VanillaBlock:
    """A DS block, or with `vanilla` one that adds before its last neuron; `sam` refines what enters its last norm."""
    branch = basic_branch(in_channels, out_channels, stride, neuron, norm=ds_norm)
    if sam:
        branch.append(SpatialAttention())
    spike = NormSpike(out_channels, neuron, ds_norm)
    shortcut = conv_shortcut(in_channels, out_channels, stride, None if vanilla else neuron, ds_norm)
    return VanillaBlock(branch, spike, shortcut) if vanilla else SEWBlock(branch, spike, shortcut)


def _network(
    widths: tuple[int, int, int],
    blocks: int,
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
    vanilla: bool,
    sam: Attention,
    normed_input: bool = False,
) -> ResidualNet:
    convolution = Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
    make = functools.partial(ds_block, neuron=neuron, vanilla=vanilla, sam=sam == "blocks")
    stages = residual_stages(make, widths[0], zip(widths, (blocks,) * 3, (1, 2, 2), strict=True))
    if sam in (True, "stages"):
        stages.insert(2 * blocks, SpatialAttention())
        stages.insert(blocks, SpatialAttention())
    model = ResidualNet(
        stem=nn.Sequential(InputNorm(in_channels), convolution) if normed_input else convolution,
        stem_spike=NormSpike(widths[0], neuron, ds_norm),
        blocks=stages,
        head=Linear(widths[-1], num_classes),
        T=T,
    )
    kaiming(model, "fan_in", linear=True)
    return model


def _register_cifar(depth: int) -> None:
    @MODELS.named(f"ds_resnet{depth}")
    def ds_resnet(
        in_channels: int = 3,
        num_classes: int = 10,
        neuron: Callable[[], nn.Module] = ds_mlf,
        T: int = 4,
        vanilla: bool = False,
        sam: Attention = False,
        width: int = 64,
    ) -> ResidualNet:
        """DS-ResNet for CIFAR10: 6n + 2 layers, widths 64-128-256; `sam` adds two modules of spatial attention.

        Args:
            width: channels of the first stage; the second and third have twice and four times as many.
        """
        count("width", width)
        widths = (width, 2 * width, 4 * width)
        return _network(widths, (depth - 2) // 6, in_channels, num_classes, neuron, T, vanilla, sam)


for _depth in (14, 20, 32, 44, 68):
    _register_cifar(_depth)


@MODELS.register
def ds_resnet20_gesture(
    in_channels: int = 2,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] = ds_mlf,
    T: int = Frames(40),
    vanilla: bool = False,
    sam: Attention = False,
) -> ResidualNet:
    """DS-ResNet-20 for DVS Gesture: widths 16-32-64, event counts normalised first."""
    return _network((16, 32, 64), 3, in_channels, num_classes, neuron, T, vanilla, sam, normed_input=True)


@MODELS.register
def ds_resnet14_dvs(
    in_channels: int = 2,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = ds_mlf,
    T: int = Frames(10),
    vanilla: bool = False,
    sam: Attention = False,
) -> ResidualNet:
    """DS-ResNet-14 for CIFAR10-DVS: widths 32-64-128."""
    return _network((32, 64, 128), 2, in_channels, num_classes, neuron, T, vanilla, sam)
