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
from spikeloom.data.locate import data_root, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import DATASETS
from spikeloom.data.sets.vision import NORMALISATION
from spikeloom.data.subset import chosen
from spikeloom.errors import DataFileError, UsageError

if TYPE_CHECKING:
    from PIL import Image

SOURCE = (
    "get ILSVRC2012 from https://www.image-net.org/download.php and sort it into train/<class>/ and val/<class>/, as "
    "torchvision.datasets.ImageNet does"
)
WHOLE = {"train": 1_281_167, "test": 50_000}


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
                picture = file.convert("RGB" if self.shape[1] == 3 else "L")
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


def check_min_area(min_area: object) -> None:
    """Checks the least part of a picture's area that is cut out at random.

    Raises:
        UsageError: it is not a number above 0 and at most 1.
    """
    if not isinstance(min_area, int | float) or isinstance(min_area, bool) or not 0 < min_area <= 1:
        raise UsageError(f"min_area must be a number above 0 and at most 1, got {min_area!r}")


@DATASETS.register
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
    base = data_root(root, "ImageNet", SOURCE) / "imagenet"
    part = base / ("train" if split == "train" else "val")
    classes = sorted(folder.name for folder in part.iterdir() if folder.is_dir()) if part.is_dir() else []
    kinds = {".jpeg", ".jpg", ".png"}
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((part / name).iterdir())
        if path.suffix.lower() in kinds
    ]
    if not found:
        raise missing("ImageNet", base, part / "n01440764", SOURCE)
    title = "ImageNet" if len(found) == WHOLE[split] else f"ImageNet folders of {len(found)} pictures"
    which, title = chosen(title, len(found), subset)
    paths, labels = zip(*(found[i] for i in which), strict=True)
    return ImageDataset(
        cast("Tensor", Pictures(paths, size, resize or size, min_area=min_area if split == "train" else None)),
        torch.tensor(labels, dtype=torch.int64),
        name="imagenet",
        title=title,
        classes=classes,
        mean=NORMALISATION["imagenet"][0],
        std=NORMALISATION["imagenet"][1],
    )
