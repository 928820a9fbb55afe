"""Test images beside the spikes of the first layer of neurons, as the report shows them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from spikeloom.analyse.audit.cost import evaluating
from spikeloom.analyse.load import Target
from spikeloom.analyse.spike_plots import spike_train
from spikeloom.train.pretrain import Reconstructs

_PICTURED = 3  # test images
_NEURONS, _SPIKES = 200, 1500  # of a raster, so that a page stays small


@dataclass(frozen=True)
class Raster:
    """Spikes of the first layer of neurons on one test image.

    Attributes:
        png: the image, base64.
        label, predicted: names of classes; None without classes.
        steps: T.
        layer, neurons: its name, and how many it has.
        shown: how many of them are in `spikes`, drawn from all of the layer.
        spikes: (step, neuron of those shown).
    """

    png: str
    label: str | None
    predicted: str | None
    steps: int
    layer: str
    neurons: int
    shown: int
    spikes: tuple[tuple[int, int], ...]

    def tensor(self) -> Tensor:
        """The spikes as [T, shown]."""
        found = torch.zeros(self.steps, self.shown)
        for step, neuron in self.spikes:
            found[step, neuron] = 1
        return found


@torch.no_grad()
def rasters(target: Target) -> tuple[Raster, ...]:
    x, y = next(target.batches())
    first: dict[int, int] = {}  # images of different classes, as far as there are
    for index, label in enumerate(y.tolist()):
        first.setdefault(label, index)
    chosen = [*first.values(), *(set(range(len(y))) - set(first.values()))][:_PICTURED]
    x = (x[:, chosen] if target.sequence else x[chosen]).contiguous()
    layer, spikes = spike_train(target.model, x)
    classifies = not isinstance(target.model, Reconstructs)
    predicted: list[int] = []
    if classifies:
        with evaluating(target.model):
            logits = target.model(x)
        predicted = (logits.mean(0) if logits.dim() == 3 else logits).argmax(1).tolist()
    found: list[Raster] = []
    for index, label in enumerate(y[chosen].tolist()):
        flat = spikes[:, index].flatten(1)
        shown = spread(flat)
        found.append(
            Raster(
                _png(x[:, index] if target.sequence else x[index], target.sequence),
                target.classes[label] if classifies else None,
                target.classes[predicted[index]] if classifies else None,
                len(flat),
                layer,
                flat.shape[1],
                shown.shape[1],
                tuple(map(tuple, shown.nonzero().tolist())),
            )
        )
    return tuple(found)


def spread(flat: Tensor) -> Tensor:
    """Some neurons of [T, neurons], drawn once for all: fewer of those that fire much."""
    # Every 90th of 20 x 30 x 30 neurons would be the left edge of the image alone.
    order = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0))
    count = min(_NEURONS, flat.shape[1])
    while True:
        shown = flat[:, order[:count].sort().values]
        if count == 1 or shown.count_nonzero() <= _SPIKES:
            return shown
        count = max(1, count // 2)


def _png(x: Tensor, sequence: bool) -> str:
    """An input as a picture: an image, frames added up, or a sequence of vectors with time to the right."""
    if sequence and x.dim() == 4:
        x = x.sum(0)
    elif sequence and x.dim() == 3:
        x = x.permute(1, 2, 0)  # columns of an image, one a step
    elif sequence:
        x = x.flatten(1).T.flip(0)[None]
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-12)
    return encode_png(x)


def encode_png(x: Tensor, side: int = 256) -> str:
    """An image [C, H, W] of values from 0 to 1 as a PNG file in base64, no larger than a side.

    One channel is grey, two are OFF and ON events in blue and red, three are colours; of others the mean is drawn.
    """
    from PIL import Image

    if len(x) == 2:
        x = torch.stack([x[1], torch.zeros_like(x[0]), x[0]])
    elif len(x) != 3:
        x = x.mean(0, keepdim=True).expand(3, -1, -1)
    pixels = (255 * x).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
