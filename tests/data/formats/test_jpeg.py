"""Damaged containers of JPEG images: one clear line naming file and place, or valid images."""

from __future__ import annotations

import io
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_files import jpeg_bytes, pack
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeloom.data import create_dataset
from spikeloom.data.formats import jpeg
from spikeloom.errors import DataFileError

GREY = np.zeros((32, 32, 3), np.uint8)


def is_clear(error: BaseException, start: object) -> str:
    text = str(error)
    assert text.startswith(str(start))
    assert "\n" not in text
    return text


def refused(path: Path, subset: int | None = None) -> str:
    with pytest.raises(DataFileError) as caught:
        jpeg.read(path, 32, 10).decode(subset)
    return is_clear(caught.value, f"{path}: ")


def test_decodes_as_torchvision_does(real_data: Callable[[str], Path]):
    from torchvision.io import decode_jpeg

    container = jpeg.read(real_data("CIFAR10") / "CIFAR10" / "test.npz", 32, 10)
    images = container.decode(200)
    for i, image in enumerate(images):
        encoded = container.jpeg[container.offsets[i] : container.offsets[i + 1]]
        assert torch.equal(image, decode_jpeg(torch.from_numpy(encoded.copy())))


def test_first_images_only_are_decoded(tmp_path: Path, jpeg_files: list[bytes]):
    path = tmp_path / "a.npz"
    np.savez(path, **pack([*jpeg_files[:7], b"not a JPEG file", *jpeg_files[7:]]))
    assert jpeg.read(path, 32, 10).decode(7).shape == (7, 3, 32, 32)
    assert "image 7 is not a JPEG file" in refused(path, 8)
    assert "image 7 is not a JPEG file" in refused(path)


def big_header(file: bytes) -> bytes:
    """The same image with a header that asks for 65535 x 65535 pixels."""
    at = file.index(b"\xff\xc0") + 5
    return file[:at] + b"\xff\xff\xff\xff" + file[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f[:-40], "image 17 cannot be decoded: image file is truncated"),
        (lambda f: f[:30], "image 17 "),
        (lambda f: b"\0" + f[1:], "image 17 is not a JPEG file"),
        (lambda f: jpeg_bytes(GREY, "L"), "image 17 is 32x32 L, expected 32x32 RGB"),
        (lambda f: jpeg_bytes(GREY, "CMYK"), "image 17 is 32x32 CMYK"),
        (lambda f: jpeg_bytes(GREY[:, :31]), "image 17 is 31x32 RGB"),
        (big_header, "image 17 "),
    ],
)
def test_wrong_image(tmp_path: Path, jpeg_files: list[bytes], damage: Callable[[bytes], bytes], says: str):
    path = tmp_path / "a.npz"
    np.savez(path, **pack([*jpeg_files[:17], damage(jpeg_files[17]), *jpeg_files[18:]]))
    assert says in refused(path)


def put(array: np.ndarray, place: int, value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("jpeg", lambda a: None, "holds no array 'jpeg', expected jpeg, offsets, labels"),
        ("offsets", lambda a: None, "holds no array 'offsets'"),
        ("labels", lambda a: None, "holds no array 'labels'"),
        ("jpeg", lambda a: a.astype(np.int16), "array 'jpeg' is int16"),
        ("jpeg", lambda a: a[None], "expected uint8 with one axis"),
        ("offsets", lambda a: a.astype(float), "array 'offsets' is float64"),
        ("offsets", lambda a: a.astype(">i8"), "array 'offsets' is >i8"),
        ("labels", lambda a: a.astype(np.int64), "array 'labels' is int64"),
        ("labels", lambda a: a.astype(object), "array 'labels' cannot be read: Object arrays cannot be loaded"),
        ("labels", lambda a: a[:-1], "holds 21 offsets for 19 labels"),
        ("labels", lambda a: a[:0], "at least one label"),
        ("offsets", lambda a: a[:-1], "holds 20 offsets for 20 labels"),
        ("offsets", lambda a: a[:0], "holds 0 offsets"),
        ("jpeg", lambda a: a[:-1], "the length of jpeg"),
        ("offsets", lambda a: put(a, 0, -1), "offsets run from -1"),
        ("offsets", lambda a: put(a, 0, 1), "offsets run from 1"),
        ("offsets", lambda a: put(a, -1, 2**62), "offsets run from 0 to 4611686018427387904"),
        ("offsets", lambda a: put(a, 5, a[4]), "image 4 runs from"),
        ("offsets", lambda a: put(a, 5, a[7]), "image 5 runs from"),
        ("offsets", lambda a: put(a, 5, 2**63 - 1), "image 5 runs from"),
        ("offsets", lambda a: put(a, 5, -(2**63)), "image 4 runs from"),
        ("labels", lambda a: put(a, 17, 10), "label 17 is 10, expected 0 to 9"),
    ],
)
def test_wrong_array(tmp_path: Path, jpeg_files: list[bytes], name: str, change: Callable[[Any], Any], says: str):
    arrays = pack(jpeg_files)
    changed = change(arrays.pop(name))
    path = tmp_path / "a.npz"
    np.savez(path, **arrays, **({} if changed is None else {name: changed}))
    assert says in refused(path)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_executed(cifar_root: Path, tmp_path: Path, jpeg_files: list[bytes]):
    path, sign = cifar_root / "CIFAR10" / "train.npz", tmp_path / "executed"
    np.savez(path, **{**pack(jpeg_files), "labels": np.array([Bomb(sign)], object)})
    with pytest.raises(DataFileError, match="'labels' cannot be read"):
        create_dataset("cifar10", cifar_root)
    path.write_bytes(pickle.dumps(Bomb(sign)))
    with pytest.raises(DataFileError, match=r"truncated or not an \.npz file") as caught:
        create_dataset("cifar10", cifar_root)
    assert "pickle" not in str(caught.value)  # numpy's advice is to unpickle it
    assert not sign.exists()


def test_files_of_other_kinds(tmp_path: Path, jpeg_files: list[bytes]):
    path = tmp_path / "a.npz"
    np.savez(path, **pack(jpeg_files))
    content = path.read_bytes()
    for wrong in (b"", b"hello", content[:100], content[: len(content) // 2], content[:-1], content[50:]):
        path.write_bytes(wrong)
        refused(path)
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    assert "single .npy array" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("jpeg.npy", "no numpy header")
    assert "'jpeg' is not an array" in refused(path)
    refused(tmp_path / "absent.npz")
    refused(tmp_path)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), compressed=st.booleans())
def test_any_damage_is_told_or_harmless(data: st.DataObject, compressed: bool, jpeg_files: list[bytes]):
    arrays = pack(jpeg_files[:2])
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3), "flips")):
        content[data.draw(st.integers(0, len(content) - 1), "place")] ^= data.draw(st.integers(1, 255), "bits")
    length = data.draw(st.none() | st.integers(0, len(content)), "length")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        path.write_bytes(content[:length])
        try:
            images = jpeg.read(path, 32, 10).decode()
        except DataFileError as error:
            is_clear(error, path)
        else:
            # The archive's checksums leave no damage of the arrays unseen.
            assert torch.equal(images, jpeg.Container(path, **arrays, side=32).decode())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_images_are_told_or_decoded(data: st.DataObject, jpeg_files: list[bytes]):
    content = bytearray(jpeg_files[0])
    for _ in range(data.draw(st.integers(1, 4), "flips")):
        content[data.draw(st.integers(0, len(content) - 1), "place")] ^= data.draw(st.integers(1, 255), "bits")
    container = jpeg.Container(Path("a.npz"), **pack([bytes(content)]), side=32)
    try:
        assert container.decode().shape == (1, 3, 32, 32)
    except DataFileError as error:
        is_clear(error, "a.npz: image 0 ")
