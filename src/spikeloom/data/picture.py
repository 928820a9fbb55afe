"""A sample of a data set as a picture to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.registry import AnyDataset

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 256  # pixels of the shorter side, at least


def draw_sample(dataset: AnyDataset, index: int = 0) -> Image:
    """A sample as a picture, enlarged to at least 256 pixels a side.

    An image is what its file shows. A recording is the sum of its frames: red where brightness fell, blue where it
    rose, black for both. A spike train is a raster: time from left to right, unit 0 at the bottom.
    """
    from PIL import Image

    x, _ = dataset[index]
    if isinstance(dataset, ImageDataset):
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (dataset.mean, dataset.std))
        pixels = _as_rgb(x * std + mean)
    elif x.dim() == 2:  # [T, units]
        pixels = _as_rgb((x.T.flip(0) == 0).float()[None])
    else:
        pixels = _as_rgb(_summed(x))
    height, width = pixels.shape[:2]
    # A raster's two sides have different units; the pixels of other pictures stay square.
    along, across = (max(1, -(-_SIDE // side)) for side in (width, height))
    if x.dim() != 2:
        along = across = min(along, across)
    return Image.fromarray(pixels.numpy()).resize((width * along, height * across), Image.Resampling.NEAREST)


def _summed(frames: Tensor) -> Tensor:
    """Frames [T, C, H, W] as one picture [1 or 3, H, W], from 0 to 1: white without events."""
    counts = frames.sum(0)
    seen = counts[counts > 0]
    # A few pixels that fire all the time would leave the others pale.
    most = seen.quantile(0.95) if len(seen) else torch.ones(())
    shown = (counts / most).clamp(0, 1)
    if len(shown) == 1:
        return 1 - shown
    off, on = shown[0], shown[1]
    return torch.stack([1 - on, 1 - torch.maximum(on, off), 1 - off])


def _as_rgb(picture: Tensor) -> Tensor:
    """Values from 0 to 1 [C, H, W] as uint8 [H, W, 3]; one channel is grey, a second without a third leaves blue 0."""
    if len(picture) == 1:
        picture = picture.expand(3, -1, -1)
    rgb = torch.zeros(3, *picture.shape[1:])
    rgb[: len(picture[:3])] = picture[:3]
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
