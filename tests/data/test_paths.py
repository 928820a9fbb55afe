"""Everything of `spikeloom.data` that takes a file or a folder takes `str` and any `os.PathLike`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.made_events import FORMATS, made
from helpers.made_files import jpeg_bytes
from helpers.made_sets import cifar10_dvs_root, gesture_root, nmnist_root, shd_root, tonic_gestures, write_wav

from spikeloom.data import DATASETS, create_dataset, read_events
from spikeloom.data.formats import idx, jpeg


class Place(os.PathLike[str]):
    """A path that is neither a string nor a `Path`."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


KINDS: dict[str, Callable[[Path], str | os.PathLike[str]]] = {"str": str, "Path": Path, "PathLike": Place}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELOOM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_readers(tmp_path: Path, mnist_root: Path, cifar_root: Path, kind: str) -> None:
    of = KINDS[kind]
    for name, (ending, write, (width, height), _) in FORMATS.items():
        path = tmp_path / f"{name}{ending}"
        path.write_bytes(write(made(20, width, height)))
        assert len(read_events(of(path))) == 20
    raw = mnist_root / "MNIST" / "raw"
    images, labels = idx.read(of(raw / "train-images-idx3-ubyte"), of(raw / "train-labels-idx1-ubyte"))
    assert len(images) == len(labels) == 20
    assert jpeg.read(of(cifar_root / "CIFAR10" / "train.npz"), 32, 10).decode(3).shape == (3, 3, 32, 32)


def fill(root: Path, name: str) -> None:
    """The smallest folder of a data set."""
    if name == "nmnist":
        nmnist_root(root, 1)
    elif name == "cifar10_dvs":
        cifar10_dvs_root(root, 10)
    elif name == "dvs_gesture":
        gesture_root(root)
    elif name == "tonic's dvs_gesture":
        e = made(99, 128, 128, span=500)
        tonic_gestures(root, np.stack([e.x, e.y, e.p, e.t], 1))
    elif name == "fsdd":
        (root / "FSDD" / "recordings").mkdir(parents=True)
        write_wav(root / "FSDD" / "recordings" / "7_theo_9.wav", np.zeros(4000, np.int16))
    elif name == "imagenet":
        (root / "imagenet" / "train" / "n1").mkdir(parents=True)
        (root / "imagenet" / "train" / "n1" / "0.jpeg").write_bytes(jpeg_bytes(np.zeros((40, 50, 3), np.uint8)))
    elif name == "shd":
        shd_root(root)


@pytest.mark.parametrize(
    "name",
    ["nmnist", "cifar10_dvs", "dvs_gesture", "tonic's dvs_gesture", "fsdd", "imagenet", "shd", "mnist", "cifar10"],
)
def test_data_sets(mnist_root: Path, cifar_root: Path, name: str) -> None:
    root = mnist_root
    assert root == cifar_root
    fill(root, name)
    kind = name.split()[-1]
    assert kind in DATASETS
    options = {"size": 32} if kind == "imagenet" else {"T": 2} if kind not in ("mnist", "cifar10") else {}
    first, *others = (create_dataset(kind, of(root), **options) for of in KINDS.values())
    for other in others:
        assert len(other) == len(first) > 0
        assert torch.equal(torch.as_tensor(other[0][0]), torch.as_tensor(first[0][0]))
