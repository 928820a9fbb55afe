"""Folders of small made data sets, as their originals have them."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.made_events import aedat2, aedat3, aedat4, five_bytes, made
from spikeloom.data.sets.dvs import CIFAR10_CLASSES


def nmnist_root(root: Path, each: int = 3, n: int = 300) -> Path:
    for part in ("Train", "Test"):
        for digit in range(10):
            folder = root / "NMNIST" / part / str(digit)
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{10 * i + 9:05}.bin").write_bytes(five_bytes(made(n, 34, 34, 10 * i + digit)))
    return root


def cifar10_dvs_root(root: Path, each: int = 20, ending: str = ".aedat") -> Path:
    for label, name in enumerate(CIFAR10_CLASSES):
        (root / "CIFAR10DVS" / name).mkdir(parents=True)
        for i in range(each):
            e = made(60, 128, 128, 100 * label + i)
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
