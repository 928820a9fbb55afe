"""ImageNet: picture files in folders of classes, decoded when they are read."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.locate import data_root, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import DATASETS
from spikeloom.data.sets.vision import NORMALISATION
from spikeloom.data.subset import chosen
from spikeloom.errors import DataFileError

SOURCE = (
    "get ILSVRC2012 from https://www.image-net.org/download.php and sort it into train/<class>/ and val/<class>/, as "
    "torchvision.datasets.ImageNet does"
)
WHOLE = {"train": 1_281_167, "test": 50_000}


class Pictures:
    """Pictures as uint8 rows [C, size, size]: the shorter side becomes `resize` (bicubic), the middle is cut out.

    C is 3 for RGB, 1 for grey. It has what `ImageDataset` asks of a tensor of images: shape, type and rows.
    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], size: int, resize: int, channels: int = 3):
        self._paths, self._size, self._resize = list(paths), size, resize
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
        factor = self._resize / min(picture.size)
        picture = picture.resize(
            (round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BICUBIC
        )
        left, top = (picture.width - self._size) // 2, (picture.height - self._size) // 2
        cut = picture.crop((left, top, left + self._size, top + self._size))
        return torch.from_numpy(np.array(cut)).view(self._size, self._size, -1).permute(2, 0, 1)


@DATASETS.register
def imagenet(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    subset: int | None = None,
    size: int = 224,
    resize: int | None = None,
) -> ImageDataset:
    """ImageNet-1k, RGB, from root/imagenet/{train,val}/<class>/; the validation part is the test part.

    Args:
        subset: take only n pictures, evenly spread over the classes.
        size: side of the square cut out of the middle.
        resize: what the shorter side becomes before, at least `size` and by default `size` itself.
    """
    check_integer("size", size, 1, 4096)
    if resize is not None:
        check_integer("resize", resize, size, why=", size")
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
        cast("Tensor", Pictures(paths, size, resize or size)),
        torch.tensor(labels, dtype=torch.int64),
        name="imagenet",
        title=title,
        classes=classes,
        mean=NORMALISATION["imagenet"][0],
        std=NORMALISATION["imagenet"][1],
    )
