"""Event-camera data sets by name, from their originals or from what tonic downloads, as frames [T, 2, H, W]."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from spikeloom.data.cache import cached
from spikeloom.data.formats.events import Array, EventFileError, Events, Outside
from spikeloom.data.formats.read import read_events
from spikeloom.data.frame_dataset import FrameDataset, Resize
from spikeloom.data.frames import Slicer, Slicing, accumulate, check_number
from spikeloom.data.locate import Source, data_root, fetch_with_tonic, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.subset import chosen
from spikeloom.errors import DataFileError, UsageError

Place = str | os.PathLike[str] | None
Part = Literal["last", "first", "random"]

NMNIST_SOURCE = Source(
    "N-MNIST",
    "get Train.zip and Test.zip from https://www.garrickorchard.com/datasets/n-mnist and unpack them there, in NMNIST",
    (("NMNIST/Train/<digit>/<number>.bin", "NMNIST/Test/<digit>/<number>.bin"),),
    {"train": 60_000, "test": 10_000},
    10,
)
CIFAR10_DVS_SOURCE = Source(
    "CIFAR10-DVS",
    "get the ten archives from https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671 and unpack them there, "
    "in CIFAR10DVS",
    (("CIFAR10DVS/<class>/<name>.aedat",), ("CIFAR10DVS/<class>/<name>.aedat4",)),
    {"train": 9_000, "test": 1_000},
    10,
)
CALTECH_SOURCE = Source(
    "N-Caltech101",
    "get Caltech101.zip from https://www.garrickorchard.com/datasets/n-caltech101 and unpack it there",
    (("NCALTECH101/Caltech101/<class>/<name>.bin",), ("Caltech101/<class>/<name>.bin",)),
    {"both": 8_709},
    101,
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Cut:
    """One recording of a data set: its file, its label and, where the file holds several, its time in microseconds."""

    path: Path
    label: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Reader:
    """Reads the recordings of a set.

    Args:
        sensor: (width, height) that they must fit.
        outside: what becomes of events outside the sensor, see `read_events`.

    Raises:
        UsageError: another `outside`.
    """

    sensor: tuple[int, int]
    outside: Outside = "error"

    def __post_init__(self):
        if self.outside not in get_args(Outside):
            raise UsageError(f"outside must be 'error' or 'drop', got {self.outside!r}")

    def __call__(self, path: Path) -> Events:
        """The events of a file; warns where some were dropped."""
        return self.told(path, read_events(path, self.sensor, outside=self.outside))

    def told(self, path: Path, events: Events) -> Events:
        """The events, after a warning if some were dropped."""
        if events.dropped:
            width, height = self.sensor
            warnings.warn(
                f"{path}: left out {events.dropped} of {len(events) + events.dropped} events, which lie outside the "
                f"sensor of {width}x{height}",
                stacklevel=2,
            )
        return events


@dataclass(frozen=True)
class Framing:
    """How recordings become frames; the fields are options of the data sets, see `nmnist` and `cifar10_dvs`."""

    slicer: Slicer
    downsample: float | None = None
    polarity: int | None = None

    def __post_init__(self):
        if self.downsample is not None:
            check_number("downsample", self.downsample, 1, 1000)
        if self.polarity is not None:
            check_integer("polarity", self.polarity, 0, 1)

    def shape(self, sensor: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of a frame."""
        width, height = (int((side - 1) / (self.downsample or 1)) + 1 for side in sensor)
        return (2 if self.polarity is None else 1), height, width

    def __call__(self, events: Events, path: Path) -> Array:
        """Frames [T, *shape] of a recording.

        Raises:
            EventFileError: it has no events, or for frames by count fewer than frames.
        """
        least = self.slicer.T or 1 if self.slicer.frames == "count" else 1
        if len(events) < least:
            raise EventFileError(f"{path}: a recording of {len(events)} events is too short, expected at least {least}")
        return self.count(events, *self.slicer(events.t))

    def count(self, events: Events, index: Array, steps: int) -> Array:
        """Counts int64 [steps, *shape] of events, by the frame that each falls in, -1: none.

        Raises:
            UsageError: an event outside the sensor.
        """
        events.check()
        channels, height, width = shape = self.shape((events.width, events.height))
        x, y, p = events.x.astype(np.int64), events.y.astype(np.int64), events.p
        if self.downsample is not None:
            x, y = (x / self.downsample).astype(np.int64), (y / self.downsample).astype(np.int64)
        if self.polarity is not None:
            index = np.where(p == self.polarity, index, -1)
        cell = y * width + x
        if channels == 2:
            cell += p.astype(np.int64) * (height * width)
        return accumulate(cell, index, steps, shape)


def dataset_of(
    name: str,
    title: str,
    cuts: Sequence[Cut],
    subset: int | None,
    classes: Sequence[str],
    reader: Reader,
    framing: Framing,
    read: Callable[[Cut], Events],
    size: int | None = None,
    resize: Resize = "bilinear",
    flatten: bool = False,
) -> FrameDataset:
    """Recordings as frames, which are kept in the cache.

    Args:
        name, title, classes: as `ImageDataset`.
        cuts: where each recording is, with its label.
        subset, size, resize, flatten: as `cifar10_dvs` and `nmnist`.
        reader, framing: how recordings are read, and become frames.
        read: the events of a recording.
    """
    if size is not None:
        check_integer("size", size, 1, 4096)
    which, title = chosen(title, len(cuts), subset)
    all_labels = torch.tensor([cut.label for cut in cuts], dtype=torch.int64)
    cuts = [cuts[i] for i in which]
    key = {"framing": repr(framing), "cuts": [(str(c.path), c.start, c.end) for c in cuts], "sensor": reader.sensor}
    if reader.outside == "drop":
        key["outside"] = "drop"
        title += ", without events outside the sensor"
    sources = sorted({cut.path for cut in cuts})
    counts = cached(
        name, key, sources, len(cuts), framing.shape(reader.sensor), lambda i: framing(read(cuts[i]), cuts[i].path)
    )
    return FrameDataset(
        counts,
        all_labels[which],
        name=name,
        title=title,
        classes=classes,
        size=size,
        resize=resize,
        flatten=flatten,
        all_labels=all_labels,
    )


@register(NMNIST_SOURCE)
def nmnist(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "count",
    T: int | None = None,
    dt: float | None = None,
    polarity: int | None = None,
    size: int | None = None,
    resize: Resize = "bilinear",
    flatten: bool = False,
    outside: Outside = "error",
    download: bool = False,
) -> FrameDataset:
    """N-MNIST: MNIST digits seen by an event camera in three saccades, 34x34, frames [T, 2, 34, 34].

    Read from root/NMNIST/{Train,Test}/<digit>/<number>.bin, however many there are.

    Args:
        subset: take only n recordings, spread evenly over the classes.
        frames: "count" and "time" cut a recording into T parts of equal number of events or duration; "windows" takes
            T windows of dt from the first event; "bins" takes windows of dt from t = 0, as many as there are.
        T: frames, by default 10.
        dt: milliseconds of a window, by default 5.
        polarity: 0 or 1 takes only these events, as one channel.
        size, resize: as `cifar10_dvs`.
        flatten: give a frame as one axis.
        outside: "drop" leaves out events outside the sensor, and warns how many there were; "error" refuses the file.
        download: fetch missing files with tonic.
    """
    slicer, reader = Slicer.filled(frames, T, dt), Reader((34, 34), outside)
    folder = data_root(root, NMNIST_SOURCE)
    part = folder / "NMNIST" / split.capitalize()
    if download and not part.is_dir():
        fetch_with_tonic("NMNIST", folder, train=split == "train")
    if not part.is_dir():
        raise missing(NMNIST_SOURCE, folder, part / "0" / "00001.bin")
    cuts = [Cut(path, label) for label in range(10) for path in _files(part / str(label), "*.bin")]
    _only_digits(part)
    whole = len(cuts) == {"train": 60_000, "test": 10_000}[split]
    title = "N-MNIST" if whole else f"N-MNIST files of {len(cuts)} recordings"
    return dataset_of(
        "nmnist",
        title,
        cuts,
        subset,
        [str(digit) for digit in range(10)],
        reader,
        Framing(slicer, polarity=polarity),
        lambda cut: reader(cut.path),
        size,
        resize,
        flatten,
    )


@register(CIFAR10_DVS_SOURCE)
def cifar10_dvs(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "count",
    T: int | None = None,
    dt: float | None = None,
    test_part: Part = "last",
    downsample: float | None = None,
    size: int | None = None,
    resize: Resize = "bilinear",
    outside: Outside = "error",
    download: bool = False,
) -> FrameDataset:
    """CIFAR10-DVS: 10,000 moving CIFAR-10 pictures seen by a DVS128, 128x128, frames [T, 2, 128, 128].

    Read from root/CIFAR10DVS/<class>/: the originals (.aedat) or what tonic downloads (.aedat4). There is no official
    split. Originals are turned upright and their polarity made 1 for brighter, as the field's loaders do.

    Args:
        subset, frames, T, dt, outside, download: as `nmnist`.
        test_part: a tenth of every class, in the order of the files' numbers: "last" (Spikformer, SEW), "first" (PSN:
            files 0 to 99), or "random", the same at every call.
        downsample: divide coordinates by this number and round down (3.04 gives 42x42).
        size: side to resize frames to as they are read.
        resize: how: "nearest", "bilinear" or "bilinear_corners", which aligns the corners.
    """
    slicer, reader = Slicer.filled(frames, T, dt), Reader((128, 128), outside)
    folder = data_root(root, CIFAR10_DVS_SOURCE)
    base = folder / "CIFAR10DVS"
    if download and not base.is_dir():
        fetch_with_tonic("CIFAR10DVS", folder)
    cuts = _by_class(base, CIFAR10_CLASSES, ("*.aedat", "*.aedat4"), split, test_part, folder, CIFAR10_DVS_SOURCE)
    title = f"CIFAR10-DVS ({test_part} tenth for testing)"
    return dataset_of(
        "cifar10_dvs",
        title,
        cuts,
        subset,
        CIFAR10_CLASSES,
        reader,
        Framing(slicer, downsample),
        lambda cut: upright(reader(cut.path), cut.path),
        size,
        resize,
    )


def upright(events: Events, path: Path) -> Events:
    """A recording of CIFAR10-DVS as the field's loaders turn it; what tonic downloads is turned already."""
    if path.suffix == ".aedat4":
        return events
    return Events(events.t, 127 - events.y, 127 - events.x, 1 - events.p, 128, 128)


@register(CALTECH_SOURCE)
def n_caltech101(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "count",
    T: int | None = None,
    dt: float | None = None,
    test_part: Part = "last",
    size: int | None = None,
    resize: Resize = "bilinear",
    outside: Outside = "error",
    download: bool = False,
) -> FrameDataset:
    """N-Caltech101: Caltech-101 pictures seen by an event camera, frames [T, 2, 180, 240], 101 classes.

    Read from root/NCALTECH101/Caltech101/<class>/ or root/Caltech101/<class>/, one .bin file a picture. There is no
    official split. Pictures differ in size: all lie at the top left of a frame.

    Args:
        subset, frames, T, dt, outside, download: as `nmnist`.
        test_part, size, resize: as `cifar10_dvs`.
    """
    slicer, reader = Slicer.filled(frames, T, dt), Reader((240, 180), outside)
    folder = data_root(root, CALTECH_SOURCE)
    base = next(
        (p for p in (folder / "NCALTECH101" / "Caltech101", folder / "Caltech101") if p.is_dir()),
        folder / "NCALTECH101" / "Caltech101",
    )
    if download and not base.is_dir():
        fetch_with_tonic("NCALTECH101", folder)
    classes = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    if len(classes) != 101:
        first = base / "Faces_easy" / "image_0001.bin"
        raise missing(CALTECH_SOURCE, folder, first, f" (there are {len(classes)} of 101 classes)")
    cuts = _by_class(base, classes, ("*.bin",), split, test_part, folder, CALTECH_SOURCE)
    title = f"N-Caltech101 ({test_part} tenth for testing)"
    return dataset_of(
        "n_caltech101",
        title,
        cuts,
        subset,
        classes,
        reader,
        Framing(slicer),
        lambda cut: reader(cut.path),
        size,
        resize,
    )


# --- folders ----------------------------------------------------------------------------------------------------------


def _files(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder in the order of the last number in their names."""

    def number(path: Path) -> tuple[int, str]:
        digits = re.findall(r"\d{1,15}", path.stem)
        return (int(digits[-1]) if digits else -1), path.name

    return sorted((path for pattern in patterns for path in folder.glob(pattern)), key=number)


def _only_digits(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not (path.name.isdecimal() and int(path.name) < 10):
            raise DataFileError(f"{path}: label {path.name!r} out of range, expected folders 0 to 9")


def _by_class(
    base: Path,
    classes: Sequence[str],
    patterns: tuple[str, ...],
    split: str,
    test_part: Part,
    folder: Path,
    source: Source,
) -> list[Cut]:
    """The recordings of one part; a class's files 0.9 n and on are the last tenth, those below 0.1 n the first."""
    if test_part not in ("last", "first", "random"):
        raise UsageError(f"test_part must be last, first or random, got {test_part!r}")
    cuts: list[Cut] = []
    for label, name in enumerate(classes):
        paths = _files(base / name, *patterns)
        if not paths:
            raise missing(source, folder, base / name / patterns[0])
        held = len(paths) // 10  # so that the training part is rounded up
        order = np.arange(len(paths))
        if test_part == "random":
            order = np.random.default_rng((label, len(paths))).permutation(len(paths))
        test = order[:held] if test_part == "first" else order[len(paths) - held :]
        for i, path in enumerate(paths):
            if (i in test) == (split == "test"):
                cuts.append(Cut(path, label))
    return cuts
