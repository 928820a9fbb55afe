"""Labelled spike trains, whole in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spikeloom.data.base import LabelledDataset


class SpikeDataset(LabelledDataset):
    """Labelled spike trains of one length, whole in memory.

    Args:
        spikes: uint8 [N, T, features], counts.
        labels: int64 [N].
        name, title, classes, all_labels: as `ImageDataset`.

    Attributes:
        in_channels: features.
        input_shape: of one input at one step.
        fill: empty; spike trains have no augmentation that needs it.
    """

    is_sequence = True

    def __init__(
        self,
        spikes: Tensor,
        labels: Tensor,
        *,
        name: str,
        title: str,
        classes: Sequence[str],
        all_labels: Tensor | None = None,
    ):
        self.spikes, self.labels = spikes, labels
        self.all_labels = labels if all_labels is None else all_labels
        self.name, self.title, self.classes = name, title, list(classes)
        self.in_channels = spikes.shape[2]
        self.fill = torch.empty(0)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[features]."""
        return (self.in_channels,)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Trains float32 [B, T, features] and labels int64 [B]."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.spikes[chosen].float(), self.labels[chosen]

    def encode(self, x: Tensor) -> Tensor:
        """[B, T, features] -> [T, B, features]."""
        return x.transpose(0, 1).contiguous()
