"""Spikformer V2 (Zhou et al. 2024): a convolutional stem, and an encoder that can be pre-trained masked.

No code was released. The stem is a reconstruction that meets both published parameter counts; where it might have
residual additions is not known, and none are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from spikeloom.layers import Conv2d, NormSpike
from spikeloom.layers.spiking_attention import SpikingSelfAttention
from spikeloom.models.registry import MODELS
from spikeloom.models.spikformer import Spikformer, encoder_block, transformer_lif

Stem = Literal["scs", "strided", "linear", "one_convolution", "three_convolutions"]
"""What follows the strided convolution of a stem's block; "scs" is the paper's choice, the others are its ablation."""


def convolutional_stem(
    in_channels: int,
    widths: tuple[int, ...],
    neuron: Callable[[], nn.Module],
    ratio: int = 4,
    kind: Stem = "scs",
) -> nn.Sequential:
    """SCS: blocks of a 2x2 convolution with stride 2, a 3x3 one to `ratio` times the channels, and a 3x3 one back.

    Of the ablation, `kind="strided"` has the first convolution alone, "linear" 1x1 convolutions for the 3x3 ones,
    "one_convolution" a single 3x3 one that keeps the width, and "three_convolutions" a third, from wide to wide.
    """
    inner: dict[Stem, tuple[int, ...]] = {
        "scs": (ratio, 1),
        "strided": (),
        "linear": (ratio, 1),
        "one_convolution": (1,),
        "three_convolutions": (ratio, ratio, 1),
    }
    side = 1 if kind == "linear" else 3
    blocks: list[nn.Module] = []
    for width in widths:
        block = [Conv2d(in_channels, width, 2, stride=2, bias=False), NormSpike(width, neuron)]
        in_channels = width
        for times in inner[kind]:
            out = times * width
            block += [Conv2d(in_channels, out, side, padding=side // 2, bias=False), NormSpike(out, neuron)]
            in_channels = out
        blocks.append(nn.Sequential(*block))
    return nn.Sequential(*blocks)


def _register(name: str, blocks: int, width: int, split: int, stages: int, classes: int) -> None:
    def build(
        in_channels: int = 3,
        num_classes: int = classes,
        neuron: Callable[[], nn.Module] = transformer_lif,
        T: int = 4,
        depth: int = blocks,
        channels: int = width,
        heads: int = split,
        scale: float = 0.125,
        stem: Stem = "scs",
    ) -> Spikformer:
        if channels % 2 ** (stages - 1):
            raise ValueError(f"channels must be a multiple of {2 ** (stages - 1)}, got {channels}")
        widths = tuple(channels // 2**i for i in reversed(range(stages)))
        encoder = [
            encoder_block(channels, SpikingSelfAttention(channels, heads, neuron, scale), neuron) for _ in range(depth)
        ]
        made = convolutional_stem(in_channels, widths, neuron, kind=stem)
        return Spikformer(made, encoder, channels, num_classes, T)

    build.__doc__ = f"Spikformer V2, {blocks} blocks, {width} channels, {split} heads, square patches of {2**stages}."
    build.__name__ = name
    MODELS.register(build)


_register("spikformer_v2_8_384", 8, 384, 8, 4, 1000)
_register("spikformer_v2_8_512", 8, 512, 8, 4, 1000)
_register("spikformer_v2_16_768", 16, 768, 12, 4, 1000)
# Not of the paper: for images of 28x28 and 32x32, small enough for a CPU.
_register("spikformer_v2_2_64", 2, 64, 4, 2, 10)
