"""Labelled images, whole in memory, read as normalised batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Labelled images of one size, read as float32 (image / 255 - mean) / std.

    A loader is fastest with whole batches: DataLoader(dataset, batch_size=..., collate_fn=collate).

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], an index into `classes` each.
        name: the name in `DATASETS`.
        title: what results are labelled with.
        mean, std: for each channel, on the scale 0 to 1.

    Attributes:
        fill: float32 [C], what black is after normalisation.

    Raises:
        ValueError: shapes or types other than these.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        name: str,
        title: str,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.shape[1] == len(mean) == len(std):
            raise ValueError(
                f"images must be uint8 [N, C, H, W] with C = {len(mean)} means and {len(std)} deviations, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
        self.images, self.labels = images, labels
        self.name, self.title, self.classes = name, title, list(classes)
        self.mean, self.std = tuple(mean), tuple(std)
        self.fill = self._normalised(torch.zeros(1, len(mean), 1, 1, dtype=torch.uint8)).flatten()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, float32 [C, H, W], and its label."""
        image = self.images[index]
        return self._normalised(image[None])[0], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: float32 [B, C, H, W] and int64 [B]. For loaders with `collate`."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self._normalised(self.images[chosen]), self.labels[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        # The operations and their order are torchvision's ToTensor and Normalize: equal to the last bit.
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def collate(batch: Batch) -> Batch:
    """The batch as `ImageDataset.__getitems__` made it: for DataLoader(collate_fn=collate)."""
    return batch
