"""Spikformer (Zhou et al. 2023, "When Spiking Neural Network Meets Transformer")."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear, NormSpike, SEWBlock, channels_last
from spikeloom.layers.spiking_attention import SpikingSelfAttention, Variant, mlp_branch, patch_units
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF
from spikeloom.surrogates import Sigmoid

# Where the stem's four units pool: patches of 16x16, or of 4x4 on CIFAR.
POOLS = {"imagenet": (True, True, True, True), "cifar": (False, False, True, True), "dvs": (True, True, True, True)}


def transformer_lif(v_threshold: float = 1.0, tau: float = 2.0) -> LIF:
    """The neuron of the three transformers: tau 2, input decayed, hard reset, the sigmoid surrogate with alpha 4."""
    return LIF(tau, v_threshold=v_threshold, surrogate=Sigmoid(4.0))


class Spikformer(nn.Module):
    """A stem, encoder blocks on the grid of tokens, and a classifier of the tokens' mean (Eqs. 1-4).

    Shapes: [N, C, H, W] or [T, N, C, H, W], H and W multiples of the patch -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(self, stem: nn.Module, blocks: Iterable[nn.Module], channels: int, num_classes: int, T: int):
        super().__init__()
        self.T = count("T", T)
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.pool, self.head = GlobalAvgPool(), classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(channels_last(as_sequence(x, self.T, self.dims))))))


def classifier(channels: int, num_classes: int) -> Linear:
    """The last linear layer, drawn as in the released code: truncated normal of deviation 0.02, bias 0."""
    head = Linear(channels, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def encoder_block(channels: int, attention: SpikingSelfAttention, neuron: Callable[[], nn.Module]) -> nn.Sequential:
    """`X' = SSA(X) + X`, `X = MLP(X') + X'` (Eqs. 2 and 3): sums of spikes, integers that grow with the depth."""
    return nn.Sequential(
        SEWBlock(attention, NormSpike(channels, neuron), nn.Identity()),
        SEWBlock(mlp_branch(channels, neuron), NormSpike(channels, neuron), nn.Identity()),
    )


def patch_splitting(
    in_channels: int,
    channels: int,
    pools: tuple[bool, ...],
    neuron: Callable[[], nn.Module],
    pool_first: bool = False,
) -> nn.Sequential:
    """SPS: four units, and a relative position embedding by convolution, `x + SN(BN(Conv3x3(x)))` (Eqs. 1 and 5).

    Arguments as `patch_units`.
    """
    position = SEWBlock(
        Conv2d(channels, channels, 3, padding=1, bias=False), NormSpike(channels, neuron), nn.Identity()
    )
    return nn.Sequential(*patch_units(in_channels, channels, pools, neuron, pool_first), position)


def _register(name: str, layout: str, blocks: int, width: int, split: int) -> None:
    dvs = layout == "dvs"

    def build(
        in_channels: int = 2 if dvs else 3,
        num_classes: int = 1000 if layout == "imagenet" else 10,
        neuron: Callable[[], nn.Module] = transformer_lif,
        T: int = Frames(16) if dvs else 4,
        depth: int = blocks,
        channels: int = width,
        heads: int = split,
        scale: float = 0.25 if dvs else 0.125,
        learnable_scale: bool = False,
        attention: Variant = "ssa",
        token_pool: int = 1,
        qkv_bias: bool = False,
        pool_first: bool = False,
    ) -> Spikformer:
        encoder = [
            encoder_block(
                channels,
                SpikingSelfAttention(channels, heads, neuron, scale, learnable_scale, attention, token_pool, qkv_bias),
                neuron,
            )
            for _ in range(depth)
        ]
        stem = patch_splitting(in_channels, channels, POOLS[layout], neuron, pool_first)
        return Spikformer(stem, encoder, channels, num_classes, T)

    build.__doc__ = f"Spikformer, {blocks} blocks, {width} channels, {split} heads; {layout}'s stem."
    build.__name__ = name
    MODELS.register(build)


_register("spikformer_4_256", "cifar", 4, 256, 8)
_register("spikformer_2_384", "cifar", 2, 384, 12)
_register("spikformer_4_384", "cifar", 4, 384, 12)
_register("spikformer_8_384", "imagenet", 8, 384, 8)
_register("spikformer_6_512", "imagenet", 6, 512, 8)
_register("spikformer_8_512", "imagenet", 8, 512, 8)
_register("spikformer_10_512", "imagenet", 10, 512, 8)
_register("spikformer_8_768", "imagenet", 8, 768, 12)
_register("spikformer_2_256_dvs", "dvs", 2, 256, 16)
