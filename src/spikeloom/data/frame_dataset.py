"""Labelled recordings as frames, read as batches of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.base import LabelledDataset
from spikeloom.data.cache import Counts
from spikeloom.data.formats.events import Array

Resize = Literal["nearest", "bilinear", "bilinear_corners"]


class FrameDataset(LabelledDataset):
    """Labelled sequences of frames. A batch has as many steps as its longest; shorter ones begin with empty frames.

    Args:
        counts: the frames.
        labels: int64 [N].
        name, title, classes: as `ImageDataset`.
        size, resize: side of the frames as they are read, and how: None leaves them as they are.
        flatten: give a model a frame as one axis; augmentations still see pictures.
        all_labels: as `ImageDataset`.

    Attributes:
        in_channels: channels of a frame, or all its values where `flatten`.
        input_shape: of one input at one step.
        fill: what an empty pixel is, for each channel of a frame: 0.
    """

    is_sequence = True

    def __init__(
        self,
        counts: Counts,
        labels: Tensor,
        *,
        name: str,
        title: str,
        classes: Sequence[str],
        size: int | None = None,
        resize: Resize = "bilinear",
        flatten: bool = False,
        all_labels: Tensor | None = None,
    ):
        self.counts, self.labels = counts, labels
        self.all_labels = labels if all_labels is None else all_labels
        self.name, self.title, self.classes = name, title, list(classes)
        self._size, self._resize, self._flatten = size, resize, flatten
        shape = counts.frames.shape[1:]
        if size is not None:
            shape = (shape[0], size, size)
        self._shape: tuple[int, ...] = (int(np.prod(shape)),) if flatten else tuple(shape)
        self.in_channels = self._shape[0]
        self.fill = torch.zeros(shape[0])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a frame, as a model sees it."""
        return self._shape

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sequences of frames, float32 [B, T, C, H, W] or [B, T, units], and labels int64 [B]."""
        ends, places = self.counts.ends, range(len(self))
        parts = [self.counts.frames[ends[i] : ends[i + 1]] for i in (places[index] for index in indices)]
        steps = max(map(len, parts))
        x = np.zeros((len(parts), steps, *self.counts.frames.shape[1:]), np.float32)
        for row, part in zip(x, parts, strict=True):
            row[steps - len(part) :] = part
        return self._shaped(torch.from_numpy(x)), self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def inputs(self, counts: Array) -> Tensor:
        """What a model takes, [T, 1, *input_shape], of the counts [T, *shape of a frame] of one recording."""
        return self.encode(self._shaped(torch.from_numpy(counts.astype(np.float32))[None]))

    def _shaped(self, x: Tensor) -> Tensor:
        if self._size is not None:
            corners = True if self._resize == "bilinear_corners" else None
            mode = "nearest" if self._resize == "nearest" else "bilinear"
            sides = (self._size, self._size)
            resized = torch.nn.functional.interpolate(x.flatten(0, 1), sides, mode=mode, align_corners=corners)
            x = resized.unflatten(0, x.shape[:2])
        return x

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, C, H, W] or [B, T, units] -> [T, B, *input_shape]."""
        x = x.transpose(0, 1).contiguous()
        return x.flatten(2) if self._flatten else x
