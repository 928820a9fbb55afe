"""ResNet-19 and VGGSNN, which tdBN (Zheng et al. 2021) and TET (Deng et al. 2022) train: comparators of many tables.

The neuron of the released TET code halves its potential, fires above 1 and differentiates through its reset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from spikeloom.checks import count, frames
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import (
    AvgPool2d,
    BatchNorm,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    NormSpike,
    TdBN,
    VanillaBlock,
    basic_branch,
    channels_last,
    conv_shortcut,
    residual_stages,
)
from spikeloom.layers.norm import add_to_branches
from spikeloom.models._residual import ResidualNet
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF, make_neuron
from spikeloom.surrogates import Triangle


def tet_lif() -> LIF:
    """`U = U[t-1] (1 - S[t-1]) / 2 + X`, fires at U > 1, triangle surrogate of gamma 1."""
    return LIF(tau=2.0, decay_input=False, surrogate=Triangle(gamma=1.0), detach_reset=False, strict=True)


@MODELS.register
def tdbn_resnet19(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = tet_lif,
    T: int = 4,
    norm: Literal["tdbn", "batch"] = "tdbn",
) -> ResidualNet:
    """ResNet-19: widths 128-256-512 behind a stem of 64, two linear layers, vanilla blocks.

    `norm="tdbn"` scales the last norm of a branch, and that of a shortcut, by 1 / sqrt(2), since the two are added;
    `norm="batch"` is what the released TET code runs under the name of tdBN.
    """
    plain: Callable[[int], nn.Module] = TdBN if norm == "tdbn" else BatchNorm
    added = functools.partial(TdBN, alpha=add_to_branches(2)) if norm == "tdbn" else BatchNorm

    def make(channels: int, width: int, stride: int) -> VanillaBlock:
        return VanillaBlock(
            basic_branch(channels, width, stride, neuron, norm=plain),
            NormSpike(width, neuron, added),
            conv_shortcut(channels, width, stride, norm=added),
        )

    return ResidualNet(
        stem=Conv2d(in_channels, 64, 3, padding=1, bias=False),
        stem_spike=NormSpike(64, neuron, plain),
        blocks=residual_stages(make, 64, ((128, 3, 1), (256, 3, 2), (512, 2, 2))),
        head=nn.Sequential(Linear(512, 256), make_neuron(neuron, 256), Linear(256, num_classes)),
        T=T,
    )


class VGGSNN(nn.Module):
    """Eight 3x3 convolutions of widths 64 to 512, an average pool (or a stride) after every second, a linear layer.

    Takes square frames of `image_size`, a multiple of 16.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        image_size: int,
        bias: bool,
        pool: bool,
        dropout: float,
    ):
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {image_size}")
        self.T, self.image_size = count("T", T), image_size
        self.features = nn.Sequential()
        channels = in_channels
        for first, second in ((64, 128), (256, 256), (512, 512), (512, 512)):
            for width, stride in ((first, 1), (second, 1 if pool else 2)):
                self.features.append(Conv2d(channels, width, 3, stride, 1, bias=bias))
                self.features.append(NormSpike(width, neuron))
                channels = width
            if pool:
                self.features.append(AvgPool2d(2))
        self.features.append(Flatten())
        if dropout:
            self.features.append(Dropout(dropout))
        self.head = Linear(channels * (image_size // 16) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        frames("image_size", self.image_size, x)
        return self.head(self.features(x))


@MODELS.register
def vggsnn(
    in_channels: int = 2,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = tet_lif,
    T: int = Frames(10),
    image_size: int = 48,
    bias: bool = True,
    pool: bool = True,
    dropout: float = 0.0,
) -> VGGSNN:
    """VGGSNN for CIFAR10-DVS at 48x48; PSU's form has no bias, PSN's drops a quarter of the features in training,
    another of TET's strides instead of pooling."""
    return VGGSNN(in_channels, num_classes, neuron, T, image_size, bias, pool, dropout)
