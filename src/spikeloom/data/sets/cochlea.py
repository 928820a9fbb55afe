"""Spoken digits as a cochlea's spikes: SHD (a model's) and N-TIDIGITS (a silicon one's), as frames [T, channels]."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spikeloom.data.cache import cache_place, cached, writing
from spikeloom.data.formats import hdf5
from spikeloom.data.formats.events import Array
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.frames import Slicer, Slicing, accumulate
from spikeloom.data.locate import Source, data_root, fetch_with_tonic, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.sets.dvs import Place
from spikeloom.data.subset import chosen
from spikeloom.errors import DataFileError, UsageError

SHD_SOURCE = Source(
    "SHD",
    "get shd_train.h5.zip and shd_test.h5.zip from https://zenkelab.org/resources/spiking-heidelberg-datasets-shd/ "
    "and unpack them there",
    (("SHD/shd_train.h5", "SHD/shd_test.h5"), ("shd_train.h5", "shd_test.h5")),
    {"train": 8_156, "test": 2_264},
    20,
)
NTIDIGITS_SOURCE = Source(
    "N-TIDIGITS",
    "get n-tidigits.hdf5, see https://docs.google.com/document/d/1Uxe7GsKKXcy6SlDUX4hoJVAC0-UkH-8kr5UXp0Ndi1M",
    (("NTIDIGITS18/n-tidigits.hdf5",), ("NTIDIGITS/n-tidigits.hdf5",), ("n-tidigits.hdf5",)),
    {},  # what is published counts the recordings of several digits as well
    11,
)
_PATIENCE = 60.0  # seconds for reading an HDF5 file, and one more for each megabyte
_LONGEST = 60.0  # seconds: a damaged time must not make a million frames


@register(SHD_SOURCE)
def shd(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "time",
    T: int | None = None,
    dt: float | None = None,
    pool: int = 1,
    download: bool = False,
) -> FrameDataset:
    """Spiking Heidelberg Digits: 20 spoken digits (German and English), 700 channels, frames [T, 700 / pool].

    Read from root/SHD/shd_{train,test}.h5 (also from root itself): 8,156 and 2,264 recordings. Needs h5py, which comes
    with the extra `events`.

    Args:
        subset: take only n recordings, spread evenly.
        frames, T, dt: as `nmnist`; by default 15 parts of equal duration.
        pool: neighbouring channels whose spikes are added up, a divisor of 700.
        download: fetch missing files with tonic.
    """
    slicer = Slicer.filled(frames, T, dt, 15)
    check_integer("pool", pool, 1, 700)
    if 700 % pool:
        raise UsageError(f"pool must divide the 700 channels, got {pool}: 2, 4, 5, 7 or 10, say")
    folder = data_root(root, SHD_SOURCE)
    path = _found(folder, ("SHD", ""), f"shd_{split}.h5")
    if download and not path.is_file():
        fetch_with_tonic("SHD", folder, train=split == "train")
    if not path.is_file():
        raise missing(SHD_SOURCE, folder, path)
    columns = _columns(path, "shd", split)
    labels = columns.labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(columns.ends):
        raise DataFileError(f"{path}: {labels.dtype} labels {labels.shape} for {len(columns.ends)} recordings")
    return _dataset("shd", "SHD", columns, labels.astype(np.int64), 20, 700, slicer, subset, pool)


@register(NTIDIGITS_SOURCE)
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
    """N-TIDIGITS, the recordings of a single digit: 11 classes ("zero" 0, "oh" 10), 64 channels, frames [T, 64].

    Read from root/NTIDIGITS18/n-tidigits.hdf5 (also from root itself). Needs h5py, which comes with the extra `events`.

    Args:
        subset, download: as `shd`.
        frames, T, dt: as `nmnist`; by default windows of 5 ms from t = 0.
    """
    slicer = Slicer.filled(frames, T, dt)
    folder = data_root(root, NTIDIGITS_SOURCE)
    path = _found(folder, ("NTIDIGITS18", "NTIDIGITS", ""), "n-tidigits.hdf5")
    if download and not path.is_file():
        fetch_with_tonic("NTIDIGITS18", folder, train=split == "train")
    if not path.is_file():
        raise missing(NTIDIGITS_SOURCE, folder, path)
    columns = _columns(path, "n_tidigits", split)
    # A name ends in what was said: "...-z" or "...-1o3". Labels are strings; those of one digit are kept.
    names = [str(name) for name in columns.labels]
    said = [name.split("-")[-1] for name in names]
    wrong = next((i for i, digit in enumerate(said) if digit not in "z123456789o"), None)
    if wrong is not None:
        raise DataFileError(f"{path}: recording {names[wrong]!r}: label {said[wrong]!r}, expected z, 1 to 9 or o")
    labels = np.array(["z123456789o".index(digit) for digit in said], np.int64)
    return _dataset("n_tidigits", "N-TIDIGITS (single digits)", columns, labels, 11, 64, slicer, subset)


@dataclass(frozen=True)
class Columns:
    """What `hdf5` took out of a file, see there; the spikes are read when they are asked for."""

    path: Path
    labels: Array
    ends: Array
    npz: Path

    def recordings(self) -> Callable[[int], tuple[Array, Array]]:
        """Times and units of a recording, by its index.

        Raises:
            DataFileError: there are not as many times as units.
        """
        times, units, unit_ends = _loaded(self.npz, "times", "units", "unit_ends")
        if times.ndim != 1 or units.ndim != 1 or not np.array_equal(self.ends, unit_ends):
            both = min(len(self.ends), len(unit_ends))
            first = int(np.argmax(np.append(self.ends[:both] != unit_ends[:both], True)))
            raise DataFileError(f"{self.path}: recording {first} does not have as many times as units")
        starts = np.concatenate([[0], self.ends])
        return lambda i: (times[starts[i] : starts[i + 1]], units[starts[i] : starts[i + 1]])


def _columns(path: Path, kind: str, split: str) -> Columns:
    """The columns of an HDF5 file, from the cache or taken out of it now.

    Raises:
        DataFileError: the file is damaged or of another kind.
        UsageError: h5py is not installed, or the cache cannot be written.
    """
    place = cache_place(f"{kind}_{split}", [split], [path]).with_suffix(".npz")
    for _ in range(2):
        try:
            labels, ends = _loaded(place, "labels", "ends")
            return Columns(path, labels, ends, place)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            with writing(place) as temporary:
                _extract(kind, split, path, temporary)
    raise DataFileError(f"{path}: what it holds cannot be kept: numbers of another kind than those of {kind}")


def _loaded(path: Path, *names: str) -> tuple[Array, ...]:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as npz:
        return tuple(npz[name] for name in names)


def _extract(kind: str, split: str, path: Path, out: Path) -> None:
    if importlib.util.find_spec("h5py") is None:
        raise UsageError(f"reading {path} needs h5py: pip install 'spikeloom[events]'")
    size = path.stat().st_size
    words = [sys.executable, hdf5.__file__, kind, split, str(path), str(out), str(2**32 + 10 * size)]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_PATIENCE + size / 1e6, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataFileError(f"{path}: damaged: the HDF5 library does not come to an end") from None
    if done.returncode:
        crashed = "the HDF5 library crashes" if done.returncode < 0 else "unknown reason"
        reason = (done.stderr.strip().splitlines() or [crashed])[-1] if done.returncode > 0 else crashed
        raise DataFileError(f"{path}: damaged or not an HDF5 file of this set: {reason}")


def _dataset(
    name: str,
    title: str,
    columns: Columns,
    labels: Array,
    classes: int,
    channels: int,
    slicer: Slicer,
    subset: int | None,
    pool: int = 1,
) -> FrameDataset:
    path = columns.path
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)]
        found = f"label {wrong[0]} out of range" if len(wrong) else "no recordings"
        raise DataFileError(f"{path}: {found}, expected labels 0 to {classes - 1}")
    which, title = chosen(title, len(labels), subset)

    spikes: Callable[[int], tuple[Array, Array]] | None = None

    def read(i: int) -> Array:
        nonlocal spikes
        spikes = spikes or columns.recordings()  # only when frames are made
        seconds, units = spikes(which[i])
        return _frames(f"{path}: recording {which[i]}", seconds, units, channels, slicer, pool)

    key = {"slicer": repr(slicer), "which": which, "part": labels.tolist(), "pool": pool}
    counts = cached(name, key, [path], len(which), (channels // pool,), read)
    digits = [str(digit) for digit in range(classes)]
    all_labels = torch.from_numpy(labels)
    return FrameDataset(counts, all_labels[which], name=name, title=title, classes=digits, all_labels=all_labels)


def _frames(where: str, seconds: Array, units: Array, channels: int, slicer: Slicer, pool: int) -> Array:
    if not len(seconds):
        raise DataFileError(f"{where}: holds no spikes")
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
    return accumulate(units[order].astype(np.int64) // pool, index, steps, (channels // pool,))


def _found(folder: Path, places: Sequence[str], name: str) -> Path:
    paths = [folder / place / name for place in places]
    return next((path for path in paths if path.is_file()), paths[0])
