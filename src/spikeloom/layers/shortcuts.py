"""Residual blocks: three ways of adding a shortcut in a spiking network, and what a shortcut may be.

A block is composed of a `branch` that ends in a convolution, the `spike` unit (norm and neuron) behind it, and a
`shortcut`. With F = BN(branch):

    vanilla    O = SN(F(S) + S)            Spiking ResNet (Zheng et al. 2021)
    SEW        O = g(SN(F(S)), S)          Fang et al. 2021, Sec. 3.3
    membrane   U' = F(SN(U)) + U           MS-ResNet (Hu et al. 2024)
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.layers.norm import NormSpike
from spikeloom.layers.steps import Conv2d, each_step
from spikeloom.registry import Registry

COMBINE: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("combine function")
"""g(A, S) of SEW ResNet, Table 1: A is the residual branch, S the shortcut. IAND is not symmetric."""
COMBINE.register(lambda a, s: a + s, "add")
COMBINE.register(lambda a, s: a * s, "and")
COMBINE.register(lambda a, s: (1 - a) * s, "iand")


class VanillaBlock(nn.Module):
    """`O = SN(F(S) + shortcut(S))`. Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], spikes."""

    def __init__(self, branch: nn.Module, spike: NormSpike, shortcut: nn.Module):
        super().__init__()
        self.branch, self.spike, self.shortcut = branch, spike, shortcut

    def forward(self, s: Tensor) -> Tensor:
        return self.spike(self.branch(s), self.shortcut(s))


class SEWBlock(nn.Module):
    """`O = g(A, shortcut(S))` with `A = SN(F(S))`. Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], integers for ADD."""

    def __init__(self, branch: nn.Module, spike: NormSpike, shortcut: nn.Module, combine: str = "add"):
        super().__init__()
        self.branch, self.spike, self.shortcut = branch, spike, shortcut
        self.combine = COMBINE[combine]

    def forward(self, s: Tensor) -> Tensor:
        return self.combine(self.spike(self.branch(s)), self.shortcut(s))


class MembraneBlock(nn.Module):
    """`U' = F(S) + shortcut(U)`, `S' = SN(U')`: the shortcut carries the membrane input U, the branch its spikes.

    The neuron at the entrance of the next block, `SN(U')`, is computed here, where U' is at hand.

    Shapes: S and U [T, N, C, H, W] -> S' and U' [T, N, C', H', W'].
    """

    def __init__(self, branch: nn.Module, spike: NormSpike, shortcut: nn.Module):
        super().__init__()
        self.branch, self.spike, self.shortcut = branch, spike, shortcut

    def forward(self, s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.spike.with_sum(self.branch(s), self.shortcut(u))


def basic_branch(
    in_channels: int, out_channels: int, stride: int, neuron: Callable[[], nn.Module], bias: bool = False
) -> nn.Sequential:
    """Conv3x3 - BN - SN - Conv3x3: the branch of a basic block, less the norm that follows it."""
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias),
        NormSpike(out_channels, neuron),
        Conv2d(out_channels, out_channels, 3, 1, 1, bias=bias),
    )


class PadShortcut(nn.Module):
    """Every second position, and zero channels on both sides: a shortcut without parameters (He et al. 2016, option A).

    Shapes: [T, N, C, H, W] -> [T, N, C', ceil(H / 2), ceil(W / 2)].
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return each_step(lambda y: F.pad(y[:, :, ::2, ::2], self.padding), x)
