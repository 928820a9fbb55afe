"""Spoken digits as a cochlea's spikes: SHD (a model's) and N-TIDIGITS (a silicon one's), as frames [T, N, channels]."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikeloom.data.event_sets import Place
from spikeloom.data.events import Array
from spikeloom.data.frame_sets import FrameDataset, cached, chosen
from spikeloom.data.frames import Slicer, Slicing, accumulate
from spikeloom.data.places import data_root, fetch_with_tonic, missing
from spikeloom.errors import DataFileError, UsageError

SHD_SOURCE = (
    "get shd_train.h5.zip and shd_test.h5.zip from https://zenkelab.org/resources/spiking-heidelberg-datasets-shd/ "
    "and unpack them there"
)
NTIDIGITS_SOURCE = (
    "get n-tidigits.hdf5, see https://docs.google.com/document/d/1Uxe7GsKKXcy6SlDUX4hoJVAC0-UkH-8kr5UXp0Ndi1M"
)
_LONGEST = 60.0  # seconds: a damaged time must not make a million frames


def shd(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "time",
    T: int | None = None,
    dt: float | None = None,
    download: bool = False,
) -> FrameDataset:
    """Spiking Heidelberg Digits: 20 spoken digits (German and English), 700 channels, frames [T, N, 700].

    Read from root/SHD/shd_{train,test}.h5 (also from root itself): 8,156 and 2,264 recordings. Needs h5py, which comes
    with the extra `events`.

    Args:
        subset: take only n recordings, spread evenly.
        frames, T, dt: as `nmnist`; by default 15 parts of equal duration.
        download: fetch missing files with tonic.
    """
    slicer = Slicer.filled(frames, T, dt, 15)
    folder = data_root(root, "SHD", SHD_SOURCE)
    path = _found(folder, ("SHD", ""), f"shd_{split}.h5")
    if download and not path.is_file():
        fetch_with_tonic("SHD", folder, train=split == "train")
    if not path.is_file():
        raise missing("SHD", folder, path, SHD_SOURCE)
    with _opened(path) as file:
        labels: Array = np.asarray(file["labels"][()]).astype(np.int64)
        spikes = (file["spikes/times"], file["spikes/units"])
        if not len(labels) == len(spikes[0]) == len(spikes[1]):
            raise DataFileError(f"{path}: {len(labels)} labels, {len(spikes[0])} times, {len(spikes[1])} units")
        return _dataset("shd", "SHD", path, labels, 20, 700, slicer, subset,
                        lambda i: (spikes[0][i], spikes[1][i]))  # fmt: skip


def n_tidigits(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "bins",
    T: int | None = None,
    dt: float | None = None,
    download: bool = False,
) -> FrameDataset:
    """N-TIDIGITS, the recordings of a single digit: 11 classes ("zero" 0, "oh" 10), 64 channels, frames [T, N, 64].

    Read from root/NTIDIGITS18/n-tidigits.hdf5 (also from root itself). Needs h5py, which comes with the extra `events`.

    Args:
        subset, download: as `shd`.
        frames, T, dt: as `nmnist`; by default windows of 5 ms from t = 0.
    """
    slicer = Slicer.filled(frames, T, dt)
    folder = data_root(root, "N-TIDIGITS", NTIDIGITS_SOURCE)
    path = _found(folder, ("NTIDIGITS18", "NTIDIGITS", ""), "n-tidigits.hdf5")
    if download and not path.is_file():
        fetch_with_tonic("NTIDIGITS18", folder, train=split == "train")
    if not path.is_file():
        raise missing("N-TIDIGITS", folder, path, NTIDIGITS_SOURCE)
    with _opened(path) as file:
        names = [name.decode() for name in file[f"{split}_labels"][()]]
        # A name ends in what was said: "...-z" or "...-1o3". Labels are strings; those of one digit are kept.
        names = [name for name in names if len(name.split("-")[-1]) == 1]
        said = [name.split("-")[-1] for name in names]
        wrong = next((i for i, digit in enumerate(said) if digit not in "z123456789o"), None)
        if wrong is not None:
            raise DataFileError(f"{path}: recording {names[wrong]!r}: label {said[wrong]!r}, expected z, 1 to 9 or o")
        labels = np.array(["z123456789o".index(digit) for digit in said], np.int64)
        times, units = file[f"{split}_timestamps"], file[f"{split}_addresses"]
        return _dataset("n_tidigits", "N-TIDIGITS (single digits)", path, labels, 11, 64, slicer, subset,
                        lambda i: (times[names[i]][()], units[names[i]][()]))  # fmt: skip


def _dataset(
    name: str,
    title: str,
    path: Path,
    labels: Array,
    classes: int,
    channels: int,
    slicer: Slicer,
    subset: int | None,
    spikes: Callable[[int], tuple[Any, Any]],
) -> FrameDataset:
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)]
        found = f"label {wrong[0]} out of range" if len(wrong) else "no recordings"
        raise DataFileError(f"{path}: {found}, expected labels 0 to {classes - 1}")
    which, title = chosen(title, len(labels), subset)

    def read(i: int) -> Array:
        seconds, units = (np.asarray(values) for values in spikes(which[i]))
        return _frames(f"{path}: recording {which[i]}", seconds, units, channels, slicer)

    counts = cached(name, {"slicer": repr(slicer), "which": which}, [path], len(which), (channels,), read)
    digits = [str(digit) for digit in range(classes)]
    return FrameDataset(counts, torch.from_numpy(labels[which]), name=name, title=title, classes=digits)


def _frames(where: str, seconds: Array, units: Array, channels: int, slicer: Slicer) -> Array:
    if seconds.shape != units.shape or seconds.ndim != 1 or not len(seconds):
        raise DataFileError(f"{where}: {seconds.shape} times and {units.shape} units, expected as many and at least 1")
    if seconds.dtype.kind != "f" or units.dtype.kind not in "iuf":
        raise DataFileError(f"{where}: times are {seconds.dtype} and units {units.dtype}, expected numbers")
    seconds = seconds.astype(np.float64)
    # Compared so that what is not a number fails too.
    if not ((seconds >= 0) & (seconds <= _LONGEST)).all():
        raise DataFileError(f"{where}: a time outside 0 to {_LONGEST:.0f} s")
    if not ((units >= 0) & (units < channels)).all():
        raise DataFileError(f"{where}: a unit outside 0 to {channels - 1}")
    order = np.argsort(seconds, kind="stable")
    t = np.rint(1e6 * seconds[order]).astype(np.int64)
    index, steps = slicer(t)
    return accumulate(units[order].astype(np.int64), index, steps, (channels,))


def _found(folder: Path, places: Sequence[str], name: str) -> Path:
    paths = [folder / place / name for place in places]
    return next((path for path in paths if path.is_file()), paths[0])


@contextlib.contextmanager
def _opened(path: Path) -> Generator[Any]:
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError:
        raise UsageError(f"reading {path} needs h5py: pip install 'spikeloom[events]'") from None
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UsageError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError, ValueError, RuntimeError, ... on damaged files
        raise DataFileError(
            f"{path}: damaged or not an HDF5 file of this set: {' '.join(str(error).split())}"
        ) from None
