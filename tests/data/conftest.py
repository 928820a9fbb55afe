"""Real data sets kept beside the repository, and small generated ones in their formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.made_files import idx_bytes, jpeg_bytes, pack


@pytest.fixture(autouse=True)
def _no_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder with real data, if it holds the given entry; else the test skips."""
    folder = Path(os.environ.get("SPIKELOOM_SHARED", Path(__file__).parents[3] / "shared")) / "data"

    def find(entry: str) -> Path:
        if not (folder / entry).exists():
            pytest.skip(
                f"REAL DATA MISSING: no {folder / entry}; reading of real {entry} files is NOT tested "
                f"(set SPIKELOOM_SHARED to the folder that holds data/{entry})"
            )
        return folder

    return find


@pytest.fixture(scope="session")
def mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)


@pytest.fixture
def mnist_root(tmp_path: Path, mnist_arrays: tuple[np.ndarray, np.ndarray]) -> Path:
    """A root with 20 random images in MNIST's files, the same for both splits."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        for kind, array in zip(("images-idx3", "labels-idx1"), mnist_arrays, strict=True):
            (raw / f"{stem}-{kind}-ubyte").write_bytes(idx_bytes(array))
    return tmp_path


@pytest.fixture(scope="session")
def jpeg_files() -> list[bytes]:
    """20 smooth random images of 32x32."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 4, 4, 3), np.uint8)
    return [jpeg_bytes(np.kron(image, np.ones((8, 8, 1), np.uint8))) for image in small]


@pytest.fixture
def cifar_root(tmp_path: Path, jpeg_files: list[bytes]) -> Path:
    """A root with 20 JPEG images in CIFAR10/train.npz and test.npz."""
    (tmp_path / "CIFAR10").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "CIFAR10" / f"{split}.npz", **pack(jpeg_files))
    return tmp_path
