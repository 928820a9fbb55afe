"""Residual blocks: three ways of adding a shortcut in a spiking network, and what a shortcut may be.

A block is composed of a `branch` that ends in a convolution, the `spike` unit (norm and neuron) behind it, and a
`shortcut`. With F = BN(branch):

    plain      O = SN(F(S))
    vanilla    O = SN(F(S) + S)            Spiking ResNet (Zheng et al. 2021)
    SEW        O = g(SN(F(S)), S)          Fang et al. 2021, Sec. 3.3
    membrane   U' = F(SN(U)) + U           MS-ResNet (Hu et al. 2024)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers.norm import BatchNorm, NormSpike
from spikeloom.layers.stateless import AvgPool2d, Conv2d, check_axes, each_step, has_hooks
from spikeloom.neurons.lif import LIFBase
from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import eager
from spikeloom.ops._layout import NATIVE_DTYPES
from spikeloom.ops.subsample import subsample
from spikeloom.registry import Registry

COMBINE: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("combine function")
"""g(A, S) of SEW ResNet, Table 1: A is the residual branch, S the shortcut. IAND is not symmetric."""


# Functions with names: a block that holds one can be pickled.
@COMBINE.named("add")
def combine_add(a: Tensor, s: Tensor) -> Tensor:
    """`A + S`."""
    return a + s


@COMBINE.named("and")
def combine_and(a: Tensor, s: Tensor) -> Tensor:
    """`A S`."""
    return a * s


@COMBINE.named("iand")
def combine_iand(a: Tensor, s: Tensor) -> Tensor:
    """`(1 - A) S`."""
    return (1 - a) * s


@COMBINE.named("or")
def combine_or(a: Tensor, s: Tensor) -> Tensor:
    """`A + S - A S`."""
    return a + s - a * s


def fork(branch: nn.Module, s: Tensor) -> tuple[Tensor, Tensor]:
    """`branch(s)`, and s for the shortcut beside it (`Conv2d.through`)."""
    if (
        not isinstance(branch, nn.Sequential)
        or has_hooks(branch)
        or not isinstance(first := next(iter(branch), None), Conv2d)
    ):
        return branch(s), s
    y, s = first.through(s)
    for module in itertools.islice(branch, 1, None):
        y = module(y)
    return y, s


class PlainBlock(nn.Module):
    """`O = SN(F(S))`, no shortcut. Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], spikes."""

    def __init__(self, branch: nn.Module, spike: NormSpike):
        super().__init__()
        self.branch, self.spike = branch, spike

    def forward(self, s: Tensor) -> Tensor:
        return self.spike(self.branch(s))


class VanillaBlock(nn.Module):
    """`O = SN(F(S) + shortcut(S))`. Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], spikes."""

    def __init__(self, branch: nn.Module, spike: NormSpike, shortcut: nn.Module):
        super().__init__()
        self.branch, self.spike, self.shortcut = branch, spike, shortcut

    def forward(self, s: Tensor) -> Tensor:
        y, s = fork(self.branch, s)
        return self.spike(y, self.shortcut(s))


class SEWBlock(nn.Module):
    """`O = g(A, shortcut(S))` with `A = SN(F(S))`. Shapes: [T, N, C, H, W] -> [T, N, C', H', W'], integers for ADD."""

    def __init__(self, branch: nn.Module, spike: NormSpike, shortcut: nn.Module, combine: str = "add"):
        super().__init__()
        self.branch, self.spike, self.shortcut = branch, spike, shortcut
        self.combine = COMBINE[combine]

    def forward(self, s: Tensor) -> Tensor:
        y, s = fork(self.branch, s)
        # One pass, but not where somebody notes in which order the neurons of branch and shortcut run.
        if self.combine is combine_add and not has_hooks(*self.spike.modules()):
            return self.spike(y, add=self.shortcut(s))
        return self.combine(self.spike(y), self.shortcut(s))


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


Block = PlainBlock | VanillaBlock | SEWBlock | MembraneBlock
"""A residual block of any kind."""


@torch.no_grad()
def start_as_identity(block: Block) -> None:
    """Sets the last norm so that F gives nothing: SEW and membrane blocks of unchanged shape are then the identity.

    The weight becomes 0, and so does the bias, but for AND: there the bias makes every neuron fire at every step
    (the threshold over the gain of the neuron's input, hence 1 for IF).
    """
    norm, neuron = block.spike.norm, block.spike.neuron
    assert isinstance(norm, BatchNorm)
    bias: float | Tensor = 0.0
    if isinstance(block, SEWBlock) and block.combine is combine_and:
        if not isinstance(neuron, LIFBase) or isinstance(neuron.v_threshold, tuple):
            raise UsageError(
                f"zero_init with combine 'and' needs a neuron with one fixed threshold, got {type(neuron).__name__}: "
                "set zero_init to false"
            )
        bias = neuron.v_threshold / neuron.charge()[1]
    nn.init.zeros_(norm.weight)
    norm.bias.copy_(torch.as_tensor(bias))


def basic_branch(
    in_channels: int,
    out_channels: int,
    stride: int,
    neuron: Callable[[], nn.Module],
    bias: bool = False,
    norm: Callable[[int], nn.Module] = BatchNorm,
) -> nn.Sequential:
    """Conv3x3 - BN - SN - Conv3x3: the branch of a basic block, less the norm that follows it.

    Shapes: [T, N, in_channels, H, W] -> [T, N, out_channels, H / stride, W / stride], rounded up.
    """
    return nn.Sequential(
        Conv2d(in_channels, out_channels, 3, stride, 1, bias=bias),
        NormSpike(out_channels, neuron, norm),
        Conv2d(out_channels, out_channels, 3, 1, 1, bias=bias),
    )


def bottleneck_branch(
    in_channels: int, out_channels: int, stride: int, neuron: Callable[[], nn.Module]
) -> nn.Sequential:
    """Conv1x1 to a quarter of `out_channels` - BN - SN - Conv3x3 - BN - SN - Conv1x1, less the norm that follows it.

    Shapes: [T, N, in_channels, H, W] -> [T, N, out_channels, H / stride, W / stride], rounded up.
    """
    width = out_channels // 4
    return nn.Sequential(
        Conv2d(in_channels, width, 1, bias=False),
        NormSpike(width, neuron),
        Conv2d(width, width, 3, stride, 1, bias=False),
        NormSpike(width, neuron),
        Conv2d(width, out_channels, 1, bias=False),
    )


def conv_shortcut(
    in_channels: int,
    out_channels: int,
    stride: int,
    neuron: Callable[[], nn.Module] | None = None,
    norm: Callable[[int], nn.Module] = BatchNorm,
    pool: bool = False,
) -> nn.Module:
    """What carries S over a block: itself where the shape stays, else Conv1x1 - BN, with a neuron Conv1x1 - BN - SN.

    Args:
        in_channels, out_channels, stride: of the block.
        neuron: makes the neuron of the shortcut; None for a shortcut that ends in its norm.
        norm: makes the norm from the channels.
        pool: an average pool before the convolution strides, not the convolution (MS-ResNet-104).

    Shapes: [T, N, in_channels, H, W] -> [T, N, out_channels, H / stride, W / stride], rounded up.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    end = norm(out_channels) if neuron is None else NormSpike(out_channels, neuron, norm)
    if pool and stride > 1:
        # At odd sizes a pool over what is there gives the size that a strided convolution has.
        return nn.Sequential(
            AvgPool2d(stride, ceil_mode=True, count_include_pad=False),
            Conv2d(in_channels, out_channels, 1, bias=False),
            end,
        )
    return nn.Sequential(Conv2d(in_channels, out_channels, 1, stride, bias=False), end)


def residual_stages(
    make: Callable[[int, int, int], nn.Module], in_channels: int, stages: Iterable[tuple[int, int, int]]
) -> nn.ModuleList:
    """The blocks of a residual network in their order.

    Args:
        make: a block from its input channels, output channels and stride.
        in_channels: of the first block.
        stages: output channels, number of blocks and stride of the first block of each stage.
    """
    blocks = nn.ModuleList()
    for channels, count, first_stride in stages:
        for stride in (first_stride, *(1,) * (count - 1)):
            blocks.append(make(in_channels, channels, stride))
            in_channels = channels
    return blocks


class PadShortcut(nn.Module):
    """Every second position, and zero channels on both sides: a shortcut without parameters (He et al. 2016, option A).

    Shapes: [T, N, C, H, W] -> [T, N, C', ceil(H / 2), ceil(W / 2)].
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return each_step(self._step, check_axes(self, x, 5))

    def _step(self, x: Tensor) -> Tensor:
        if eager(x) and _dispatch.choose("subsample", x, NATIVE_DTYPES) == "native":
            return subsample(x, *self.padding)
        # A pool over one position takes every second one and, unlike a slice, keeps channels-last gradients so.
        return F.pad(F.avg_pool2d(x, 1, 2), (0, 0, 0, 0, *self.padding))
