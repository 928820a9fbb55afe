"""VGG-11 to VGG-19 of ImageNet with neurons for ReLU, as SpikingJelly builds them (Simonyan and Zisserman 2015).

Convolutions of 3x3 with bias, an average pool to 7x7, three linear layers; no paper on spiking networks trains them.
They are here for weights that were trained elsewhere: `load_spikingjelly`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import as_sequence
from spikeloom.layers import Dropout, Flatten, Linear, NormSpike, channels_last
from spikeloom.layers.stateless import each_step
from spikeloom.models._init import kaiming
from spikeloom.models._vgg import VGG16, Widths, vgg_features
from spikeloom.models.registry import MODELS
from spikeloom.neurons import IF, make_neuron

SIDE = 7  # of the map that the linear layers take

WIDTHS: dict[int, Widths] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: VGG16,
    19: (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}
"""By depth."""


class ImageNetVGG(nn.Module):
    """Convolutions with neurons, max pools, and Linear - SN - Linear - SN - Linear on a map of 7x7.

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
        batch_norm: bool,
        hidden: int,
    ):
        super().__init__()
        self.T = count("T", T)
        self.features, channels = vgg_features(
            widths,
            in_channels,
            lambda width: NormSpike(width, neuron) if batch_norm else make_neuron(neuron, width),
        )
        self.head = nn.Sequential(
            Flatten(),
            Linear(channels * SIDE**2, hidden),
            make_neuron(neuron, hidden),
            Dropout(),
            Linear(hidden, hidden),
            make_neuron(neuron, hidden),
            Dropout(),
            Linear(hidden, num_classes),
        )
        kaiming(self, "fan_out", linear=False)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(as_sequence(x, self.T, self.dims))
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"VGG takes images of at least 32x32, got {x.shape[-2]}x{x.shape[-1]}")
        x = self.features(x)
        if x.shape[-2:] != (SIDE, SIDE):
            x = each_step(functools.partial(F.adaptive_avg_pool2d, output_size=(SIDE, SIDE)), x)
        return self.head(x)


def _register(depth: int) -> None:
    @MODELS.named(f"spiking_vgg{depth}")
    def spiking_vgg(
        in_channels: int = 3,
        num_classes: int = 1000,
        neuron: Callable[[], nn.Module] = IF,
        T: int = 4,
        batch_norm: bool = True,
        hidden: int = 4096,
    ) -> ImageNetVGG:
        """VGG of ImageNet with neurons, as SpikingJelly's; `hidden` is the width of its two linear layers."""
        return ImageNetVGG(WIDTHS[depth], in_channels, num_classes, neuron, T, batch_norm, hidden)


for _depth in WIDTHS:
    _register(_depth)
