"""A small network of the project's own that learns CIFAR-10 in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import as_sequence
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear, MaxPool2d, NormSpike, channels_last
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF
from spikeloom.surrogates import Triangle


def cifar10_lif() -> LIF:
    """`U = U[t-1] (1 - S[t-1]) / 2 + X`, fires at U >= 1, triangle surrogate of gamma 1."""
    return LIF(tau=2.0, decay_input=False, surrogate=Triangle(gamma=1.0))


class Stage(nn.Module):
    """3x3 convolution, maximum of 2x2, norm, neuron; `deep` adds a convolution with a membrane shortcut around it.

        U1 = BN(max(Conv(S)));  S1 = SN(U1);  U2 = BN(Conv(S1)) + U1;  S2 = SN(U2)

    The maximum before the norm keeps what joins the shortcut on one grid, and every convolution receives spikes.

    Shapes: [T, N, C, H, W] -> [T, N, width, H/2, W/2].
    """

    def __init__(self, channels: int, width: int, neuron: Callable[[], nn.Module], deep: bool):
        super().__init__()
        self.conv = Conv2d(channels, width, 3, padding=1, bias=False)
        self.pool = MaxPool2d(2)
        self.spike = NormSpike(width, neuron)
        self.deep_conv = Conv2d(width, width, 3, padding=1, bias=False) if deep else None
        self.deep_spike = NormSpike(width, neuron) if deep else None

    def forward(self, s: Tensor) -> Tensor:
        x = self.pool(self.conv(s))
        if self.deep_conv is None or self.deep_spike is None:
            return self.spike(x)
        s, u = self.spike.with_sum(x)
        return self.deep_spike(self.deep_conv(s), u)


class Cifar10Net(nn.Module):
    """A stem that encodes the image, four stages, the mean of the last spikes, a linear layer.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes]; H and W multiples of 16.
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self, in_channels: int, num_classes: int, neuron: Callable[[], nn.Module], T: int, widths: tuple[int, ...]
    ):
        super().__init__()
        self.T = count("T", T)
        stem, *rest = widths
        self.stem = Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.stem_spike = NormSpike(stem, neuron)
        self.stages = nn.Sequential()
        for n, (channels, width) in enumerate(zip(widths, rest, strict=False)):
            self.stages.append(Stage(channels, width, neuron, deep=n > 0))
        self.pool = GlobalAvgPool()
        self.head = Linear(rest[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        return self.head(self.pool(self.stages(self.stem_spike(self.stem(x)))))


@MODELS.register
def cifar10_net(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = cifar10_lif,
    T: int = 4,
    widths: tuple[int, int, int, int, int] = (32, 64, 128, 256, 256),
) -> Cifar10Net:
    """The network of `quickstart/cifar10`: eight convolutions, 88 million products a step of a 32x32 image."""
    return Cifar10Net(in_channels, num_classes, neuron, T, widths)
