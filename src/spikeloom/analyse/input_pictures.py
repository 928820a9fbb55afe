"""One input of a network as pictures for a page: an image, the frames of a recording, or spikes over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikeloom.analyse.report.raster import encode_png
from spikeloom.data.image_dataset import ImageDataset

_BYTES = 200_000  # of all pictures of an input, in base64
_SIDES = (256, 128, 64, 32)  # of a picture, the first with which they fit


@dataclass(frozen=True)
class InputPictures:
    """What a network was given.

    Attributes:
        kind: "image", seen as a whole at every step; "columns", an image seen column by column; "frames", one picture a
            step; "spikes", one picture with time to the right.
        pngs: base64; more than one of frames alone.
        words: what they are, as alternative text.
        left_out: what is not shown, in words; empty if all is.
    """

    kind: str
    pngs: tuple[str, ...]
    words: str
    left_out: str = ""


def input_pictures(dataset: Any, x: Tensor) -> InputPictures:
    """Pictures of one input of a data set.

    Args:
        dataset: a `LabelledDataset`.
        x: the input, as its `batch` gives it, without the axis of the batch.
    """
    if isinstance(dataset, ImageDataset):
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
        size = f"Picture of {x.shape[2]} x {x.shape[1]} pixels"
        png = encode_png((x * std + mean).clamp(0, 1))
        if dataset.is_sequence:
            return InputPictures(
                "columns", (png,), f"{size}, of which the network sees one column a step, left to right"
            )
        return InputPictures("image", (png,), f"{size}, which the network sees at every step")
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-12)
    if not dataset.is_sequence:
        return InputPictures("image", (encode_png(x),), f"Picture of {x.shape[2]} x {x.shape[1]} pixels")
    if x.dim() < 3:
        x = x.flatten(1)
        words = f"Spikes of {x.shape[1]} channels in {len(x)} steps, time to the right, the first channel at the bottom"
        return InputPictures("spikes", (encode_png(x.T.flip(0)[None]),), words)
    frames = x if x.dim() == 4 else x[:, None]
    if frames.any():  # a pixel that flickers would leave the others dark
        frames = (frames / np.quantile(frames[frames > 0].numpy(), 0.95)).clamp(max=1)
    words = f"Event frames of {frames.shape[3]} x {frames.shape[2]} pixels, one a step"
    if frames.shape[1] == 2:
        words += ", ON events red and OFF events blue"
    return _frames(frames, words)


def _frames(frames: Tensor, words: str) -> InputPictures:
    """Frames [T, C, H, W], smaller and in the end fewer until they fit."""
    pngs: list[str] = []
    for side in _SIDES:
        pngs = [encode_png(frame, side) for frame in frames]
        if sum(map(len, pngs)) <= _BYTES:
            smaller = f"Frames are shown with {side} pixels a side." if side < max(frames.shape[2:]) else ""
            return InputPictures("frames", tuple(pngs), words, smaller)
    fit = max(1, _BYTES * len(pngs) // sum(map(len, pngs)))
    return InputPictures("frames", tuple(pngs[:fit]), words, f"Only the first {fit} of {len(pngs)} frames are shown.")
