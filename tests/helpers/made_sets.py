"""Folders of small made data sets, as their originals have them."""

from __future__ import annotations

import hashlib
import pickle
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from helpers.made_events import aedat2, aedat3, aedat4, five_bytes, made
from helpers.made_files import idx_bytes, jpeg_bytes, write_cifar10, write_fsdd
from spikeloom.data.sets.dvs import CIFAR10_CLASSES


def nmnist_root(root: Path, each: int = 3, n: int = 300) -> Path:
    for part in ("Train", "Test"):
        for digit in range(10):
            folder = root / "NMNIST" / part / str(digit)
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{10 * i + 9:05}.bin").write_bytes(five_bytes(made(n, 34, 34, 10 * i + digit)))
    return root


def cifar10_dvs_root(root: Path, each: int = 20, ending: str = ".aedat", n: int = 60) -> Path:
    for label, name in enumerate(CIFAR10_CLASSES):
        (root / "CIFAR10DVS" / name).mkdir(parents=True)
        for i in range(each):
            e = made(n, 128, 128, 100 * label + i)
            data = aedat2(e) if ending == ".aedat" else aedat4(e)
            (root / "CIFAR10DVS" / name / f"cifar10_{name}_{i}{ending}").write_bytes(data)
    return root


def gesture_root(
    root: Path, labels: str = "class,startTime_usec,endTime_usec\n8,1000,3000\n11,3000,9000\n8,9000,9900\n"
) -> Path:
    folder = root / "DVSGesture" / "DvsGesture"
    folder.mkdir(parents=True)
    for person in (1, 23, 24):
        (folder / f"user{person:02}_led.aedat").write_bytes(aedat3(made(500, 128, 128, person, 10_000)))
        (folder / f"user{person:02}_led_labels.csv").write_text(labels)
    return root


def tonic_gestures(root: Path, rows: np.ndarray, label: str = "3") -> Path:
    folder = root / "DVSGesture" / "ibmGestureTrain" / "user01_led"
    folder.mkdir(parents=True)
    np.save(folder / f"{label}.npy", rows, allow_pickle=True)
    return root


def write_wav(path: Path, samples: np.ndarray, rate: int = 8000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(samples.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


TIMES = [[0.0, 0.1, 0.2, 0.3], [0.5, 0.25], [0.0, 0.9375]]
UNITS = [[0, 699, 5, 5], [3, 4], [10, 11]]


def shd_root(root: Path, times: Any = None, units: Any = None, labels: Any = (19, 0, 7)) -> Path:
    h5py: Any = pytest.importorskip("h5py")
    (root / "SHD").mkdir()
    with h5py.File(root / "SHD" / "shd_train.h5", "w") as file:
        for name, rows, dtype in (("times", times or TIMES, np.float16), ("units", units or UNITS, np.uint16)):
            column = file.create_dataset(f"spikes/{name}", (len(rows),), h5py.vlen_dtype(dtype))
            for i, row in enumerate(rows):
                column[i] = np.array(row, dtype)
        file["labels"] = np.array(labels, np.int64)
    return root


# --- both parts of a set, in the layout, the sizes and the types of its originals -------------------------------------


def mnist_root(root: Path, train: int = 60_000, test: int = 100) -> Path:
    """Random images; as many for training as there are, which Colored MNIST asks for."""
    rng = np.random.default_rng(0)
    (root / "MNIST" / "raw").mkdir(parents=True)
    for stem, count in (("train", train), ("t10k", test)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10
        (root / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (root / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.astype(np.uint8)))
    return root


def imagenet_root(root: Path, classes: int = 100) -> Path:
    """A picture of the usual size for each class, grey ones and ones of four inks among them, as in the originals."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(classes):
            wordnet = f"n{1440764 + i:08}"
            folder = root / "imagenet" / part / wordnet
            folder.mkdir(parents=True)
            image = np.kron(rng.integers(0, 256, (15, 20, 3), np.uint8), np.ones((25, 25, 1), np.uint8))
            name = f"{wordnet}_{i}" if part == "train" else f"ILSVRC2012_val_{i:08}"
            mode = ("L", "CMYK", "RGB")[min(i % 5, 2)]
            (folder / f"{name}.JPEG").write_bytes(jpeg_bytes(image if i % 2 else image.swapaxes(0, 1), mode))
    return root


def whole_gesture_root(root: Path) -> Path:
    """Gestures of 0.3 s, twelve in a recording, as the original label files have them."""
    classes = (1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11)
    lines = [f"{label},{1000 + 300_000 * i},{300_000 * (i + 1)}" for i, label in enumerate(classes)]
    gesture_root(root, "\n".join(("class,startTime_usec,endTime_usec", *lines, "")))
    for person in (1, 23, 24):
        path = root / "DVSGesture" / "DvsGesture" / f"user{person:02}_led.aedat"
        path.write_bytes(aedat3(made(20_000, 128, 128, person, 3_600_000), 4096))
    return root


def caltech_root(root: Path) -> Path:
    for i in range(101):
        folder = root / "Caltech101" / f"class_{i:03}"
        folder.mkdir(parents=True)
        for number in range(1, 12):
            (folder / f"image_{number:04}.bin").write_bytes(five_bytes(made(20, 150, 170, i)))
    return root


def whole_shd_root(root: Path, train: int = 40, test: int = 20) -> Path:
    """Half a second of noise in 700 units, times of half precision."""
    h5py: Any = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    (root / "SHD").mkdir()
    for part, count in (("train", train), ("test", test)):
        with h5py.File(root / "SHD" / f"shd_{part}.h5", "w") as file:
            times = file.create_dataset("spikes/times", (count,), h5py.vlen_dtype(np.float16))
            units = file.create_dataset("spikes/units", (count,), h5py.vlen_dtype(np.uint16))
            for i in range(count):
                times[i] = np.sort(rng.random(2000) / 2).astype(np.float16)
                units[i] = rng.integers(0, 700, 2000, np.uint16)
            file["labels"] = np.arange(count) % 20
            file["extra/speaker"] = np.arange(count) % 12
    return root


def n_tidigits_root(root: Path, each: int = 2) -> Path:
    """Noise of 0.2 s in 64 channels: single digits of `each` speakers, and a string of three, in both parts."""
    h5py: Any = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    (root / "NTIDIGITS18").mkdir()
    with h5py.File(root / "NTIDIGITS18" / "n-tidigits.hdf5", "w") as file:
        for part in ("train", "test"):
            names = [f"man-{'ab'[speaker]}e-{digit}" for speaker in range(each) for digit in (*"z123456789o", "1o3")]
            file[f"{part}_labels"] = np.array([name.encode() for name in names])
            for name in names:
                file[f"{part}_timestamps/{name}"] = np.sort(rng.random(300) / 5)
                file[f"{part}_addresses/{name}"] = rng.integers(0, 64, 300)
    return root


def own_root(root: Path, write: Callable[[Path, int, int], None], each: int = 10) -> Path:
    """Two classes of files that `write` makes from a path, the label and a number."""
    for label, name in enumerate(("high", "low")):
        (root / name).mkdir(parents=True)
        for i in range(each):
            write(root / name / str(i), label, i)
    return root


def _write_picture(path: Path, label: int, i: int) -> None:
    image = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
    path.with_suffix(".jpg").write_bytes(jpeg_bytes(image))


def _write_recording(path: Path, label: int, i: int) -> None:
    path.with_suffix(".aedat").write_bytes(aedat2(made(500, 128, 128, i)))


def _write_sound(path: Path, label: int, i: int) -> None:
    write_wav(path.with_suffix(".wav"), np.random.default_rng(i).integers(-9000, 9000, 3000).astype(np.int16))


def arrays_root(root: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(root / "data.npz", x=rng.integers(0, 256, (20, 3, 32, 32), np.uint8), y=np.arange(20) % 2)
    return root


def cifar100_root(root: Path) -> Path:
    """Random images, whose checksums take the place of the published ones: no others are unpickled."""
    rng = np.random.default_rng(0)
    (root / "cifar-100-python").mkdir()
    sums: dict[str, str] = {}
    for name, count in (("train", 200), ("test", 100), ("meta", 0)):
        content = {"fine_label_names": [f"class {i}" for i in range(100)]}
        if count:
            labels = (np.arange(count) % 100).tolist()
            content = {"data": rng.integers(0, 256, (count, 3072), np.uint8), "fine_labels": labels}
        data = pickle.dumps(content)
        (root / "cifar-100-python" / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    CIFAR100.train_list, CIFAR100.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
    CIFAR100.meta = {**CIFAR100.meta, "md5": sums["meta"]}
    return root


def _images(write: Callable[[Path, int], None]) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, 100)
        return root

    return make


MADE: dict[str, Callable[[Path], Path]] = {
    "mnist": mnist_root,
    "cifar10": _images(write_cifar10),
    "cifar100": cifar100_root,
    "imagenet": imagenet_root,
    "nmnist": nmnist_root,
    "cifar10_dvs": lambda root: cifar10_dvs_root(root, n=2000),
    "dvs_gesture": whole_gesture_root,
    "n_caltech101": caltech_root,
    "shd": whole_shd_root,
    "n_tidigits": n_tidigits_root,
    "fsdd": _images(write_fsdd),
    "folder": lambda root: own_root(root, _write_picture),
    "recordings": lambda root: own_root(root, _write_recording),
    "audio": lambda root: own_root(root, _write_sound),
    "arrays": arrays_root,
}
SAME_FILES = {
    "colored_mnist": "mnist",
    "sequential_mnist": "mnist",
    "sequential_cifar10": "cifar10",
    "sequential_cifar100": "cifar100",
}
