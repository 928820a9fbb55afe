"""Damaged files of every kind that is read: one clear line that names the file, or valid data; never another error, a
hang, or memory for what a count claims. The seeds are fixed: a failure names its own.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_vectors import shared_folder
from helpers.made_events import FORMATS, SEEDED, aedat4, evt3, gappy, made
from helpers.made_files import idx_bytes, jpeg_bytes, pack
from helpers.made_sets import gesture_root, shd_root, tonic_gestures, write_wav
from PIL import Image

from spikeloom.data import create_dataset, read_events
from spikeloom.data.formats import idx, jpeg
from spikeloom.data.formats.events import TOLERANCE_US, Outside
from spikeloom.data.sets.imagenet import Pictures
from spikeloom.errors import DataFileError


def damaged(data: bytes, seed: int) -> bytes:
    """Up to five damages: bytes and numbers changed, parts cut out, doubled, or set to zero, and the end cut off."""
    draw = random.Random(seed)
    broken = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        if not broken:
            break
        at = draw.randrange(min(len(broken), 400) if draw.random() < 0.6 else len(broken))
        end = at + draw.randint(1, 1 + len(broken) // 4)
        kind = draw.choice(["byte", "byte", "bit", "number", "cut", "double", "zero", "end"])
        if kind == "byte":
            broken[at] = draw.randrange(256)
        elif kind == "bit":
            broken[at] ^= 1 << draw.randrange(8)
        elif kind == "number":
            value = draw.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(broken), draw.randrange(2**32)])
            broken[at : at + 4] = struct.pack(draw.choice("<>") + "I", value)[: len(broken) - at]
        elif kind == "cut":
            del broken[at:end]
        elif kind == "double":
            broken[at:at] = broken[at:end]
        elif kind == "zero":
            broken[at:end] = bytes(len(broken[at:end]))
        else:
            del broken[at:]
    return bytes(broken)


@dataclass(frozen=True)
class Case:
    """A kind of file.

    Args:
        make: writes it, and what else is needed, into a folder.
        read: reads it and checks what is read.
        memory: of reading, at most: times the file, and bytes more.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    memory: tuple[int, int] = (10, 2**21)


def read_valid(path: Path, outside: Outside = "error") -> None:
    e = read_events(path, outside=outside)
    assert len(e.t) == len(e.x) == len(e.y) == len(e.p)
    assert [a.dtype for a in (e.t, e.x, e.y, e.p)] == [np.int64, np.int16, np.int16, np.uint8]
    if len(e):
        assert 0 <= e.x.min() <= e.x.max() < e.width
        assert 0 <= e.y.min() <= e.y.max() < e.height
        assert e.p.max() <= 1
        assert (np.maximum.accumulate(e.t) - e.t).max() <= TOLERANCE_US


def events_case(name: str, data: bytes, memory: int = 10) -> Case:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    # A second reading: "drop" takes the other way through the checks.
    return Case(make, lambda path: (read_valid(path, "drop"), read_valid(path)), (memory, 2**21))


def made_case(name: str) -> Case:
    ending, write, (width, height), span = FORMATS[name]
    e = made(200, width, height, span=min(span, 100_000))
    # A word of EVT2.1 may hold 32 events, one of EVT3 12.
    return events_case(f"a{ending}", write(e), {"evt21": 60, "evt21_legacy": 60, "evt3": 60}.get(name, 10))


def seeded_case(name: str) -> Case:
    ending, write, (width, height), _ = FORMATS[name]
    return events_case(f"a{ending}", write(gappy(200, width, height, 3, 20_000, False), 3), 60)  # type: ignore[call-arg]


def data_set_case(kind: str, make: Callable[[Path], Path], **options: Any) -> Case:
    def read(path: Path) -> None:
        data = create_dataset(kind, next(p for p in path.parents if p.name == "root"), **options)
        assert len(data) > 0
        x, y = data[0]
        assert torch.isfinite(x).all()
        assert 0 <= y < len(data.classes)

    return Case(make, read, (40, 2**25))


def gesture_csv(root: Path) -> Path:
    return gesture_root(root) / "DVSGesture" / "DvsGesture" / "user01_led_labels.csv"


def gesture_npy(root: Path) -> Path:
    e = made(200, 128, 128, span=500)
    tonic_gestures(root, np.stack([e.x, e.y, e.p, e.t], 1))
    return root / "DVSGesture" / "ibmGestureTrain" / "user01_led" / "3.npy"


def wav(root: Path) -> Path:
    path = root / "FSDD" / "recordings" / "7_theo_9.wav"
    path.parent.mkdir(parents=True)
    write_wav(path, (9000 * np.sin(np.arange(2000))).astype(np.int16))
    return path


def fsdd_npz(root: Path) -> Path:
    (root / "FSDD").mkdir()
    samples = (9000 * np.sin(np.arange(2000))).astype(np.int16)
    labels = np.array([0, 9], np.uint8)
    np.savez(root / "FSDD" / "train.npz", samples=samples, offsets=np.array([0, 800, 2000]), labels=labels)
    return root / "FSDD" / "train.npz"


def jpeg_npz(folder: Path) -> Path:
    grey = np.kron(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    np.savez(folder / "train.npz", **pack([jpeg_bytes(grey)] * 2))
    return folder / "train.npz"


def picture(kind: str) -> Case:
    def make(folder: Path) -> Path:
        pixels = np.kron(np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        (folder / f"a.{kind.lower()}").write_bytes(buffer.getvalue())
        return folder / f"a.{kind.lower()}"

    def read(path: Path) -> None:
        assert Pictures([path], 32, 32)[0].shape == (3, 32, 32)

    return Case(make, read, (10, 2**25))


def mnist_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    (folder / "labels").write_bytes(idx_bytes((np.arange(3) % 10).astype(np.uint8)))
    (folder / "images").write_bytes(idx_bytes(rng.integers(0, 256, (3, 28, 28), np.uint8)))
    return folder / "images"


def read_mnist(path: Path) -> None:
    images, labels = idx.read(path.parent / "images", path.parent / "labels")
    assert images.shape == (3, 1, 28, 28)
    assert labels.max() < 10


def cifar_pickles(root: Path) -> Path:
    """Not the authors' bytes: refused before they are unpickled, which would run code."""
    (root / "cifar-10-batches-py").mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (root / "cifar-10-batches-py" / name).write_bytes(b"\x80\x04\x95" + bytes(99))
    return root / "cifar-10-batches-py" / "data_batch_1"


def in_root(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def made_in_root(folder: Path) -> Path:
        (folder / "root").mkdir()
        return make(folder / "root")

    return made_in_root


CASES: dict[str, Case] = {
    **{name: made_case(name) for name in FORMATS},
    **{f"{name} with all words": seeded_case(name) for name in SEEDED},
    "aedat4 not compressed": events_case("a.aedat4", aedat4(made(200, 320, 240), squeeze="none")),
    "gesture labels": data_set_case("dvs_gesture", in_root(gesture_csv), T=2),
    "tonic's gestures": data_set_case("dvs_gesture", in_root(gesture_npy), T=2),
    "wav": data_set_case("fsdd", in_root(wav), T=10),
    "fsdd": data_set_case("fsdd", in_root(fsdd_npz), T=10),
    "idx images": Case(mnist_images, read_mnist),
    "idx labels": Case(lambda folder: mnist_images(folder).with_name("labels"), read_mnist),
    "jpeg container": Case(jpeg_npz, lambda path: jpeg.read(path, 32, 10).decode(), (40, 2**22)),
    "jpeg": picture("JPEG"),
    "png": picture("PNG"),
    "cifar pickles": data_set_case("cifar10", in_root(cifar_pickles)),
}


def survive(case: Case, folder: Path, seeds: range) -> int:
    """Reads a file with the damage of each seed; returns how many were refused."""
    path, refused = case.make(folder), 0
    whole = path.read_bytes()
    with contextlib.suppress(DataFileError, struct.error):
        case.read(path)  # what is imported on the first call is not the file's
    for seed in seeds:
        data = damaged(whole, seed)
        path.write_bytes(data)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        begin, message = time.process_time(), ""
        tracemalloc.start()
        try:
            case.read(path)
        except DataFileError as error:
            refused, message = refused + 1, str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed} of {path.name}: {type(error).__name__}: {error}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert not message or (str(folder) in message and "\n" not in message), f"seed {seed}: {message}"
        assert peak < case.memory[0] * len(data) + case.memory[1], f"seed {seed}: {peak} bytes for {len(data)}"
        assert time.process_time() - begin < 20, f"seed {seed}: too long"
    return refused


def check(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("SPIKELOOM_CACHE", str(folder / "cache"))
    refused = survive(case, folder, range(count))
    assert refused > count // 20, "hardly any damage was seen"


@pytest.mark.parametrize("name", CASES)
def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(CASES[name], tmp_path, monkeypatch, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_thousands_of_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(CASES[name], tmp_path, monkeypatch, 3000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shd", "n_tidigits"])
def test_damaged_hdf5_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Each is read by a process of its own."""

    def make(root: Path) -> Path:
        if kind == "shd":
            return shd_root(root) / "SHD" / "shd_train.h5"
        h5py = pytest.importorskip("h5py")
        path = root / "n-tidigits.hdf5"
        with h5py.File(path, "w") as file:
            names = ["man-ab-z", "woman-cd-7", "woman-cd-o", "man-ab-12"]
            file["train_labels"] = np.array(names, "S16")
            for i, name in enumerate(names):
                file[f"train_timestamps/{name}"] = np.linspace(0, 0.3, 5 + i)
                file[f"train_addresses/{name}"] = np.arange(5 + i, dtype=np.float64)
        return path

    pytest.importorskip("h5py")
    monkeypatch.setattr("spikeloom.data.sets.cochlea._PATIENCE", 5.0)
    check(data_set_case(kind, in_root(make), T=None), tmp_path, monkeypatch, 150)


# --- real files, and what is no file of any kind ----------------------------------------------------------------------

DATA = shared_folder() / "data"
REAL = (
    "AEDAT2/davis240/translating_boxes.aedat",
    "AEDAT2/dvs128/box.aedat",
    "AEDAT4/dvxplorer_lite_a.aedat4",
    "DVSGesture/derived/clips_repacked.aedat",
    "ES/poker_club_0.es",
    "NMNIST/Test/0/00004.bin",
    "NTIDIGITS/sample_1.bs1",
    "PROPHESEE/evt2_gen3_a.raw",
    "PROPHESEE/evt3_gen41.raw",
    "PROPHESEE/ncars_sample.dat",
    "STMNIST/sample.mat",
)


def real_case(name: str) -> Case:
    if not (DATA / name).is_file():
        pytest.skip(f"REAL DATA MISSING: no {DATA / name}")
    with (DATA / name).open("rb") as file:
        data = file.read(100_000)
    if name.endswith(".aedat4"):  # packets up to the index, which is cut off
        data = (DATA / name).read_bytes()
    return events_case(Path(name).name, data, 60 if "evt3" in name else 10)


@pytest.mark.parametrize("name", REAL)
def test_damaged_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(real_case(name), tmp_path, monkeypatch, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_hundreds_of_damaged_real_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check(real_case(name), tmp_path, monkeypatch, 500)


HEADS = [
    b"",
    b"#!AER-DAT2.0\r\n",
    b"#!AER-DAT3.1\r\n#!END-HEADER\r\n",
    b"#!AER-DAT4.0\r\n",
    b"% evt 2.0\n",
    b"% evt 2.1\n",
    b"% evt 2.1\n% endianness legacy\n",
    b"% evt 3.0\n",
    b"% Version 1\n\0\10",
    b"% Version 2\n\f\10",
    b"Event Stream\2\0\0\1\x22\0\x22\0",
    b"MATLAB 5.0" + bytes(116) + b"\0\1IM",
]


def any_bytes(folder: Path, count: int) -> None:
    for seed in range(count):
        draw = random.Random(seed)
        data = draw.choice(HEADS) + draw.randbytes(draw.randrange(400))
        path = folder / f"a{draw.choice(['', '.bin', '.bs1'])}"
        path.write_bytes(data)
        message = ""
        try:
            read_valid(path)
        except DataFileError as error:
            message = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert not message or re.fullmatch(re.escape(str(path)) + r": at byte \d+ of \d+: .+", message), f"seed {seed}"


def test_any_bytes(tmp_path: Path) -> None:
    any_bytes(tmp_path, 500)


@pytest.mark.slow
def test_any_bytes_thousands_of_times(tmp_path: Path) -> None:
    any_bytes(tmp_path, 20_000)


def test_a_case_finds_what_it_is_for(tmp_path: Path) -> None:
    """The checks fail for a reader that lets another error through, or takes memory for a claim."""
    events = events_case("a.raw", evt3(made(50, 1280, 720)))
    bare = Case(events.make, lambda path: struct.unpack("<I", path.read_bytes()[:3]))
    with pytest.raises(AssertionError, match=r"seed 0 of a\.raw: error: unpack requires"):
        survive(bare, tmp_path, range(1))
    hungry = Case(events.make, lambda path: bytes(2**23))
    with pytest.raises(AssertionError, match=r"seed 0: \d+ bytes for"):
        survive(hungry, tmp_path, range(1))
