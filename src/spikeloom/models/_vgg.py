"""What all VGGs have: convolutions of 3x3 with what follows each, and max pools between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from spikeloom.layers import Conv2d, MaxPool2d

Widths = tuple[int | Literal["M"], ...]
"""Channels of the convolutions, and "M" for a max pool."""

VGG16: Widths = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg_features(widths: Widths, in_channels: int, unit: Callable[[int], nn.Module]) -> tuple[nn.Sequential, int]:
    """The layers before the linear ones, and how many channels they end with.

    Args:
        widths: of the convolutions, with pools between them.
        in_channels: of the input.
        unit: what follows a convolution, from its channels.
    """
    features, channels = nn.Sequential(), in_channels
    for width in widths:
        if width == "M":
            features.append(MaxPool2d(2))
        else:
            features.append(Conv2d(channels, width, 3, padding=1))
            features.append(unit(width))
            channels = width
    return features, channels
