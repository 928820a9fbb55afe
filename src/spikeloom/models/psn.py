"""Networks of the PSN paper (Fang et al. 2023, "Parallel Spiking Neurons"): sequential CIFAR, and CIFAR-10."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import AvgPool1d, AvgPool2d, Conv1d, Conv2d, Flatten, Linear, NormSpike, channels_last
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF, PSN, make_neuron


class SequentialNet(nn.Module):
    """Columns of an image, one a step: six 1-D convolutions along the column, two linear layers.

    Shapes: [T, N, C, L] (or [N, C, L], one step repeated) -> logits [T, N, num_classes]; L a multiple of 4.
    """

    dims = 3  # axes of a batch; one more is a sequence

    def __init__(
        self, in_channels: int, num_classes: int, neuron: Callable[[], nn.Module], T: int, channels: int, length: int
    ):
        super().__init__()
        self.T = count("T", T)
        layers: list[nn.Module] = []
        for width in (in_channels, channels, channels):
            layers += [Conv1d(width, channels, 3, padding=1, bias=False), NormSpike(channels, neuron)]
        layers.append(AvgPool1d(2))
        for _ in range(3):
            layers += [Conv1d(channels, channels, 3, padding=1, bias=False), NormSpike(channels, neuron)]
        layers += [AvgPool1d(2), Flatten(dims=2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            Linear(channels * (length // 4), 256), make_neuron(neuron, 256), Linear(256, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(as_sequence(x, self.T, self.dims)))


def soft_lif() -> LIF:
    """The serial baseline on sequential CIFAR: tau 2, soft reset, detached."""
    return LIF(tau=2.0, v_reset=None)


@MODELS.register
def sequential_cifar_net(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] = soft_lif,
    T: int = Frames(32),
    channels: int = 128,
    length: int = 32,
) -> SequentialNet:
    """The sequential CIFAR net: inputs [T = 32, N, 3, 32]; takes any neuron of the paper's table."""
    return SequentialNet(in_channels, num_classes, neuron, T, channels, length)


class StaticNet(nn.Module):
    """Two stages of three 3x3 convolutions, each behind an average pool, then two linear layers.

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> logits [T, N, num_classes]; H = W = `image_size`.
    """

    dims = 4  # axes of a batch; one more is a sequence

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        channels: int,
        image_size: int,
    ):
        super().__init__()
        self.T = count("T", T)
        layers: list[nn.Module] = []
        width = in_channels
        for _ in range(2):
            for _ in range(3):
                layers += [Conv2d(width, channels, 3, padding=1, bias=False), NormSpike(channels, neuron)]
                width = channels
            layers.append(AvgPool2d(2))
        self.features = nn.Sequential(*layers, Flatten())
        self.head = nn.Sequential(
            Linear(channels * (image_size // 4) ** 2, channels * 16),
            make_neuron(neuron, channels * 16),
            Linear(channels * 16, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(channels_last(as_sequence(x, self.T, self.dims))))


@MODELS.register
def psn_cifar_net(
    in_channels: int = 3,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = 4,
    channels: int = 256,
    image_size: int = 32,
) -> StaticNet:
    """The CIFAR-10 net with PSN(T), 70,113,174 parameters at T = 4."""
    return StaticNet(in_channels, num_classes, neuron or functools.partial(PSN, T=T), T, channels, image_size)
