"""MNIST's IDX files, checked before torchvision reads them: its reader answers damage with bare assertions."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from spikeloom.errors import DataFileError

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
SIDE, CLASSES = 28, 10


def read(images_path: str | os.PathLike[str], labels_path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28], 0 black to 255 white, and labels int64 [N], 0 to 9.

    Raises:
        DataFileError: a file is truncated, too long, not IDX, of other images than 28x28, or the two do not match.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    images_path, labels_path = Path(images_path), Path(labels_path)
    count = _count(images_path, IMAGES_MAGIC, (SIDE, SIDE))
    labelled = _count(labels_path, LABELS_MAGIC, ())
    if count != labelled:
        raise DataFileError(f"{labels_path}: holds {labelled} labels, but {images_path.name} holds {count} images")
    images, labels = read_image_file(str(images_path)), read_label_file(str(labels_path))
    wrong = torch.nonzero(labels >= CLASSES)
    if len(wrong):
        i = int(wrong[0])
        raise DataFileError(f"{labels_path}: label {i} is {int(labels[i])}, expected 0 to {CLASSES - 1}")
    return images.unsqueeze(1), labels


def _count(path: Path, magic: int, item: tuple[int, ...]) -> int:
    """The number of items, after a check of the header against the kind of file and its length."""
    header = struct.Struct(f">{2 + len(item)}I")
    try:
        with path.open("rb") as file:
            start = file.read(header.size)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from error
    if start.startswith(b"\x1f\x8b"):
        raise DataFileError(f"{path}: is gzip-compressed, expected the uncompressed file; unpack it with gunzip")
    if len(start) < header.size:
        raise DataFileError(f"{path}: holds {size} bytes, too few for an IDX header of {header.size}")
    found, count, *shape = header.unpack(start)
    if found != magic:
        raise DataFileError(f"{path}: begins with the number {found}, expected {magic} (IDX, unsigned bytes)")
    if tuple(shape) != item:
        raise DataFileError(f"{path}: its images are {' x '.join(map(str, shape))}, expected {SIDE} x {SIDE}")
    expected = header.size + count * math.prod(item)
    if count == 0:
        raise DataFileError(f"{path}: holds no items, expected at least one")
    if size != expected:
        kind = "truncated" if size < expected else "too long"
        raise DataFileError(
            f"{path}: {kind}: holds {size} bytes, expected {expected} for the {count} items of its header"
        )
    return count
