"""Labelled JPEG images end to end in one .npz file, without pickles."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spikeloom.errors import DataFileError

ARRAYS: dict[str, type[np.generic]] = {"jpeg": np.uint8, "offsets": np.int64, "labels": np.uint8}


@dataclass(frozen=True)
class Container:
    """N encoded images.

    Args:
        path: the file, for messages.
        jpeg: uint8, the JPEG files end to end.
        offsets: int64 [N + 1]; image i is jpeg[offsets[i]:offsets[i + 1]].
        labels: uint8 [N].
        side: height and width of every image.
    """

    path: Path
    jpeg: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    side: int

    def decode(self, count: int | None = None) -> Tensor:
        """The first `count` images, or all: uint8 [count, 3, side, side], RGB.

        Raises:
            DataFileError: an image is not JPEG, truncated, or not side x side RGB.
        """
        ends = self.offsets[: None if count is None else count + 1].tolist()
        images = np.empty((len(ends) - 1, self.side, self.side, 3), np.uint8)
        for i in range(len(images)):
            images[i] = self._image(i, self.jpeg[ends[i] : ends[i + 1]].tobytes())
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def _image(self, i: int, encoded: bytes) -> npt.NDArray[np.uint8]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(encoded), formats=("JPEG",)) as image:
                # Before decoding: a corrupted header may ask for gigabytes.
                fits = image.size == (self.side, self.side) and image.mode == "RGB"
                if fits:
                    return np.asarray(image)
                found = f"{image.width}x{image.height} {image.mode}"
        except UnidentifiedImageError as error:
            raise DataFileError(f"{self.path}: image {i} is not a JPEG file") from error
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, its own, ...
            raise DataFileError(f"{self.path}: image {i} cannot be decoded{_reason(error)}") from error
        raise DataFileError(f"{self.path}: image {i} is {found}, expected {self.side}x{self.side} RGB")


def read(path: str | os.PathLike[str], side: int, classes: int) -> Container:
    """Reads the arrays `jpeg`, `offsets` and `labels` (see `Container`), nothing decoded yet; others are ignored.

    Args:
        side: height and width the images must have.
        classes: labels must lie below it.

    Raises:
        DataFileError: not an .npz file, truncated or corrupted, an array missing, pickled, of another type or length,
            offsets that do not ascend from 0 to the end of `jpeg`, or a label out of range.
    """
    path = Path(path)
    jpeg, offsets, labels = _arrays(path)
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise DataFileError(
            f"{path}: holds {len(offsets)} offsets for {len(labels)} labels, expected one more offset than labels "
            "and at least one label"
        )
    if offsets[0] != 0 or offsets[-1] != len(jpeg):
        raise DataFileError(
            f"{path}: offsets run from {offsets[0]} to {offsets[-1]}, expected 0 to {len(jpeg)}, the length of jpeg"
        )
    # Compared, not subtracted: a difference of corrupted offsets may overflow.
    falling = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if len(falling):
        i = int(falling[0])
        raise DataFileError(
            f"{path}: image {i} runs from offset {offsets[i]} to {offsets[i + 1]}, expected ascending offsets"
        )
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise DataFileError(f"{path}: label {wrong[0]} is {labels[wrong[0]]}, expected 0 to {classes - 1}")
    return Container(path, jpeg, offsets, labels, side)


def _arrays(path: Path) -> list[npt.NDArray[Any]]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from error
    with stream:  # ours to close: np.load leaves the files it fails on open
        try:
            file = np.load(stream, allow_pickle=False)
        except Exception as error:  # ValueError, EOFError, BadZipFile, ...; not numpy's text, which advises to unpickle
            raise DataFileError(f"{path}: truncated or not an .npz file ({type(error).__name__})") from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataFileError(f"{path}: is a single .npy array, expected an .npz file with {', '.join(ARRAYS)}")
        return [_array(path, file, name, np.dtype(dtype)) for name, dtype in ARRAYS.items()]


def _array(path: Path, file: np.lib.npyio.NpzFile, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if name not in file.files:
        raise DataFileError(f"{path}: holds no array {name!r}, expected {', '.join(ARRAYS)}")
    try:
        array = cast(object, file[name])  # bytes, where the entry is no array
    except Exception as error:  # BadZipFile, zlib.error, ValueError for pickled objects, MemoryError, ...
        raise DataFileError(f"{path}: array {name!r} cannot be read{_reason(error)}") from error
    if not isinstance(array, np.ndarray):
        raise DataFileError(f"{path}: {name!r} is not an array")
    if array.dtype != dtype or array.ndim != 1:
        raise DataFileError(f"{path}: array {name!r} is {array.dtype} {array.shape}, expected {dtype} with one axis")
    return array


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f": {text}" if text else f" ({type(error).__name__})"
