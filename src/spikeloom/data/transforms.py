"""Random augmentations of whole batches of images, drawn from torch's global random numbers.

A transform takes normalised images x [B, C, H, W] and fill [C], the normalised value of black
(`ImageDataset.fill`), and returns new images of the same shape. Every image gets its own draw. Draws come from the
CPU's generator wherever x lies, so a seed gives the same augmentation on every device; those of timm's transforms come
from `random` and numpy as well.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.data.options import check_integer, check_options
from spikeloom.errors import UsageError
from spikeloom.registry import Registry

Transform = Callable[[Tensor, Tensor], Tensor]
"""An augmentation: images [B, C, H, W] and the value of padding [C] to images."""


@runtime_checkable
class PerImage(Protocol):
    """A transform that depends on which image of the data set it is given, and in which epoch."""

    def at(self, indices: Tensor, epoch: int) -> Transform:
        """The transform of the images number `indices` [B] in an epoch, counted from 0."""
        ...


TRANSFORMS: Registry[Callable[..., Transform]] = Registry("transform")
"""Makers of augmentations, by the names of `train.augment`."""


@TRANSFORMS.named("random_crop")
@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """Pads each side and cuts an image of the old size out at a random place: a translation.

    Equals torchvision's RandomCrop(size, padding, padding_mode) on the raw image followed by normalisation.

    Args:
        padding: pixels on each side, at least 1; an image moves by up to this much along each axis.
        mode: "constant" pads with black, "reflect" with the image mirrored at its border.

    Raises:
        UsageError: padding is not an integer of at least 1.
        ValueError: x is not [B, C, H, W] or fill not [C].
    """

    padding: int
    mode: Literal["constant", "reflect"] = "constant"

    def __post_init__(self):
        check_integer("padding of random_crop", self.padding, 1)

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        if x.dim() != 4 or fill.shape != x.shape[1:2]:
            raise ValueError(f"expected x [B, C, H, W] and fill [C], got {tuple(x.shape)} and {tuple(fill.shape)}")
        batch, _, height, width = x.shape
        p = self.padding
        if self.mode == "reflect":
            if p >= min(height, width):
                raise UsageError(f"padding of random_crop must be below {min(height, width)} to reflect, got {p}")
            padded = F.pad(x, (p, p, p, p), mode="reflect")
        else:
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


@TRANSFORMS.named("alternating_flip")
@dataclass(frozen=True, kw_only=True)
class AlternatingFlip:
    """Mirrors a random half of the images in the first epoch, the other half in the second, and so on in turn.

    Every image is seen both ways in any two epochs (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds").

    Args:
        draws: seeds the choice of the first half.
    """

    draws: int = 0

    def at(self, indices: Tensor, epoch: int) -> Transform:
        # A hash of the index: which half an image belongs to needs neither the data set's size nor a stored draw.
        first = ((indices.to(torch.int64) * 2_654_435_761 + 40_503 * (self.draws + 1)) >> 16) % 2
        flipped = (first + epoch) % 2 == 1
        return lambda x, fill: torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        raise TypeError("alternating_flip needs to know which images it is given: call at(indices, epoch) first")


@TRANSFORMS.named("rand_augment")
@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """timm's RandAugment (Cubuk et al. 2020), on the images as they were before normalisation, rounded to bytes.

    Args:
        config: in timm's words, "rand-m9-n1-mstd0.4-inc1": magnitude 9, one operation, its deviation 0.4, increasing;
            or "original", AutoAugment's policy for ImageNet (Cubuk et al. 2019).
        mean, std: of the normalisation, for each channel.

    Raises:
        UsageError: timm cannot read config.
    """

    config: str = "rand-m9-mstd0.5-inc1"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        self._augment(32)

    def _augment(self, side: int) -> Any:
        from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

        grey = [round(255 * m) for m in self.mean]
        options = {"translate_const": int(side * 0.45), "img_mean": tuple(grey) if len(grey) > 1 else grey[0]}
        try:
            build = rand_augment_transform if self.config.startswith("rand") else auto_augment_transform
            return build(self.config, options)
        except (AssertionError, ValueError) as error:
            raise UsageError(f"config of rand_augment cannot be {self.config!r}: {error}") from None

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        augment = self._augment(min(x.shape[-2:]))
        return _on_bytes(x, self.mean, self.std, lambda image: pil_to_tensor(augment(to_pil_image(image))))


def _on_bytes(x: Tensor, mean: Sequence[float], std: Sequence[float], augment: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies a function of uint8 images [C, H, W] to each image as it was before normalisation."""
    if x.shape[1] != len(mean):
        raise UsageError(f"this transform takes images of {len(mean)} channels, got {tuple(x.shape[1:])}")
    if not len(x):
        return x.clone()
    m, s = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    pixels = ((x.float().cpu() * s + m).clamp(0, 1) * 255).round().to(torch.uint8)
    return ((torch.stack([augment(image) for image in pixels]).float() / 255 - m) / s).to(x)


@TRANSFORMS.named("trivial_augment")
@dataclass(frozen=True, kw_only=True)
class TrivialAugment:
    """torchvision's TrivialAugmentWide (Mueller and Hutter 2021): one operation of random strength for each image.

    Args:
        mean, std: of the normalisation, for each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        from torchvision.transforms import TrivialAugmentWide

        return _on_bytes(x, self.mean, self.std, TrivialAugmentWide())


@TRANSFORMS.named("color_jitter")
@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """torchvision's ColorJitter of each image, before normalisation.

    Args:
        brightness, contrast, saturation: a factor is drawn from 1 - value to 1 + value, but not below 0.
        hue: a shift is drawn from -value to value, at most 0.5; of images in three channels.
        mean, std: of the normalisation, for each channel.

    Raises:
        UsageError: a value outside its limits.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        self._jitter()

    def _jitter(self) -> Callable[[Tensor], Tensor]:
        from torchvision.transforms import ColorJitter as Jitter

        try:
            return Jitter(self.brightness, self.contrast, self.saturation, self.hue)
        except (TypeError, ValueError) as error:
            raise UsageError(f"color_jitter: {error}") from None

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        return _on_bytes(x, self.mean, self.std, self._jitter())


@TRANSFORMS.named("random_affine")
@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """torchvision's RandomAffine of each image: rotation, translation, scale and shear, bilinear, black behind.

    Args:
        degrees: a rotation is drawn from -degrees to degrees.
        translate: a shift is drawn from -value to value, as a part of each side; 0 to 1.
        scale: a factor is drawn between these two, both above 0.
        shear: degrees along x, drawn from -shear to shear.

    Raises:
        UsageError: a value outside its limits.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self):
        if self.degrees < 0 or self.shear < 0 or not 0 <= self.translate <= 1 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(
                "random_affine takes degrees and shear from 0, translate from 0 to 1 and scale as two ascending "
                f"numbers above 0, got {self}"
            )

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import RandomAffine as Reference
        from torchvision.transforms.functional import affine

        ranges = (
            [-self.degrees, self.degrees],
            [self.translate, self.translate] if self.translate else None,
            list(self.scale) if tuple(self.scale) != (1.0, 1.0) else None,
            [-self.shear, self.shear] if self.shear else None,
        )
        height, width = x.shape[-2:]
        drawn: list[Tensor] = []
        for image in x:
            angle, shift, factor, shear = Reference.get_params(*ranges, [width, height])
            bilinear, behind = InterpolationMode.BILINEAR, fill.tolist()
            drawn.append(affine(image.float(), angle, list(shift), factor, list(shear), bilinear, behind))
        return torch.stack(drawn).to(x) if drawn else x.clone()


@TRANSFORMS.named("random_erase")
@dataclass(frozen=True, kw_only=True)
class RandomErase:
    """timm's RandomErasing (Zhong et al. 2020) of normalised images: a rectangle of 2 to 33 % of the area.

    Args:
        p: probability for each image.
        mode: "pixel" for normal noise, "const" for 0.
    """

    p: float = 0.25
    mode: Literal["pixel", "const"] = "pixel"

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.p, mode=self.mode, device="cpu")(x.clone())


@TRANSFORMS.named("event_augment")
@dataclass(frozen=True, kw_only=True)
class EventAugment:
    """One random operation on a clip of event frames, the same for all of them (Spikformer, Spikingformer on DVS sets).

    One of: nothing, shear along x by up to 0.3, shift along x or y by up to 5 pixels, rotation by up to 30 degrees (31
    magnitudes, either sign, nearest neighbour), or an empty square of 0.1 to 11 % of the area. New places are empty.
    """

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        from torchvision.transforms.functional import affine

        y = x.clone()
        height, width = x.shape[-2:]
        for image, operation in zip(y, torch.randint(6, (len(y),)).tolist(), strict=True):
            magnitude = torch.randint(-30, 31, ()).item() / 30
            angle, shift, shear = 0.0, [0, 0], 0.0
            if operation == 1:
                shear = math.degrees(math.atan(0.3 * magnitude))
            elif operation in (2, 3):
                shift[operation - 2] = round(5 * magnitude)
            elif operation == 4:
                angle = 30 * magnitude
            elif operation == 5:
                area = (0.001 + 0.109 * torch.rand(()).item()) * height * width
                side = max(min(round(area**0.5), height, width), 1)
                top, left = (int(torch.randint(n - side + 1, ())) for n in (height, width))
                image[:, top : top + side, left : left + side] = fill.to(image).view(-1, 1, 1)
            if operation in (1, 2, 3, 4):
                image.copy_(affine(image, angle, shift, 1.0, [shear, 0.0], fill=fill.tolist()))
        return y


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


_BY_IMAGE = (RandAugment, TrivialAugment, ColorJitter, RandomAffine, RandomErase, EventAugment)


@dataclass(frozen=True)
class Pipeline:
    """Transforms applied one after another; with none, x itself is returned.

    Clips [B, T, C, H, W] are given to those of images as images of T x C channels: what is drawn for a clip is done to
    all its frames.
    """

    transforms: tuple[Transform, ...]

    def at(self, indices: Tensor, epoch: int) -> Pipeline:
        """The pipeline of the images number `indices` [B] in an epoch."""
        return Pipeline(tuple(t.at(indices, epoch) if isinstance(t, PerImage) else t for t in self.transforms))

    @property
    def by_image(self) -> bool:
        """Whether a transform takes its images one after another, which takes long."""
        return any(isinstance(t, _BY_IMAGE) for t in self.transforms)

    def __call__(self, x: Tensor, fill: Tensor) -> Tensor:
        for transform in self.transforms:
            if x.dim() == 5 and not isinstance(transform, RandomTemporalDelete):
                x = transform(x.flatten(1, 2), fill.repeat(x.shape[1])).unflatten(1, x.shape[1:3])
            else:
                x = transform(x, fill)
        return x


def augmentation(
    spec: Sequence[Mapping[str, Any]], mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> Pipeline:
    """The pipeline a recipe's list describes.

    Args:
        spec: for each transform, in order of application, its name in `TRANSFORMS` and its options:
            [{"name": "random_crop", "padding": 4}, {"name": "random_horizontal_flip"}].
        mean, std: of the data's normalisation, for each channel; transforms that take them are told.

    Raises:
        UsageError: an entry that is no such mapping, an unknown name or option, or a wrong value.
    """
    return Pipeline(tuple(_transform(i, entry, {"mean": mean, "std": std}) for i, entry in enumerate(spec)))


def _transform(i: int, entry: object, normalisation: Mapping[str, Any]) -> Transform:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(name, str):
        raise UsageError(f"transform {i} must be a mapping such as {{name: random_crop, padding: 4}}, got {entry!r}")
    options = {str(key): value for key, value in entry.items() if key != "name"}
    build = TRANSFORMS[name]
    options |= {key: value for key, value in normalisation.items() if key in inspect.signature(build).parameters}
    check_options(f"transform {name!r}", build, options)
    return build(**options)
