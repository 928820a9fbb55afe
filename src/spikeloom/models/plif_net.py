"""The convolutional networks of PLIF (Fang et al. 2021, table of networks), in which ParaLIF stands too."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.checks import count, frames
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import Conv2d, Dropout, Flatten, Linear, MaxPool2d, NormSpike, channels_last
from spikeloom.models.registry import MODELS
from spikeloom.neurons import PLIF, make_neuron

VOTES = 10  # neurons of a class


class PLIFNet(nn.Module):
    """Convolutions, each with its norm, neurons and a maximum pool, then two spiking linear layers; neurons vote.

        {c128k3s1 - BN - PLIF - MPk2s2} x convs - DP - FC hidden - PLIF - DP - FC (10 classes) - PLIF - APk10s10

    Shapes: [N, C, H, W] or [T, N, C, H, W] -> [T, N, num_classes], the share of a class's ten neurons that fire.
    """

    dims = 4  # axes of a batch; one more is a sequence
    votes: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        convs: int,
        channels: int,
        hidden: int,
        image_size: int,
        dropout: float,
    ):
        super().__init__()
        self.T, self.image_size = count("T", T), image_size
        side = image_size >> count("convs", convs)
        if side < 1:
            raise ValueError(f"image_size must be at least {1 << convs} for {convs} pools, got {image_size}")
        self.features = nn.Sequential()
        for _ in range(convs):
            self.features.append(Conv2d(in_channels, channels, 3, padding=1, bias=False))
            self.features.append(NormSpike(channels, neuron))
            self.features.append(MaxPool2d(2))
            in_channels = channels
        self.features.append(Flatten())
        outputs = VOTES * num_classes
        self.head = nn.Sequential(
            *(Dropout(dropout), Linear(channels * side**2, hidden, bias=False), make_neuron(neuron, hidden)),
            *(Dropout(dropout), Linear(hidden, outputs, bias=False), make_neuron(neuron, outputs)),
        )
        # A mean of ten as a product, which every runtime has.
        self.register_buffer("votes", torch.eye(num_classes).repeat_interleave(VOTES, 1) / VOTES, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        frames("image_size", self.image_size, x)
        return F.linear(self.head(self.features(x)), self.votes)


@MODELS.register
def plif_net(
    in_channels: int = 2,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] = PLIF,
    T: int = Frames(20),
    convs: int = 5,
    channels: int = 128,
    hidden: int = 512,
    image_size: int = 128,
    dropout: float = 0.5,
) -> PLIFNet:
    """PLIF Net, for DVS Gesture by default (1.70 M parameters); CIFAR10-DVS has 4 convolutions, N-MNIST 2 and 2,048
    hidden neurons."""
    return PLIFNet(in_channels, num_classes, neuron, T, convs, channels, hidden, image_size, dropout)
