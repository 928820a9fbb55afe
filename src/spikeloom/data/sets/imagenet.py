"""ImageNet: picture files in folders of classes, decoded when they are read."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.locate import Source, data_root, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.sets.vision import NORMALISATION
from spikeloom.data.subset import chosen
from spikeloom.errors import DataFileError, UsageError

if TYPE_CHECKING:
    from PIL import Image

SOURCE = Source(
    "ImageNet",
    "get ILSVRC2012 from https://www.image-net.org/download.php and sort it into imagenet/train/<class>/ and "
    "imagenet/val/<class>/, as torchvision.datasets.ImageNet does",
    (("imagenet/train/<class>/<picture>", "imagenet/val/<class>/<picture>"),),
    {"train": 1_281_167, "test": 50_000},
    1000,
)


class Pictures:
    """Pictures as uint8 rows [C, size, size]: the shorter side becomes `resize` (bicubic), the middle is cut out.

    C is 3 for RGB, 1 for grey. It has what `ImageDataset` asks of a tensor of images: shape, type and rows.

    With `min_area` a row is drawn anew whenever it is read, from torch's global random numbers: a random rectangle of
    the whole picture, of at least this part of its area, resized (torchvision's RandomResizedCrop).
    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], size: int, resize: int, channels: int = 3, min_area: float | None = None):
        self._paths, self._size, self._resize, self._min_area = list(paths), size, resize, min_area
        self.shape = torch.Size((len(self._paths), channels, size, size))

    def dim(self) -> int:
        return 4

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        if isinstance(index, Tensor):
            return torch.stack([self[i] for i in index.tolist()])
        from PIL import Image, UnidentifiedImageError

        path = self._paths[index]
        try:
            # From memory: from a file, Pillow allocates what a chunk claims. Sizes are compared before pixels
            # are decoded.
            with Image.open(io.BytesIO(path.read_bytes()), formats=("JPEG", "PNG")) as file:
                shorter, longer = sorted(file.size)
                most = Image.MAX_IMAGE_PIXELS or 2**31
                if shorter < 1 or shorter * longer > most or self._resize**2 * longer > most * shorter:
                    raise ValueError(f"{file.width}x{file.height} pixels")
                picture = _of_bytes(file).convert("RGB" if self.shape[1] == 3 else "L")
        except UnidentifiedImageError:
            raise DataFileError(f"{path}: not a whole JPEG or PNG picture: it is neither") from None
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, its own, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataFileError(f"{path}: not a whole JPEG or PNG picture: {reason}") from None
        cut = self._middle(picture) if self._min_area is None else self._random_part(picture, self._min_area)
        return torch.from_numpy(np.array(cut)).view(self._size, self._size, -1).permute(2, 0, 1)

    def _middle(self, picture: Image.Image) -> Image.Image:
        from PIL.Image import Resampling

        factor = self._resize / min(picture.size)
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Resampling.BICUBIC)
        left, top = (picture.width - self._size) // 2, (picture.height - self._size) // 2
        return picture.crop((left, top, left + self._size, top + self._size))

    def _random_part(self, picture: Image.Image, min_area: float) -> Image.Image:
        from torchvision.transforms import RandomResizedCrop

        return RandomResizedCrop(self._size, (min_area, 1.0))(picture)


def _of_bytes(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, which Pillow would clip to white, as one of 8 bits; others as they are."""
    if not picture.mode.startswith("I"):  # I;16, I;16B or I, by Pillow's version
        return picture
    from PIL.Image import fromarray

    return fromarray(((np.asarray(picture, np.int32) + 128) // 257).astype(np.uint8))


def check_min_area(min_area: object) -> None:
    """Checks the least part of a picture's area that is cut out at random.

    Raises:
        UsageError: it is not a number above 0 and at most 1.
    """
    if not isinstance(min_area, int | float) or isinstance(min_area, bool) or not 0 < min_area <= 1:
        raise UsageError(f"min_area must be a number above 0 and at most 1, got {min_area!r}")


def _folders(part: Path) -> list[str]:
    return sorted(path.name for path in part.iterdir() if path.is_dir()) if part.is_dir() else []


@register(SOURCE)
def imagenet(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    subset: int | None = None,
    size: int = 224,
    resize: int | None = None,
    min_area: float | None = None,
) -> ImageDataset:
    """ImageNet-1k, RGB, from root/imagenet/{train,val}/<class>/; the validation part is the test part.

    Args:
        subset: take only n pictures, evenly spread over the classes.
        size: side of the square cut out of the middle.
        resize: what the shorter side becomes before, at least `size` and by default `size` itself.
        min_area: of the training part, instead of the middle: a random rectangle of the whole picture, of at least this
            part of its area and with sides as 3 to 4 at most, resized to `size`. Every reading draws another.
    """
    check_integer("size", size, 1, 4096)
    if resize is not None:
        check_integer("resize", resize, size, why=", size")
    if min_area is not None:
        check_min_area(min_area)
    folder = data_root(root, SOURCE)
    parts = [folder / "imagenet" / name for name in ("train", "val")]
    part, other = parts if split == "train" else reversed(parts)
    classes, others = _folders(part), _folders(other)
    if classes and others and (lonely := sorted({*classes} ^ {*others})):
        raise DataFileError(
            f"{part.parent}: class {lonely[0]} has a folder in one of train/ and val/ alone, {len(lonely)} classes in "
            "all: labels are counted by folders, so both parts must have the same"
        )
    kinds = {".jpeg", ".jpg", ".png"}
    # Names, not paths: of a million pictures these take seconds.
    found = [
        (label, name)
        for label, folder_name in enumerate(classes)
        for name in sorted(os.listdir(part / folder_name))
        if os.path.splitext(name)[1].lower() in kinds
    ]
    if not found:
        raise missing(SOURCE, folder, part / "n01440764")
    title = "ImageNet" if len(found) == SOURCE.published[split] else f"ImageNet folders of {len(found)} pictures"
    which, title = chosen(title, len(found), subset)
    paths = [part / classes[label] / name for label, name in (found[i] for i in which)]
    labels = torch.tensor([label for label, _ in found], dtype=torch.int64)
    return ImageDataset(
        cast("Tensor", Pictures(paths, size, resize or size, min_area=min_area if split == "train" else None)),
        labels[which],
        all_labels=labels,
        name="imagenet",
        title=title,
        classes=classes,
        mean=NORMALISATION["imagenet"][0],
        std=NORMALISATION["imagenet"][1],
    )
