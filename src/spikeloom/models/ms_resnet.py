"""MS-ResNet (Hu et al. 2024, "Advancing Spiking Neural Networks toward Deep Residual Learning").

    I' = I + BN2(Conv2(SN(BN1(Conv1(SN(I))))))

The shortcut carries the membrane input I from the stem to the last block; every convolution but the stem receives
spikes, and one more neuron stands before the pooling. The neuron keeps a quarter of its potential, fires above 1/2 and
resets to 0; norms start with weight 1/2, and with 0 at the end of every branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import nn

from spikeloom.layers import (
    Block,
    Conv2d,
    Dropout,
    Linear,
    MembraneBlock,
    NormSpike,
    PlainBlock,
    TdBN,
    VanillaBlock,
    basic_branch,
    conv_shortcut,
    residual_stages,
    start_as_identity,
)
from spikeloom.models._ann_weights import PretrainedANN, load_ann
from spikeloom.models._residual import ResidualNet
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF
from spikeloom.surrogates import Rectangular

Shortcut = Literal["membrane", "without_lif", "vanilla", "plain"]
"""MS; the vanilla block without the neuron behind its addition (and none behind the stem); vanilla; no shortcut."""

norm = functools.partial(TdBN, v_threshold=0.5, form="affine")


def ms_lif() -> LIF:
    """`U = U[t-1] (1 - S[t-1]) / 4 + X`, fires at U > 1/2, rectangular surrogate of width and height 1."""
    return LIF(tau=4 / 3, decay_input=False, v_threshold=0.5, surrogate=Rectangular(width=1.0), strict=True)


def _blocks(
    shortcut: Shortcut, neuron: Callable[[], nn.Module], zero_init: bool, pool: bool
) -> Callable[[int, int, int], Block]:
    def make(in_channels: int, out_channels: int, stride: int) -> Block:
        body = basic_branch(in_channels, out_channels, stride, neuron, norm=norm)
        spike = NormSpike(out_channels, nn.Identity if shortcut == "without_lif" else neuron, norm)
        if shortcut == "plain":
            return PlainBlock(body, spike)
        kind = VanillaBlock if shortcut == "vanilla" else MembraneBlock
        block = kind(body, spike, conv_shortcut(in_channels, out_channels, stride, norm=norm, pool=pool))
        if zero_init:
            start_as_identity(block)
        return block

    return make


def _network(
    stem: nn.Module,
    stages: tuple[tuple[int, int, int], ...],
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
    shortcut: Shortcut,
    zero_init: bool,
    pool: bool = False,
    dropout: float = 0.0,
) -> ResidualNet:
    first, last = stages[0][0], stages[-1][0]
    head: nn.Module = Linear(last, num_classes)
    return ResidualNet(
        stem=stem,
        stem_spike=NormSpike(first, nn.Identity if shortcut == "without_lif" else neuron, norm),
        blocks=residual_stages(_blocks(shortcut, neuron, zero_init, pool), first, stages),
        head=nn.Sequential(Dropout(dropout), head) if dropout else head,
        T=T,
    )


def _wide_stages(counts: tuple[int, int, int, int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((width, count, 2) for width, count in zip((64, 128, 256, 512), counts, strict=True))


def _register_imagenet(depth: int, counts: tuple[int, int, int, int]) -> None:
    @MODELS.named(f"ms_resnet{depth}")
    def ms_resnet(
        in_channels: int = 3,
        num_classes: int = 1000,
        neuron: Callable[[], nn.Module] = ms_lif,
        T: int = 6,
        shortcut: Shortcut = "membrane",
        zero_init: bool = True,
        pretrained_ann: PretrainedANN = None,
    ) -> ResidualNet:
        """MS-ResNet for ImageNet: 7x7 stem without a pool, the first block of every stage strides."""
        stem = Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        model = _network(stem, _wide_stages(counts), num_classes, neuron, T, shortcut, zero_init)
        load_ann(model, pretrained_ann)
        return model


_register_imagenet(18, (2, 2, 2, 2))
_register_imagenet(34, (3, 4, 6, 3))


@MODELS.register
def ms_resnet104(
    in_channels: int = 3,
    num_classes: int = 1000,
    neuron: Callable[[], nn.Module] = ms_lif,
    T: int = 5,
    shortcut: Shortcut = "membrane",
    zero_init: bool = True,
    stem: Literal["7x7", "3x3"] = "7x7",
    counts: tuple[int, int, int, int] = (3, 8, 32, 8),
) -> ResidualNet:
    """104 layers; shortcuts pool before their convolution. The published size has the 7x7 stem, the released code 3x3:
    three convolutions with bias."""
    if stem == "7x7":
        layers: nn.Module = Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    else:
        layers = nn.Sequential(Conv2d(in_channels, 64, 3, 2, 1), Conv2d(64, 64, 3, 1, 1), Conv2d(64, 64, 3, 1, 1))
    return _network(layers, _wide_stages(counts), num_classes, neuron, T, shortcut, zero_init, pool=True, dropout=0.2)


def _register_cifar(n: int) -> None:
    @MODELS.named(f"ms_resnet{6 * n + 2}")
    def ms_resnet(
        in_channels: int = 3,
        num_classes: int = 10,
        neuron: Callable[[], nn.Module] = ms_lif,
        T: int = 6,
        shortcut: Shortcut = "membrane",
        zero_init: bool = True,
        stem_stride: int = 1,
    ) -> ResidualNet:
        """MS-ResNet for CIFAR: 6n + 2 layers, widths 16-32-64; `shortcut` chooses what it is compared with.

        `stem_stride=2` is the down-sampling layer that the paper adds on CIFAR10-DVS; where it stands is not said.
        """
        stem = Conv2d(in_channels, 16, 3, stem_stride, 1, bias=False)
        stages = ((16, n, 1), (32, n, 2), (64, n, 2))
        return _network(stem, stages, num_classes, neuron, T, shortcut, zero_init)


for _n in (2, 3, 5, 7, 9, 18, 80):
    _register_cifar(_n)
