"""A user's own files, made into what a data set would have made of them: pictures, event recordings, sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikeloom.data.base import LabelledDataset
from spikeloom.data.cache import Counts
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.frames import Slicer
from spikeloom.data.image_dataset import ImageDataset, columns
from spikeloom.data.sets.audio import encoded, read_wav
from spikeloom.data.sets.dvs import CIFAR10_CLASSES, GESTURES, Framing, Reader, upright
from spikeloom.data.sets.imagenet import Pictures
from spikeloom.data.sets.vision import DIGITS, NORMALISATION, padded
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.errors import UsageError

Json = dict[str, Any]

# Side of the pictures of each set, and what they are called.
_PICTURES: dict[str, tuple[int, Sequence[str] | None]] = {
    "digits": (8, DIGITS),
    "mnist": (28, DIGITS),
    "cifar10": (32, CIFAR10_CLASSES),
    "cifar100": (32, None),
}
# Sensor of the recordings of each set (width, height), and what they are called.
_RECORDINGS: dict[str, tuple[tuple[int, int], Sequence[str] | None]] = {
    "nmnist": ((34, 34), DIGITS),
    "cifar10_dvs": ((128, 128), CIFAR10_CLASSES),
    "dvs_gesture": ((128, 128), GESTURES),
    "n_caltech101": ((240, 180), None),
}


def own_files(name: str, options: Json, paths: Sequence[Path], num_classes: int) -> LabelledDataset:
    """Files as a data set shows its own to a network; their labels are all 0, which means nothing.

    Pictures (JPEG or PNG) are cut to the square in their middle and resized to the set's side; grey sets take their
    brightness, digits being bright on dark. Recordings are of any format of `read_events` and fit the set's sensor.
    Sound is WAV of 8 kHz, one channel, 16 bits.

    Args:
        name: of the data set that the network was trained on.
        options: of that data set; those about its files are not used.
        paths: the files.
        num_classes: of the network, which are called by number where the set's names come with its files.

    Raises:
        DataFileError: a file that cannot be read, or is of another kind.
        UsageError: a data set for whose inputs there is no file format.
    """
    labels = torch.zeros(len(paths), dtype=torch.int64)
    described: Json = {"name": name, "title": "own files"}
    kind = name.removeprefix("sequential_")
    if kind in _PICTURES or kind == "imagenet":
        side, classes = _PICTURES.get(kind, (options.get("size", 224), None))
        mean, std = NORMALISATION[kind]
        enlarged = kind in ("cifar10", "cifar100")
        pictures = Pictures(paths, side, options.get("resize") or side if kind == "imagenet" else side, len(mean))
        images = torch.stack([pictures[index] for index in range(len(paths))])
        return ImageDataset(
            padded(images, options.get("size") if kind in ("digits", "mnist") else None), labels,
            classes=classes or _numbers(num_classes), mean=mean, std=std,
            to_sequence=columns if kind != name else None, resize=options.get("resize") if enlarged else None,
            **described,
        )  # fmt: skip
    if name in _RECORDINGS:
        sensor, classes = _RECORDINGS[name]
        return FrameDataset(
            _counts(name, options, paths, sensor), labels, classes=(classes or _numbers(num_classes))[:num_classes],
            size=options.get("size"), resize=options.get("resize", "bilinear"), flatten=options.get("flatten", False),
            **described,
        )  # fmt: skip
    if name == "fsdd":
        spikes = encoded([read_wav(path) for path in paths], options.get("T", 100), options.get("bands", 40))
        return SpikeDataset(spikes, labels, classes=DIGITS, **described)
    raise UsageError(
        f"a network for {name} takes no files: those that do are for pictures ({', '.join(_PICTURES)}, imagenet), "
        f"recordings ({', '.join(_RECORDINGS)}) and sound (fsdd)"
    )


def _numbers(count: int) -> list[str]:
    return [str(label) for label in range(count)]


def _counts(name: str, options: Json, paths: Sequence[Path], sensor: tuple[int, int]) -> Counts:
    """The frames of recordings, in memory."""
    reader = Reader(sensor, options.get("outside", "error"))
    slicer = Slicer.filled(options.get("frames", "count"), options.get("T"), options.get("dt"))
    framing = Framing(slicer, options.get("downsample"), options.get("polarity"))
    parts: list[Any] = []
    for path in paths:
        events = reader(path)
        parts.append(framing(upright(events, path) if name == "cifar10_dvs" else events, path))
    return Counts(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
