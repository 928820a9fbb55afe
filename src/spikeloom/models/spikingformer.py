"""Spikingformer (Zhou et al. 2023): Spikformer with a residual that carries membrane inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import Conv2d, MembraneBlock, NormSpike, channels_last
from spikeloom.layers.spiking_attention import SpikingSelfAttention, mlp_branch, patch_units
from spikeloom.models.registry import MODELS
from spikeloom.models.spikformer import POOLS, classifier, transformer_lif
from spikeloom.neurons import LIF

Head = Literal["AvgPooling-FC", "SN-AvgPooling-FC", "FC-AvgPooling", "SN-FC-AvgPooling"]


def dvs_lif(v_threshold: float = 1.0) -> LIF:
    """The neuron tuned for event data: tau 1.5."""
    return transformer_lif(v_threshold, tau=1.5)


class Spikingformer(nn.Module):
    """Tokenizer, blocks `X' = SSA(SN(X)) + X`, `X = SMLP(SN(X')) + X'`, classifier (Eqs. 5-17).

    Every convolution but the first takes 0 and 1. The tokenizer is a ConvBN and four times ConvBN(MP(SN(.))), with or
    without MP (Eqs. 9 and 10); a neuron that opens a unit stands in the norm's NormSpike before it.

    Args:
        head: where the mean over tokens and a last neuron stand (Eqs. 14-17); the paper's default is the first.

    Shapes: [N, C, H, W] or [T, N, C, H, W], H and W multiples of the patch -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        depth: int,
        channels: int,
        heads: int,
        scale: float,
        head: Head,
        pools: tuple[bool, ...],
    ):
        super().__init__()
        self.T = count("T", T)
        self.pools_first = head.endswith("AvgPooling-FC")
        self.stem = nn.Sequential(
            *patch_units(in_channels, channels, pools, neuron), Conv2d(channels, channels, 3, padding=1, bias=False)
        )
        self.stem_spike = NormSpike(channels, neuron)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            # Without a neuron before the classifier the last sum itself goes on.
            last = nn.Identity if index == depth - 1 and not head.startswith("SN") else neuron
            attention = SpikingSelfAttention(channels, heads, neuron, scale)
            self.blocks.append(MembraneBlock(attention, NormSpike(channels, neuron), nn.Identity()))
            self.blocks.append(MembraneBlock(mlp_branch(channels, neuron), NormSpike(channels, last), nn.Identity()))
        self.head = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        s, u = self.stem_spike.with_sum(self.stem(channels_last(as_sequence(x, self.T, self.dims))))
        for block in self.blocks:
            s, u = block(s, u)
        tokens = s.flatten(3).mT
        return self.head(tokens.mean(2)) if self.pools_first else self.head(tokens).mean(2)


def _register(name: str, layout: str, blocks: int, width: int, split: int) -> None:
    dvs = layout == "dvs"

    def build(
        in_channels: int = 2 if dvs else 3,
        num_classes: int = 1000 if layout == "imagenet" else 10,
        neuron: Callable[[], nn.Module] = dvs_lif if dvs else transformer_lif,
        T: int = Frames(16) if dvs else 4,
        depth: int = blocks,
        channels: int = width,
        heads: int = split,
        scale: float = 0.125,
        head: Head = "AvgPooling-FC",
    ) -> Spikingformer:
        return Spikingformer(in_channels, num_classes, neuron, T, depth, channels, heads, scale, head, POOLS[layout])

    build.__doc__ = f"Spikingformer, {blocks} blocks, {width} channels, {split} heads; {layout}'s tokenizer."
    build.__name__ = name
    MODELS.register(build)


_register("spikingformer_4_256", "cifar", 4, 256, 8)
_register("spikingformer_2_384", "cifar", 2, 384, 12)
_register("spikingformer_4_384", "cifar", 4, 384, 12)
_register("spikingformer_8_384", "imagenet", 8, 384, 8)
_register("spikingformer_8_512", "imagenet", 8, 512, 8)
_register("spikingformer_8_768", "imagenet", 8, 768, 12)
_register("spikingformer_2_256_dvs", "dvs", 2, 256, 16)
