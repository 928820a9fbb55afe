"""Random augmentations of whole batches of images, drawn from torch's global random numbers.

A transform takes normalised images x [B, C, H, W] and fill [C], the normalised value of black
(`ImageDataset.fill`), and returns new images of the same shape. Every image gets its own draw. Draws come from the
CPU's generator wherever x lies, so a seed gives the same augmentation on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from spikeloom.data.options import check_integer, check_options
from spikeloom.errors import UsageError
from spikeloom.registry import Registry

Transform = Callable[[Tensor, Tensor], Tensor]

TRANSFORMS: Registry[Callable[..., Transform]] = Registry("transform")


@TRANSFORMS.named("random_crop")
@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Pads each side with black and cuts an image of the old size out at a random place.

    Equals torchvision's RandomCrop(size, padding) on the raw image followed by normalisation.

    Args:
        padding: pixels on each side, at least 1; an image moves by up to this much along each axis.

    Raises:
        UsageError: padding is not an integer of at least 1.
        ValueError: x is not [B, C, H, W] or fill not [C].
    """

    padding: int

    def __post_init__(self):
        check_integer("padding of random_crop", self.padding, 1)

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        if x.dim() != 4 or fill.shape != x.shape[1:2]:
            raise ValueError(f"expected x [B, C, H, W] and fill [C], got {tuple(x.shape)} and {tuple(fill.shape)}")
        batch, _, height, width = x.shape
        p = self.padding
        padded = fill.to(x).view(1, -1, 1, 1).repeat(batch, 1, height + 2 * p, width + 2 * p)
        padded[:, :, p : p + height, p : p + width] = x
        top, left = torch.randint(2 * p + 1, (2, batch)).to(x.device)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, 2p + 1, 2p + 1, H, W]
        return windows[torch.arange(batch, device=x.device), :, top, left]


@TRANSFORMS.named("random_horizontal_flip")
@dataclass(frozen=True, kw_only=True)
class RandomHorizontalFlip:
    """Mirrors each image left to right with probability p.

    Raises:
        UsageError: p is not a number from 0 to 1.
    """

    p: float = 0.5

    def __post_init__(self):
        p = cast(object, self.p)  # from a recipe, where annotations promise nothing
        if not isinstance(p, int | float) or isinstance(p, bool) or not 0 <= p <= 1:
            raise UsageError(f"p of random_horizontal_flip must be a probability from 0 to 1, got {p!r}")

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        flipped = (torch.rand(x.shape[0]) < self.p).to(x.device)
        return torch.where(flipped.view(-1, 1, 1, 1), x.flip(-1), x)


@TRANSFORMS.named("random_temporal_delete")
@dataclass(frozen=True, kw_only=True)
class RandomTemporalDelete:
    """Keeps T_train of the T slices of every sequence, drawn anew for each batch, in order (SEW, A.2).

    All samples of a batch keep the same slices. For training only, as every transform: tests see all T.

    Args:
        T_train: slices kept; all of them where there are no more.

    Shapes: [B, T, ...] -> [B, min(T, T_train), ...].

    Raises:
        UsageError: T_train is not an integer of at least 1, or x is a batch of images: there is no time to delete from.
    """

    T_train: int

    def __post_init__(self):
        check_integer("T_train of random_temporal_delete", self.T_train, 1)

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        if x.dim() == 4:
            raise UsageError(
                "random_temporal_delete takes sequences [B, T, features] or [B, T, C, H, W], got a batch of images "
                f"{tuple(x.shape)}: leave it out of train.augment"
            )
        kept = torch.randperm(x.shape[1])[: self.T_train].sort().values
        return x[:, kept.to(x.device)]


@dataclass(frozen=True)
class Pipeline:
    """Transforms applied one after another; with none, x itself is returned.

    Clips [B, T, C, H, W] are given to those of images as images of T x C channels: what is drawn for a clip is done to
    all its frames.
    """

    transforms: tuple[Transform, ...]

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        for transform in self.transforms:
            if x.dim() == 5 and not isinstance(transform, RandomTemporalDelete):
                x = transform(x.flatten(1, 2), fill.repeat(x.shape[1])).unflatten(1, x.shape[1:3])
            else:
                x = transform(x, fill)
        return x


def augmentation(spec: Sequence[Mapping[str, Any]]) -> Transform:
    """The pipeline a recipe's list describes.

    Args:
        spec: for each transform, in order of application, its name in `TRANSFORMS` and its options:
            [{"name": "random_crop", "padding": 4}, {"name": "random_horizontal_flip"}].

    Raises:
        UsageError: an entry that is no such mapping, an unknown name or option, or a wrong value.
    """
    return Pipeline(tuple(_transform(i, entry) for i, entry in enumerate(spec)))


def _transform(i: int, entry: object) -> Transform:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(name, str):
        raise UsageError(f"transform {i} must be a mapping such as {{name: random_crop, padding: 4}}, got {entry!r}")
    options = {str(key): value for key, value in entry.items() if key != "name"}
    build = TRANSFORMS[name]
    check_options(f"transform {name!r}", build, options)
    return build(**options)
