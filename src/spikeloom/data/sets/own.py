"""A user's own data without writing a data set: folders of pictures, recordings or sound by class, and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.formats.events import Array
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.frames import Slicer, Slicing, check_number
from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.locate import Source, data_root
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.sets.audio import encoded, read_wav
from spikeloom.data.sets.dvs import Cut, Framing, Place, Reader, Resize, dataset_of
from spikeloom.data.sets.imagenet import Pictures, check_min_area
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.data.subset import chosen, stratified
from spikeloom.errors import DataFileError, UsageError

Json = dict[str, Any]
_MOST_CLASSES = 100_000
_IN_MEMORY = 1 << 29  # bytes of decoded pictures that are kept; more are decoded when they are read
_SOURCE = Source(
    "your own data",
    "make it: one folder for each class, its files inside, and of a given split train/ and test/ above them",
    (("train/<class>/<file>", "test/<class>/<file>"), ("<class>/<file>",)),
)
_ARRAYS = Source(
    "your own data",
    "write arrays with numpy.savez(FOLDER/train.npz, x=x, y=y)",
    (("train.npz", "test.npz"), ("data.npz",)),
)


@register(_SOURCE)
def folder(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    size: int = 32,
    resize: int | None = None,
    min_area: float | None = None,
    gray: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    test: float = 0.2,
    draws: int = 0,
) -> ImageDataset:
    """Pictures (JPEG, PNG) in folders of classes: root/{train,test}/<class>/, or root/<class>/, which is split.

    Args:
        subset: take only n pictures, evenly spread over the classes.
        size: side of the square cut out of the middle.
        resize: what the shorter side becomes before, at least `size` and by default `size` itself.
        min_area: of the training part, instead of the middle: as `imagenet`.
        gray: one channel of brightness instead of RGB.
        mean, std: of each channel on the scale 0 to 1; 0.5 and 0.25 without them.
        test: without a given split, the share of every class that is for testing.
        draws: seeds that split.
    """
    check_integer("size", size, 1, 4096)
    if resize is not None:
        check_integer("resize", resize, size, why=", size")
    if min_area is not None:
        check_min_area(min_area)
    channels = 1 if gray else 3
    mean, std = normalisation(channels, mean, std, " with gray=true" if gray else ", or 1 with gray=true")
    drawn = min_area if split == "train" else None
    classes, paths, labels, title = _by_class(root, split, "pictures", (".jpeg", ".jpg", ".png"), test, draws)
    which, title = chosen(title, len(paths), subset)
    images: Any = Pictures([paths[i] for i in which], size, resize or size, channels, drawn)
    if drawn is None and len(which) * channels * size**2 <= _IN_MEMORY:
        images = torch.stack([images[i] for i in range(len(which))])
    all_labels = torch.tensor(labels)
    return ImageDataset(
        cast("Tensor", images),
        all_labels[which],
        all_labels=all_labels,
        name="folder",
        title=title,
        classes=classes,
        mean=mean,
        std=std,
    )


@register(_SOURCE)
def recordings(
    root: Place,
    split: str,
    *,
    sensor: tuple[int, int],
    subset: int | None = None,
    frames: Slicing = "count",
    T: int | None = None,
    dt: float | None = None,
    downsample: float | None = None,
    polarity: int | None = None,
    size: int | None = None,
    resize: Resize = "bilinear",
    flatten: bool = False,
    test: float = 0.2,
    draws: int = 0,
) -> FrameDataset:
    """Recordings of an event camera in folders of classes, in any format of `read_events`; folders as of `folder`.

    Args:
        sensor: width and height in pixels, which all recordings fit.
        subset, test, draws: as `folder`.
        frames, T, dt, polarity, flatten: as `nmnist`.
        downsample, size, resize: as `cifar10_dvs`.
    """
    width, height = sensor
    for name, side in (("width of sensor", width), ("height of sensor", height)):
        check_integer(name, side, 1, 8192)
    reader = Reader((width, height))
    classes, paths, labels, title = _by_class(root, split, "recordings", None, test, draws)
    cuts = [Cut(path, label) for path, label in zip(paths, labels, strict=True)]
    framing = Framing(Slicer.filled(frames, T, dt), downsample, polarity)
    return dataset_of(
        "recordings", title, cuts, subset, classes, reader, framing, lambda cut: reader(cut.path), size, resize, flatten
    )


@register(_SOURCE)
def audio(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    T: int = 100,
    bands: int = 40,
    test: float = 0.2,
    draws: int = 0,
) -> SpikeDataset:
    """Sound (WAV, 8 kHz, one channel, 16 bits) in folders of classes, encoded to spikes as `fsdd`.

    Folders as of `folder`.

    Args:
        subset, test, draws: as `folder`.
        T, bands: as `fsdd`.
    """
    check_integer("T", T, 1)
    check_integer("bands", bands, 1, 128)
    classes, paths, labels, title = _by_class(root, split, "sound", (".wav",), test, draws)
    which, title = chosen(title, len(paths), subset)
    spikes = encoded([read_wav(paths[i]) for i in which], T, bands)
    all_labels = torch.tensor(labels)
    return SpikeDataset(spikes, all_labels[which], name="audio", title=title, classes=classes, all_labels=all_labels)


@register(_ARRAYS)
def arrays(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    test: float = 0.2,
    draws: int = 0,
) -> ImageDataset | SpikeDataset:
    """Arrays x and y of NumPy: root/{train,test}.npz, or root/data.npz, which is split.

    x uint8 [N, C, H, W] are pictures, x uint8 [N, T, features] counts of spikes at each step; y are labels from 0 on.

    Args:
        subset: take only the first n.
        mean, std: of pictures, as `folder`.
        test, draws: as `folder`.
    """
    place = data_root(root, _ARRAYS)
    given = (place / "train.npz").is_file()
    x, y = _read_arrays(place / (f"{split}.npz" if given else "data.npz"))
    count = int(y.max()) + 1
    if given and split == "test":
        count = max(count, int(_read_arrays(place / "train.npz")[1].max()) + 1)
    if not given:
        kept = np.flatnonzero(_held(y.tolist(), test, draws) == (split == "test"))
        x, y = x[kept], y[kept]
    title, all_labels = f"arrays of {place.name}", torch.from_numpy(y.astype(np.int64))
    if subset is not None:
        check_integer("subset", subset, 1, len(y), f", the number of samples of {title}")
        title = title if subset == len(y) else f"{title}, first {subset} samples"
        x, y = x[:subset], y[:subset]
    classes = [str(label) for label in range(count)]
    about: Json = {"name": "arrays", "title": title, "classes": classes, "all_labels": all_labels}
    inputs, labels = torch.from_numpy(np.ascontiguousarray(x)), all_labels[:subset]
    if x.ndim == 3:
        return SpikeDataset(inputs, labels, **about)
    mean, std = normalisation(x.shape[1], mean, std, ", one for each channel of x")
    return ImageDataset(inputs, labels, mean=mean, std=std, **about)


def normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None, why: str = ""
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, where they are not given 0.5 and 0.25.

    Args:
        why: there are so many channels, for messages.

    Raises:
        UsageError: not a number for each channel, or one out of range.
    """
    found: list[tuple[float, ...]] = []
    for name, values, default, low in (("mean", mean, 0.5, -1e6), ("std", std, 0.25, 1e-6)):
        each = (default,) * channels if values is None else values
        if not isinstance(each, list | tuple) or len(each) != channels:
            got = list(each) if isinstance(each, tuple) else each
            raise UsageError(f"{name} needs {channels} number{'s' * (channels > 1)}{why}, got {got}")
        for value in each:
            check_number(f"each of {name}", value, low, 1e6)
        found.append(tuple(each))
    return found[0], found[1]


def _read_arrays(path: Path) -> tuple[Array, Array]:
    if not path.is_file():
        raise DataFileError(f"{path}: no such file; write it with numpy.savez({path.name!r}, x=x, y=y)")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as npz:
            x, y = npz["x"], npz["y"]
    except Exception as error:  # what a damaged file can raise has no common class
        raise DataFileError(f"{path}: not a readable .npz file with arrays x and y ({type(error).__name__})") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or not len(x):
        raise DataFileError(f"{path}: x is {x.dtype} {x.shape}, expected uint8 [N, C, H, W] or [N, T, features]")
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() >= _MOST_CLASSES:
        raise DataFileError(f"{path}: y is {y.dtype} {y.shape}, expected {len(x)} labels from 0 on")
    return x, y


def _by_class(
    root: Place, split: str, what: str, endings: tuple[str, ...] | None, test: float, draws: int
) -> tuple[list[str], list[Path], list[int], str]:
    """The classes, and the files of a split with their labels, sorted by class and name; and a title.

    Raises:
        DataFileError: no folders of classes, one without files, or one of the test part that has nothing to train on.
    """
    place = data_root(root, _SOURCE)
    given = (place / "train").is_dir()
    base = place / split if given else place
    classes = _folders(place / "train" if given else place)
    if not classes:
        raise DataFileError(f"{place} holds no folders of classes: {_SOURCE.get}")
    if given and (strange := sorted(set(_folders(base)) - set(classes))):
        raise DataFileError(f"{base / strange[0]}: this class has no folder in {place / 'train'}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = sorted(
            path
            for path in (base / name).glob("*")
            if path.is_file() and not path.name.startswith(".") and (not endings or path.suffix.lower() in endings)
        )
        if not inside:
            kinds = f" ({', '.join(endings)})" if endings else ""
            raise DataFileError(f"{base / name}: a class without {what}{kinds}; add some, or remove the folder")
        paths += inside
        labels += [label] * len(inside)
    if not given:
        kept = np.flatnonzero(_held(labels, test, draws) == (split == "test"))
        paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
    return classes, paths, labels, f"{what} of {place.name}"


def _folders(place: Path) -> list[str]:
    if not place.is_dir():
        return []
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _held(labels: Sequence[int], share: float, draws: int) -> Array:
    """Which samples are for testing: a share of every class, at least one of it, and not all.

    Raises:
        UsageError: the share is no part, or a class has a single sample.
    """
    if not 0 < share < 1:
        raise UsageError(f"test must be a share between 0 and 1, got {share!r}")
    found = torch.as_tensor(labels)
    numbers, counts = found.unique(return_counts=True)
    if (counts < 2).any():
        label = int(numbers[counts < 2][0])
        raise DataFileError(f"class {label} has a single sample, too few to train and test: add some, or leave it out")
    return stratified(found, share, draws, least=1).numpy()
