"""Networks of the PSU paper: CIFARNet for static images, and a fully connected net for spoken digits (SHD)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence, network_input
from spikeloom.layers import AvgPool2d, Conv2d, GlobalAvgPool, Linear, NormSpike, channels_last
from spikeloom.models.registry import MODELS
from spikeloom.neurons import PSU, make_neuron
from spikeloom.surrogates import ATan


def static_psu() -> PSU:
    """PSU as on CIFAR: tau 2, threshold 0.5, ATan."""
    return PSU(tau=2.0, v_threshold=0.5, surrogate=ATan())


class CIFARNet(nn.Module):
    """Four stages of two 3x3 convolutions of `widths`, average pools between, global pool, linear.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes]; the last layer has no neuron.
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self, widths: tuple[int, ...], in_channels: int, num_classes: int, neuron: Callable[[], nn.Module], T: int
    ):
        super().__init__()
        self.T = count("T", T)
        self.features = nn.Sequential()
        channels = in_channels
        for stage, width in enumerate(widths):
            if stage:
                self.features.append(AvgPool2d(2))
            for _ in range(2):
                self.features.append(Conv2d(channels, width, 3, padding=1, bias=False))
                self.features.append(NormSpike(width, neuron))
                channels = width
        self.pool = GlobalAvgPool()
        self.head = Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(channels_last(as_sequence(x, self.T, self.dims)))))


@MODELS.register
def cifarnet(
    in_channels: int = 3, num_classes: int = 10, neuron: Callable[[], nn.Module] = static_psu, T: int = 4
) -> CIFARNet:
    """CIFARNet, 256-256-512-1024 (VGG-like), 19,489,546 parameters without neurons."""
    return CIFARNet((256, 256, 512, 1024), in_channels, num_classes, neuron, T)


class FullyConnected(nn.Module):
    """Linear layers with neurons between, each of `widths`, and a last linear layer with an optional readout.

    Shapes: [T, N, ...] (or [N, features], one step repeated) -> logits [T, N, num_classes]; a step is flattened.
    """

    dims = 2  # axes of a batch; more are a sequence

    def __init__(
        self,
        widths: tuple[int, ...],
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        readout: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        self.T = count("T", T)
        layers: list[nn.Module] = []
        features = in_channels
        for width in widths:
            layers += [Linear(features, width), make_neuron(neuron, width)]
            features = width
        layers.append(Linear(features, num_classes))
        if readout is not None:
            layers.append(readout())
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = network_input(x)
        # A step of any shape is one row.
        x = x.flatten(2) if x.dim() > self.dims + 1 else as_sequence(x, self.T, self.dims)
        return self.layers(x)


def audio_psu() -> PSU:
    """PSU as on SHD: tau 2, threshold 0.3, ATan."""
    return PSU(tau=2.0, v_threshold=0.3, surrogate=ATan())


@MODELS.register
def shd_net(
    in_channels: int = 700, num_classes: int = 20, neuron: Callable[[], nn.Module] = audio_psu, T: int = Frames(15)
) -> FullyConnected:
    """Linear - unit, three times 128 wide, and Linear: 125,332 parameters on SHD."""
    return FullyConnected((128, 128, 128), in_channels, num_classes, neuron, T)
