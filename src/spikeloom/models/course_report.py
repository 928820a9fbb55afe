"""The networks of the course report, tables 1 and 2: VGG-16, and ResNet-34 with three shortcuts.

All take a CIFAR-sized image, repeat it T = 6 times, and average the classifier's output over time. The neuron of
the report is LIF without input decay: beta = 0.5, threshold 1, hard reset to 0.

The report averages "the spikes of each class at the output of the last linear layer", which has no neurons. Every
builder here and in `spikeloom.models.ghostnet` averages the linear layer's logits by default, and with
`spiking_output=True` the spikes of neurons behind it. Logits are the default for two reasons: all trained weights and
recorded results have them, and a mean of spikes lies between 0 and 1, so that the cross-entropy of ten classes never
falls below ln(1 + 9 / e) = 1.46.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import as_sequence
from spikeloom.layers import (
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    MembraneBlock,
    NormSpike,
    PadShortcut,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    channels_last,
    residual_stages,
)
from spikeloom.models._init import kaiming
from spikeloom.models._residual import ResidualNet
from spikeloom.models._vgg import VGG16, Widths, vgg_features
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF, make_neuron


def report_lif() -> LIF:
    """The report's neuron: `U = beta U + X`, beta = 1 - 1/tau = 0.5 (Eqs. 1-3)."""
    return LIF(tau=2.0, decay_input=False)


def classifier(head: nn.Module, classes: int, neuron: Callable[[], nn.Module], spiking_output: bool) -> nn.Module:
    """`head`, which ends in a linear layer, and with `spiking_output` neurons behind it.

    Shapes: what `head` takes -> [T, N, classes]: logits, or spikes.
    """
    if not spiking_output:
        return head
    layers = head if isinstance(head, nn.Sequential) else (head,)
    return nn.Sequential(*layers, make_neuron(neuron, classes))


class SpikingVGG(nn.Module):
    """VGG with LIF for ReLU: convolutions of `widths`, "M" a max pool, then Linear - LIF - Linear.

    Shapes: [N, C, H, W] or [T, N, C, H, W], H and W at least 32 -> logits [T, N, num_classes].
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        widths: Widths,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        spiking_output: bool,
    ):
        super().__init__()
        self.T = count("T", T)
        self.features, channels = vgg_features(widths, in_channels, lambda width: NormSpike(width, neuron))
        self.pool = GlobalAvgPool()  # 1x1 maps at 32x32: no change
        head = nn.Sequential(Linear(channels, 128), make_neuron(neuron, 128), Linear(128, num_classes))
        self.head = classifier(head, num_classes, neuron, spiking_output)
        kaiming(self, "fan_in", linear=True)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"VGG takes images of at least 32x32, got {x.shape[-2]}x{x.shape[-1]}")
        return self.head(self.pool(self.features(x)))


@MODELS.register
def report_vgg16(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    spiking_output: bool = False,
    width: int = 64,
) -> SpikingVGG:
    """Spiking VGG-16 (tables 1 and 2).

    Args:
        width: channels of the first two convolutions; the others have up to 8 times as many.
        spiking_output: ends in neurons, whose spikes are averaged: the report's words, and not the default, as the
            module says.
    """
    count("width", width)
    widths: Widths = tuple("M" if channels == "M" else channels * width // 64 for channels in VGG16)
    return SpikingVGG(widths, in_channels, num_classes, neuron, T, spiking_output)


def _resnet34(
    block: Callable[..., nn.Module],
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module],
    T: int,
    block_bias: bool,
    spiking_output: bool,
) -> ResidualNet:
    """The 6n + 2 layers of He et al. (2016), Sec. 4.2, n = 5, made spiking with one of three shortcuts (Eqs. 4-6)."""

    def make(channels: int, width: int, stride: int) -> nn.Module:
        same = stride == 1 and channels == width
        return block(
            basic_branch(channels, width, stride, neuron, bias=block_bias),
            NormSpike(width, neuron),
            nn.Identity() if same else PadShortcut(channels, width),
        )

    model = ResidualNet(
        stem=Conv2d(in_channels, 16, 3, padding=1, bias=False),
        stem_spike=NormSpike(16, neuron),
        blocks=residual_stages(make, 16, ((16, 5, 1), (32, 5, 2), (64, 5, 2))),
        head=classifier(Linear(64, num_classes), num_classes, neuron, spiking_output),
        T=T,
    )
    kaiming(model, "fan_in", linear=True)
    return model


@MODELS.register
def report_vanilla_resnet34(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    block_bias: bool = False,
    spiking_output: bool = False,
) -> ResidualNet:
    """`O = SN(F2(SN(F1(U))) + U)` (Eq. 4). Options: `report_vgg16`; `block_bias`: biases in the blocks."""
    return _resnet34(VanillaBlock, in_channels, num_classes, neuron, T, block_bias, spiking_output)


@MODELS.register
def report_sew_resnet34(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    block_bias: bool = False,
    spiking_output: bool = False,
) -> ResidualNet:
    """`O = SN(F2(SN(F1(U)))) + U` (Eq. 5). Options: `report_vanilla_resnet34`."""
    return _resnet34(SEWBlock, in_channels, num_classes, neuron, T, block_bias, spiking_output)


@MODELS.register
def report_ms_resnet34(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 6,
    block_bias: bool = False,
    spiking_output: bool = False,
) -> ResidualNet:
    """`O = F2(SN(F1(SN(U)))) + U` (Eq. 6), and a last SN before the pooling.

    Options: `report_vanilla_resnet34`.
    """
    return _resnet34(MembraneBlock, in_channels, num_classes, neuron, T, block_bias, spiking_output)


class ColoredMNISTNet(nn.Module):
    """The small convolutional network of the Colored MNIST experiments (table 3).

    Takes square images of `image_size`, at least 16.

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
        spiking_output: bool,
    ):
        super().__init__()
        self.T, self.image_size = count("T", T), image_size
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size must be at least 16, got {image_size}")
        self.features = nn.Sequential(
            Conv2d(in_channels, 20, 5),
            make_neuron(neuron, 20),
            MaxPool2d(2),
            Conv2d(20, 50, 5),
            make_neuron(neuron, 50),
            MaxPool2d(2),
            Flatten(),
        )
        head = nn.Sequential(Linear(50 * side * side, 500), make_neuron(neuron, 500), Linear(500, num_classes))
        self.head = classifier(head, num_classes, neuron, spiking_output)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this network is made for images of {self.image_size}x{self.image_size}, got "
                f"{x.shape[-2]}x{x.shape[-1]}: set model.image_size, or data.size to pad"
            )
        return self.head(self.features(x))


@MODELS.register
def colored_mnist_net(
    in_channels: int = 3,
    num_classes: int = 2,
    neuron: Callable[[], nn.Module] = report_lif,
    T: int = 8,
    image_size: int = 28,
    spiking_output: bool = False,
) -> ColoredMNISTNet:
    """Two 5x5 convolutions with bias, two linear layers; PyTorch's default initialisation, as the code it mirrors.

    `spiking_output`: as `report_vgg16`.
    """
    return ColoredMNISTNet(in_channels, num_classes, neuron, T, image_size, spiking_output)
