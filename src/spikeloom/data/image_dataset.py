"""Labelled images, whole in memory, read as normalised batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spikeloom.data.base import LabelledDataset
from spikeloom.data.options import check_integer


class ImageDataset(LabelledDataset):
    """Labelled images of one size, read as float32 (image / 255 - mean) / std.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], an index into `classes` each.
        name: the name in `DATASETS`.
        title: what results are labelled with.
        mean, std: for each channel, on the scale 0 to 1.
        to_sequence: from a batch float32 [B, C, H, W] to a sequence [T, B, ...]; None leaves it to the model to repeat
            the image.
        environments: how many environments of one size the images are from, one after another.
        resize: side to which `encode` enlarges images (bicubic); None leaves them as they are.
        all_labels: where these are a part, the labels of everything that the files hold.

    Attributes:
        in_channels: C.
        input_shape: of one input at one step, as a model sees it.
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
        to_sequence: Callable[[Tensor], Tensor] | None = None,
        environments: int = 1,
        resize: int | None = None,
        all_labels: Tensor | None = None,
    ):
        if images.dtype != torch.uint8 or images.dim() != 4 or not images.shape[1] == len(mean) == len(std):
            raise ValueError(
                f"images must be uint8 [N, C, H, W] with C = {len(mean)} means and {len(std)} deviations, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
        self.images, self.labels = images, labels
        self.all_labels = labels if all_labels is None else all_labels
        self.name, self.title, self.classes = name, title, list(classes)
        self.mean, self.std = tuple(mean), tuple(std)
        self._to_sequence, self.is_sequence = to_sequence, to_sequence is not None
        self.environments = environments
        if resize is not None:
            check_integer("resize", resize, 1, 4096)
        self._resize = resize
        self.in_channels = images.shape[1]
        self.fill = self._normalised(torch.zeros(1, len(mean), 1, 1, dtype=torch.uint8)).flatten()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[C, H, W] of an image, or what its sequence has at each step."""
        encoded = self.encode(torch.zeros(1, *self.images.shape[1:]))
        return tuple(encoded.shape[2 if self.is_sequence else 1 :])

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] as they are or enlarged, or the sequence [T, B, ...] of them."""
        if self._resize is not None:
            x = torch.nn.functional.interpolate(x, (self._resize,) * 2, mode="bicubic", align_corners=False)
        return x if self._to_sequence is None else self._to_sequence(x)

    def environment(self, index: int) -> ImageDataset:
        """The images of one environment, counted from 0."""
        per = len(self) // self.environments
        part = slice(index * per, (index + 1) * per)
        return ImageDataset(
            self.images[part],
            self.labels[part],
            name=self.name,
            title=self.title,
            classes=self.classes,
            mean=self.mean,
            std=self.std,
            to_sequence=self._to_sequence,
        )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, H, W] and labels int64 [B]."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self._normalised(self.images[chosen]), self.labels[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        # The operations and their order are torchvision's ToTensor and Normalize: equal to the last bit.
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)


def columns(x: Tensor) -> Tensor:
    """An image's columns as time, left to right: [N, C, H, W] -> [W, N, C, H] (sequential CIFAR, Fang et al. 2023)."""
    return x.permute(3, 0, 1, 2)
