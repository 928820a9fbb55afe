"""SEW ResNet and what it is compared with (Fang et al. 2021, "Deep Residual Learning in Spiking Neural Networks").

    Spiking   O = SN(F(S) + S)                 a shape-changing shortcut is Conv1x1 - BN
    SEW       O = g(A, S), A = SN(F(S))        a shape-changing shortcut is Conv1x1 - BN - SN
    Plain     O = SN(F(S))

ImageNet networks use IF (threshold 1, hard reset, ArcTan of alpha 2, detached reset) at T = 4, networks for event
frames PLIF. `zero_init` starts every block with F = 0, which makes a SEW block the identity (Sec. 3.3); the released
logs have it off for SEW on ImageNet, and on for Spiking ResNet and the networks of DVS Gesture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import (
    AvgPool2d,
    Block,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    NormSpike,
    PlainBlock,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    bottleneck_branch,
    channels_last,
    conv_shortcut,
    residual_stages,
    start_as_identity,
)
from spikeloom.models._ann_weights import PretrainedANN, load_ann
from spikeloom.models._init import kaiming
from spikeloom.models._residual import ResidualNet
from spikeloom.models.registry import MODELS
from spikeloom.neurons import IF, PLIF
from spikeloom.surrogates import FlatATan

Branch = Callable[[int, int, int, Callable[[], nn.Module]], nn.Sequential]
Kind = Literal["sew", "spiking", "plain"]
StemPool = Literal["max", "mean"]


def flat_if() -> IF:
    """Threshold 1/2 and a surrogate whose derivative is 1 for 0 and for 1 (A.5): identity blocks keep the gradient."""
    return IF(v_threshold=0.5, surrogate=FlatATan())


def _blocks(
    kind: Kind,
    branch: Branch,
    neuron: Callable[[], nn.Module],
    combine: str = "add",
    zero_init: bool = False,
    last_neuron: Callable[[], nn.Module] | None = None,
) -> Callable[[int, int, int], Block]:
    def make(in_channels: int, out_channels: int, stride: int) -> Block:
        body = branch(in_channels, out_channels, stride, neuron)
        spike = NormSpike(out_channels, last_neuron or neuron)
        if kind == "sew":
            block = SEWBlock(body, spike, conv_shortcut(in_channels, out_channels, stride, neuron), combine)
        elif kind == "spiking":
            block = VanillaBlock(body, spike, conv_shortcut(in_channels, out_channels, stride))
        else:
            block = PlainBlock(body, spike)
        if zero_init:
            start_as_identity(block)
        return block

    return make


# --- ImageNet (tables 2 and 3) ----------------------------------------------------------------------------------------

LAYOUTS: dict[int, tuple[Branch, int, tuple[int, int, int, int]]] = {
    18: (basic_branch, 1, (2, 2, 2, 2)),
    34: (basic_branch, 1, (3, 4, 6, 3)),
    50: (bottleneck_branch, 4, (3, 4, 6, 3)),
    101: (bottleneck_branch, 4, (3, 4, 23, 3)),
    152: (bottleneck_branch, 4, (3, 8, 36, 3)),
}
"""Branch, its widening, and the blocks of the four stages, by depth."""


def _imagenet(
    depth: int,
    make: Callable[[int, int, int], Block],
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
    pretrained_ann: PretrainedANN,
    stem_pool: StemPool = "max",
) -> ResidualNet:
    _, widening, counts = LAYOUTS[depth]
    widths = [width * widening for width in (64, 128, 256, 512)]
    model = ResidualNet(
        stem=Conv2d(in_channels, 64, 7, 2, 3, bias=False),
        stem_spike=NormSpike(64, neuron),
        stem_pool=MaxPool2d(3, 2, 1) if stem_pool == "max" else AvgPool2d(3, 2, 1),
        blocks=residual_stages(make, 64, zip(widths, counts, (1, 2, 2, 2), strict=True)),
        head=Linear(widths[-1], num_classes),
        T=T,
    )
    kaiming(model, "fan_out", linear=False)
    load_ann(model, pretrained_ann)
    return model


def _register_depth(depth: int) -> None:
    branch = LAYOUTS[depth][0]

    @MODELS.named(f"sew_resnet{depth}")
    def sew_resnet(
        in_channels: int = 3,
        num_classes: int = 1000,
        neuron: Callable[[], nn.Module] = IF,
        T: int = 4,
        combine: str = "add",
        zero_init: bool = False,
        pretrained_ann: PretrainedANN = None,
        stem_pool: StemPool = "max",
    ) -> ResidualNet:
        """SEW ResNet: `combine` is g, "add", "and" or "iand"; `pretrained_ann` as `_ann_weights.load_ann`.

        The paper's stem pools maxima, and blocks take spikes; the stem of the release of PSN pools means (`stem_pool`).
        """
        make = _blocks("sew", branch, neuron, combine, zero_init)
        return _imagenet(depth, make, in_channels, num_classes, neuron, T, pretrained_ann, stem_pool)

    @MODELS.named(f"spiking_resnet{depth}")
    def spiking_resnet(
        in_channels: int = 3,
        num_classes: int = 1000,
        neuron: Callable[[], nn.Module] = IF,
        T: int = 4,
        zero_init: bool = True,
        flat_end: bool = False,
        pretrained_ann: PretrainedANN = None,
    ) -> ResidualNet:
        """Spiking ResNet; `flat_end` gives the last neuron of every block threshold 1/2 and a flat surrogate (A.5)."""
        make = _blocks("spiking", branch, neuron, zero_init=zero_init, last_neuron=flat_if if flat_end else None)
        return _imagenet(depth, make, in_channels, num_classes, neuron, T, pretrained_ann)


for _depth in LAYOUTS:
    _register_depth(_depth)


# --- the same blocks in the 6n + 2 layers for CIFAR, to look at depth on a small machine (figures 5 to 8) -------------


def _cifar(
    n: int,
    make: Callable[[int, int, int], Block],
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
) -> ResidualNet:
    if n < 1:
        raise ValueError(f"n, the blocks of a stage, must be at least 1, got {n}")
    model = ResidualNet(
        stem=Conv2d(in_channels, 16, 3, padding=1, bias=False),
        stem_spike=NormSpike(16, neuron),
        blocks=residual_stages(make, 16, ((16, n, 1), (32, n, 2), (64, n, 2))),
        head=Linear(64, num_classes),
        T=T,
    )
    kaiming(model, "fan_out", linear=False)
    return model


@MODELS.register
def sew_resnet_cifar(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = IF,
    T: int = 4,
    combine: str = "add",
    zero_init: bool = False,
    n: int = 25,
) -> ResidualNet:
    """SEW blocks in 6n + 2 layers, widths 16-32-64: 152 layers with n = 25."""
    make = _blocks("sew", basic_branch, neuron, combine, zero_init)
    return _cifar(n, make, in_channels, num_classes, neuron, T)


@MODELS.register
def spiking_resnet_cifar(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = IF,
    T: int = 4,
    zero_init: bool = True,
    n: int = 25,
) -> ResidualNet:
    """Spiking blocks in 6n + 2 layers, widths 16-32-64: 152 layers with n = 25."""
    make = _blocks("spiking", basic_branch, neuron, zero_init=zero_init)
    return _cifar(n, make, in_channels, num_classes, neuron, T)


# --- event frames (tables 4 to 6) and the probe of surrogates (table 9) -----------------------------------------------


class BlockNet(nn.Module):
    """Up-convolutions, blocks and max pools, then one linear layer on what is left of the map.

    Args:
        layout: a number is a convolution to so many channels with BN and SN, "B" a block, "M" a max pool.
        up_kernel: of the up-convolutions. The paper's text has 3 ("c32k3s1"); its code has 1, and so do the builders
            below, because the published 1.19 M parameters of Wide-7B-Net are those of 1.
        make: a block from input channels, output channels and stride.
        image_size: height and width of the input, at least 2 to the number of pools.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        layout: tuple[int | str, ...],
        up_kernel: int,
        make: Callable[[int, int, int], Block],
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        image_size: int,
    ):
        super().__init__()
        self.T, self.window = count("T", T), 2 ** layout.count("M")
        self.side = image_size // self.window
        if self.side < 1:
            raise ValueError(f"image_size must be at least {self.window}, got {image_size}")
        self.features = nn.Sequential()
        channels = in_channels
        for item in layout:
            if isinstance(item, int):
                self.features.append(Conv2d(channels, item, up_kernel, padding=up_kernel // 2, bias=False))
                self.features.append(NormSpike(item, neuron))
                channels = item
            else:
                self.features.append(MaxPool2d(2) if item == "M" else make(channels, channels, 1))
        self.features.append(Flatten())
        self.head = Linear(channels * self.side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        height, width = x.shape[-2:]
        if height // self.window != self.side or width // self.window != self.side:
            low, high = self.side * self.window, (self.side + 1) * self.window - 1
            raise ValueError(
                f"this network takes images of {low} to {high} pixels a side, got {height}x{width}: set "
                "model.image_size"
            )
        return self.head(self.features(x))


def _seven_blocks(
    kind: Kind,
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
    zero_init: bool,
    up_kernel: int,
    image_size: int,
    combine: str = "add",
) -> BlockNet:
    make = _blocks(kind, basic_branch, neuron, combine, zero_init)
    return BlockNet((32, *("B", "M") * 7), up_kernel, make, in_channels, num_classes, neuron, T, image_size)


@MODELS.register
def sew_7b(
    in_channels: int = 2,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] = PLIF,
    T: int = Frames(16),
    combine: str = "add",
    zero_init: bool = True,
    up_kernel: int = 1,
    image_size: int = 128,
) -> BlockNet:
    """7B-Net for DVS Gesture: seven SEW blocks of 32 channels. `up_kernel`: as `BlockNet`."""
    return _seven_blocks("sew", in_channels, num_classes, neuron, T, zero_init, up_kernel, image_size, combine)


@MODELS.register
def spiking_7b(
    in_channels: int = 2,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] = PLIF,
    T: int = Frames(16),
    zero_init: bool = True,
    up_kernel: int = 1,
    image_size: int = 128,
) -> BlockNet:
    """7B-Net with Spiking blocks. Options: `sew_7b`."""
    return _seven_blocks("spiking", in_channels, num_classes, neuron, T, zero_init, up_kernel, image_size)


@MODELS.register
def plain_7b(
    in_channels: int = 2,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] = PLIF,
    T: int = Frames(16),
    up_kernel: int = 1,
    image_size: int = 128,
) -> BlockNet:
    """7B-Net without shortcuts. Options: `sew_7b`."""
    return _seven_blocks("plain", in_channels, num_classes, neuron, T, False, up_kernel, image_size)


@MODELS.register
def sew_wide_7b(
    in_channels: int = 2,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = PLIF,
    T: int = Frames(16),
    combine: str = "add",
    zero_init: bool = True,
    up_kernel: int = 1,
    image_size: int = 128,
) -> BlockNet:
    """Wide-7B-Net for CIFAR10-DVS: four SEW blocks of 64 channels, three of 128. Options: `sew_7b`."""
    layout = (64, *("B", "M") * 4, 128, *("B", "M") * 3)
    make = _blocks("sew", basic_branch, neuron, combine, zero_init)
    return BlockNet(layout, up_kernel, make, in_channels, num_classes, neuron, T, image_size)


@MODELS.register
def sew_probe(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = IF,
    T: int = 4,
    combine: str = "add",
    zero_init: bool = False,
    image_size: int = 32,
) -> BlockNet:
    """The CIFAR-10 network on which surrogates are compared (A.5): ten SEW blocks of 32 channels."""
    make = _blocks("sew", basic_branch, neuron, combine, zero_init)
    return BlockNet((32, *("B", "B", "M") * 5), 3, make, in_channels, num_classes, neuron, T, image_size)


@MODELS.register
def spiking_probe(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = IF,
    T: int = 4,
    zero_init: bool = True,
    image_size: int = 32,
) -> BlockNet:
    """The probe network with Spiking blocks."""
    make = _blocks("spiking", basic_branch, neuron, zero_init=zero_init)
    return BlockNet((32, *("B", "B", "M") * 5), 3, make, in_channels, num_classes, neuron, T, image_size)
