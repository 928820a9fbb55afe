"""Spoken digits as a cochlea's spikes, from made HDF5 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_sets import TIMES, UNITS, shd_root

from spikeloom.data import FrameDataset, create_dataset
from spikeloom.errors import DataFileError, UsageError

h5py: Any = pytest.importorskip("h5py")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELOOM_CACHE", str(tmp_path / "cache"))


def test_shd(tmp_path: Path) -> None:
    data = create_dataset("shd", shd_root(tmp_path), T=3)
    assert isinstance(data, FrameDataset)
    assert (data.input_shape, data.in_channels, len(data.classes), data.title) == ((700,), 700, 20, "SHD")
    assert data.labels.tolist() == [19, 0, 7]
    x, _ = data.batch([0, 1, 2])
    assert x.shape == (3, 3, 700)
    assert x.sum((1, 2)).tolist() == [4, 2, 2]
    # Three parts of 0.1 s, of which the last takes the end; times of half precision.
    assert x[0].nonzero().tolist() == [[0, 0], [0, 699], [1, 5], [2, 5]]
    # Times are put in order: unit 4 spikes first.
    assert x[1].nonzero().tolist() == [[0, 4], [2, 3]]
    assert create_dataset("shd", tmp_path)[0][0].shape == (15, 700)
    bins = create_dataset("shd", tmp_path, frames="bins", dt=1.0, subset=2)
    assert bins.title == "SHD, 2 of 3 recordings"
    assert bins[0][0].shape == (301, 700)
    assert bins.encode(bins.batch([0, 1])[0]).shape == (501, 2, 700)


def test_shd_channels_are_added_up(tmp_path: Path) -> None:
    data = create_dataset("shd", shd_root(tmp_path), T=3)
    pooled = create_dataset("shd", tmp_path, T=3, pool=5)
    assert isinstance(data, FrameDataset)
    assert isinstance(pooled, FrameDataset)
    assert (pooled.input_shape, pooled.in_channels) == ((140,), 140)
    x, _ = data.batch([0, 1, 2])
    assert torch.equal(pooled.batch([0, 1, 2])[0], x.unflatten(2, (140, 5)).sum(3))
    with pytest.raises(UsageError, match="pool must divide the 700 channels, got 3"):
        create_dataset("shd", tmp_path, pool=3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": (20, 0, 1)}, "label 20 out of range, expected labels 0 to 19"),
        ({"labels": (-1, 0, 1)}, "label -1 out of range"),
        ({"labels": (1, 0)}, r"int64 labels \(2,\) for 3 recordings"),
        ({"units": [[0, 700, 5, 5], [3, 4], [1, 1]]}, "recording 0: a unit outside 0 to 699"),
        ({"units": [[0, 1, 2], [3, 4], [1, 1]]}, "recording 0 does not have as many times as units"),
        ({"times": [*TIMES[:1], [-0.5, 1], TIMES[2]]}, "recording 1: a time outside 0 to 60 s"),
        ({"times": [*TIMES[:1], [np.nan, 1], TIMES[2]]}, "recording 1: a time outside"),
        ({"times": [*TIMES[:2], []], "units": [*UNITS[:2], []]}, "recording 2: holds no spikes"),
    ],
)
def test_shd_damaged(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataFileError, match=reason) as caught:
        create_dataset("shd", shd_root(tmp_path, **changes))
    assert "shd_train.h5" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.frames"))
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("cut", [0, 100, 2000, -9])
def test_shd_truncated(tmp_path: Path, cut: int) -> None:
    path = shd_root(tmp_path) / "SHD" / "shd_train.h5"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataFileError, match=r"shd_train\.h5: damaged or not an HDF5 file") as caught:
        create_dataset("shd", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "reason"), [("while True: pass", "does not come to an end"), ("os.abort()", "crashes")]
)
def test_what_the_hdf5_library_does_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    """On damaged files it may loop for ever or crash: that happens in a process of its own."""
    (tmp_path / "damaged.py").write_text(f"import os\n{code}\n")
    monkeypatch.setattr("spikeloom.data.sets.cochlea.hdf5.__file__", str(tmp_path / "damaged.py"))
    monkeypatch.setattr("spikeloom.data.sets.cochlea._PATIENCE", 1.0)
    with pytest.raises(DataFileError, match=f"shd_train.h5: .*{reason}"):
        create_dataset("shd", shd_root(tmp_path))
    assert not list((tmp_path / "cache").iterdir())


def test_needs_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shd_root(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs h5py: pip install 'spikeloom\[events\]'"):
        create_dataset("shd", root)


def ntidigits_root(root: Path, names: tuple[str, ...]) -> Path:
    (root / "NTIDIGITS18").mkdir()
    with h5py.File(root / "NTIDIGITS18" / "n-tidigits.hdf5", "w") as file:
        file["train_labels"] = np.array([name.encode() for name in names])
        for i, name in enumerate(names):
            file[f"train_timestamps/{name}"] = np.array([0.0, 0.007, 0.011 * (i + 1)])
            file[f"train_addresses/{name}"] = np.array([63, 1, i])
    return root


def test_n_tidigits(tmp_path: Path) -> None:
    data = create_dataset("n_tidigits", ntidigits_root(tmp_path, ("man-ae-z", "man-ae-1o3", "man-ae-o", "man-bc-4")))
    assert data.labels.tolist() == [0, 10, 4]  # zero, oh, four; the string of three is left out
    assert (data.input_shape, data.title) == ((64,), "N-TIDIGITS (single digits)")
    x, _ = data.batch([0, 2])
    assert x.shape == (2, 9, 64)  # 44 ms in windows of 5 ms
    assert x[1].nonzero().tolist() == [[0, 63], [1, 1], [8, 3]]
    assert x[0].nonzero().tolist() == [[6, 63], [7, 1], [8, 0]]  # the shorter one begins later
    wrong = tmp_path / "b"
    wrong.mkdir()
    with pytest.raises(DataFileError, match="recording 'man-ae-x': label 'x', expected z, 1 to 9 or o"):
        create_dataset("n_tidigits", ntidigits_root(wrong, ("man-ae-z", "man-ae-x")))
    assert torch.equal(data[1][0][0].nonzero(), torch.tensor([[63]]))
