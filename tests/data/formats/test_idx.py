"""Damaged MNIST files: one clear line, or a valid data set."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeloom.data import create_dataset
from spikeloom.data.formats import idx
from spikeloom.errors import DataFileError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def header(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def is_clear(error: BaseException, *either: object) -> None:
    assert any(str(name) in str(error) for name in either)
    assert "\n" not in str(error)


def with_label(content: bytes, i: int, label: int) -> bytes:
    return content[: 8 + i] + bytes([label]) + content[9 + i :]


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (IMAGES, lambda b: b"", "holds 0 bytes, too few for an IDX header of 16"),
        (LABELS, lambda b: b[:7], "holds 7 bytes, too few for an IDX header of 8"),
        (IMAGES, lambda b: b[:-1], "truncated: holds 15695 bytes, expected 15696 for the 20 items"),
        (LABELS, lambda b: b[:-1], "truncated: holds 27 bytes, expected 28"),
        (IMAGES, lambda b: b + b"\0", "too long: holds 15697 bytes"),
        (LABELS, lambda b: b + b"\0", "too long: holds 29 bytes"),
        (IMAGES, lambda b: header(2051, 21, 28, 28) + b[16:], "expected 16480 for the 21 items"),
        (IMAGES, lambda b: header(2051, 2**32 - 1, 28, 28) + b[16:], "truncated"),
        (IMAGES, lambda b: header(2051, 0, 28, 28), "holds no items"),
        (IMAGES, lambda b: header(2051, 19, 28, 28) + b[16:-784], "holds 20 labels, but train-images"),
        (IMAGES, lambda b: header(2051, 80, 14, 14) + b[16:], "images are 14 x 14, expected 28 x 28"),
        (IMAGES, lambda b: header(3331) + b[4:], "begins with the number 3331, expected 2051"),
        (LABELS, lambda b: header(2051) + b[4:], "begins with the number 2051, expected 2049"),
        (IMAGES, lambda b: b"\x89PNG\r\n\x1a\n" + b, "begins with the number 2303741511, expected 2051"),
        (LABELS, gzip.compress, "gzip-compressed"),
        (LABELS, lambda b: with_label(b, 17, 10), "label 17 is 10, expected 0 to 9"),
        (LABELS, lambda b: with_label(b, 19, 255), "label 19 is 255"),
    ],
)
def test_damage(mnist_root: Path, name: str, damage: Callable[[bytes], bytes], says: str):
    path = mnist_root / "MNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataFileError) as caught:
        create_dataset("mnist", mnist_root)
    assert says in str(caught.value)
    is_clear(caught.value, name)
    create_dataset("mnist", mnist_root, "test")  # the other part is as it was


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_absent(mnist_root: Path, name: str):
    path = mnist_root / "MNIST" / "raw" / name
    path.unlink()
    with pytest.raises(DataFileError, match=name):
        create_dataset("mnist", mnist_root)
    path.mkdir()
    with pytest.raises(DataFileError, match=name):
        create_dataset("mnist", mnist_root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable(mnist_root: Path):
    path = mnist_root / "MNIST" / "raw" / LABELS
    path.chmod(0)
    with pytest.raises(DataFileError, match="Permission denied"):
        create_dataset("mnist", mnist_root)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_told_or_harmless(data: st.DataObject, mnist_arrays: tuple[np.ndarray, np.ndarray]):
    contents = [header(2048 + a.ndim, *a.shape) + a.tobytes() for a in mnist_arrays]
    which = data.draw(st.integers(0, 1), "file")
    content = bytearray(contents[which])
    for _ in range(data.draw(st.integers(0, 3), "flips")):
        content[data.draw(st.integers(0, 23), "place")] ^= data.draw(st.integers(1, 255), "bits")
    length = data.draw(st.none() | st.integers(0, len(content) + 4), "length")
    contents[which] = bytes(content if length is None else (content + b"\0" * 4)[:length])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / IMAGES, Path(folder) / LABELS]
        for path, written in zip(paths, contents, strict=True):
            path.write_bytes(written)
        try:
            images, labels = idx.read(*paths)
        except DataFileError as error:
            is_clear(error, *paths)
        else:
            assert images.shape == (20, 1, 28, 28)
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert ((labels >= 0) & (labels < 10)).all()
