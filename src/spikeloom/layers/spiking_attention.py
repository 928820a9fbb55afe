"""Parts of spiking transformers: self-attention of spikes, the MLP, the stem that makes patches.

Tokens stay on their grid, [T, N, D, H, W]: a linear layer on tokens is a 1x1 convolution, so that every layer is the
unit Conv - NormSpike as in the convolutional networks. Tokens without a grid are a grid of one row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.layers.norm import BatchNorm, NormSpike
from spikeloom.layers.stateless import Conv2d, MaxPool2d, check_axes
from spikeloom.neurons.base import make_neuron
from spikeloom.ops._bf16 import bf16_product

Variant = Literal["ssa", "identity", "relu", "leaky_relu", "softmax", "softmax_float_v"]

# Q and K of the comparison (Spikformer, Table 1) are the norms' outputs; these are applied to both before the product.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


def map_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(Q K^T) V` for tokens in rows, [..., L, d]: 2 L^2 d multiply-accumulates a head."""
    return (q @ k.mT) @ v


def state_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Q (K^T V)` for tokens in rows, [..., L, d]: 2 L d^2 multiply-accumulates a head."""
    return q @ (k.mT @ v)


class AttentionProduct(nn.Module):
    """`Q K^T V s`, head by head and step by step (Spikformer, Eqs. 7-9), or a map of the paper's Table 1 times V.

    Of spikes both orders of the products give the same integers, to the bit below 2^24 in float32: the cheaper one is
    taken. `softmax` is `softmax(Q K^T / sqrt(d)) V` and has no s.

    Args:
        heads: H; channels are split evenly, d = D / H.
        scale: s.
        learnable_scale: s is a parameter that starts there.
        variant: "ssa" for spikes.
        token_pool: the maximum of every so many tokens in Q and K replaces them (Spikformer, Appendix D.1).

    Shapes: q, k, v [T, N, D, H, W] -> [T, N, D, H, W].
    """

    def __init__(
        self,
        heads: int,
        scale: float = 0.125,
        learnable_scale: bool = False,
        variant: Variant = "ssa",
        token_pool: int = 1,
    ):
        super().__init__()
        self.heads, self.variant, self.token_pool = heads, variant, token_pool
        self.scale: nn.Parameter | float = nn.Parameter(torch.tensor(scale)) if learnable_scale else scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        check_axes(self, q, 5)
        side = q.shape[-2:]
        # Tokens in rows, the order of channels-last memory: it goes in and, as the gradients, comes out again.
        q, k, v = (
            x.flatten(3).mT.unflatten(-1, (self.heads, -1)).transpose(2, 3).contiguous() for x in (q, k, v)
        )  # [T, N, heads, L, d]
        if self.token_pool > 1:
            q, k = self._pooled(q), self._pooled(k)
        tokens, d = q.shape[-2:]
        if self.variant == "ssa":
            y = bf16_product(state_first if tokens > d else map_first, q, k, v) * self.scale
        elif self.variant.startswith("softmax"):
            y = bf16_product(lambda q, k, v: (q @ k.mT / d**0.5).softmax(-1) @ v, q, k, v)
        else:
            activation = ACTIVATIONS[self.variant]
            y = bf16_product(map_first, activation(q), activation(k), v) * self.scale
        return y.transpose(2, 3).flatten(3).mT.unflatten(-1, side)

    def _pooled(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.token_pool:
            raise ValueError(f"token_pool must divide the number of tokens, got {self.token_pool} and {x.shape[-2]}")
        groups = x.unflatten(-2, (-1, self.token_pool))
        return groups.max(-2, keepdim=True).values.expand_as(groups).flatten(-3, -2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale}, variant={self.variant}, token_pool={self.token_pool}"


class SpikingSelfAttention(nn.Module):
    """`Linear(SN(Q K^T V s))` with `Q, K, V = SN(BN(X W))` (Spikformer, Eqs. 6-10), less the norm that follows it.

    Args:
        channels: D, a multiple of `heads`.
        heads: H.
        neuron: makes the neurons. One that takes `v_threshold` is given the argument below for the neuron behind the
            product.
        scale, learnable_scale, variant, token_pool: as `AttentionProduct`. Variants other than "ssa" have no neuron
            behind Q and K, and "softmax_float_v" has none behind V.
        qkv_bias: the biases that only the released CIFAR code has.
        v_threshold: of the neuron behind the product.

    Shapes: spikes, or what a block adds up, [T, N, D, H, W] -> [T, N, D, H, W].

    Raises:
        ValueError: channels are no multiple of heads.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        neuron: Callable[[], nn.Module],
        scale: float = 0.125,
        learnable_scale: bool = False,
        variant: Variant = "ssa",
        token_pool: int = 1,
        qkv_bias: bool = False,
        v_threshold: float = 0.5,
    ):
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")

        def linear() -> Conv2d:
            return Conv2d(channels, channels, 1, bias=qkv_bias)

        def unit(spiking: bool) -> nn.Module:
            return NormSpike(channels, neuron) if spiking else BatchNorm(channels)

        self.q, self.q_spike = linear(), unit(variant == "ssa")
        self.k, self.k_spike = linear(), unit(variant == "ssa")
        self.v, self.v_spike = linear(), unit(variant != "softmax_float_v")
        self.product = AttentionProduct(heads, scale, learnable_scale, variant, token_pool)
        self.spike = make_neuron(_with_threshold(neuron, v_threshold), channels)
        self.projection = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_spike(self.q(x)), self.k_spike(self.k(x)), self.v_spike(self.v(x))
        return self.projection(self.spike(self.product(q, k, v)))


def _with_threshold(neuron: Callable[..., nn.Module], v_threshold: float) -> Callable[..., nn.Module]:
    # Neurons without one threshold (PSN, MLF), and factories that fix theirs, stay as they are.
    parameter = inspect.signature(neuron).parameters.get("v_threshold")
    if parameter is None or not isinstance(parameter.default, float):
        return neuron
    return functools.partial(neuron, v_threshold=v_threshold)


def mlp_branch(channels: int, neuron: Callable[[], nn.Module], ratio: int = 4) -> nn.Sequential:
    """Linear - BN - SN - Linear: the MLP of a block, less the norm that follows it.

    Shapes: [T, N, channels, H, W] -> [T, N, channels, H, W].
    """
    hidden = channels * ratio
    return nn.Sequential(Conv2d(channels, hidden, 1), NormSpike(hidden, neuron), Conv2d(hidden, channels, 1))


def patch_units(
    in_channels: int,
    channels: int,
    pools: Sequence[bool],
    neuron: Callable[[], nn.Module],
    pool_first: bool = False,
) -> list[nn.Module]:
    """Conv3x3 - BN - SN [- max pool] with D/8, D/4, D/2, D channels (Spikformer, Eq. 5): an image to a grid of patches.

    Args:
        in_channels: of the image.
        channels: D.
        pools: which of the four units pool.
        neuron: makes the neurons.
        pool_first: the pool stands before the neuron, as in SpikingJelly.

    Raises:
        ValueError: channels are no multiple of 8.
    """
    if channels % 8:
        raise ValueError(f"channels must be a multiple of 8, got {channels}")
    units: list[nn.Module] = []
    for width, pool in zip((channels // 8, channels // 4, channels // 2, channels), pools, strict=True):
        units.append(Conv2d(in_channels, width, 3, padding=1, bias=False))
        if pool and pool_first:
            units += [BatchNorm(width), MaxPool2d(3, 2, 1), make_neuron(neuron, width)]
        else:
            units += [NormSpike(width, neuron), *([MaxPool2d(3, 2, 1)] if pool else [])]
        in_channels = width
    return units
