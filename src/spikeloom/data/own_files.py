"""A user's own files, made into what a data set would have made of them: pictures, event recordings, sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spikeloom.data.base import LabelledDataset
from spikeloom.data.cache import Counts
from spikeloom.data.image_dataset import ImageDataset, columns
from spikeloom.data.recording_frames import SENSORS, RecordingFrames
from spikeloom.data.sets.audio import encoded, read_wav
from spikeloom.data.sets.dvs import CIFAR10_CLASSES
from spikeloom.data.sets.dvs_gesture import GESTURES
from spikeloom.data.sets.imagenet import Pictures
from spikeloom.data.sets.own import normalisation
from spikeloom.data.sets.vision import DIGITS, NORMALISATION, padded
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.errors import UsageError

Json = dict[str, Any]

_SIDES = {  # of pictures; ImageNet's is `size`
    "digits": 8,
    "mnist": 28,
    "cifar10": 32,
    "cifar100": 32,
    "imagenet": None,
}
_NAMES: dict[str, Sequence[str]] = {
    "digits": DIGITS,
    "mnist": DIGITS,
    "cifar10": CIFAR10_CLASSES,
    "nmnist": DIGITS,
    "cifar10_dvs": CIFAR10_CLASSES,
    "dvs_gesture": GESTURES,
    "fsdd": DIGITS,
}


def own_files(
    name: str, options: Json, paths: Sequence[Path], num_classes: int, classes: Sequence[str] | None = None
) -> LabelledDataset:
    """Files as a data set shows its own to a network; their labels are all 0, which means nothing.

    Pictures (JPEG or PNG) are cut to the square in their middle and resized to the set's side; grey sets take their
    brightness, digits being bright on dark. Recordings are of any format of `read_events` and fit the set's sensor.
    Sound is WAV of 8 kHz, one channel, 16 bits.

    Args:
        name: of the data set that the network was trained on.
        options: of that data set; those about its files are not used.
        paths: the files.
        num_classes: of the network.
        classes: their names; without them those of the set, or numbers where its names come with its files.

    Raises:
        DataFileError: a file that cannot be read, or is of another kind.
        UsageError: a data set for whose inputs there is no file format.
    """
    labels = torch.zeros(len(paths), dtype=torch.int64)
    kind = name.removeprefix("sequential_")
    about: Json = {"name": name, "title": "own files", "classes": class_names(name, num_classes, classes)}
    if kind in _SIDES or kind == "folder":
        side = _SIDES.get(kind) or options.get("size", 224 if kind == "imagenet" else 32)
        mean, std = NORMALISATION.get(kind) or normalisation(
            1 if options.get("gray") else 3, options.get("mean"), options.get("std")
        )
        cut = kind in ("imagenet", "folder")
        pictures = Pictures(paths, side, (options.get("resize") if cut else None) or side, len(mean))
        images = torch.stack([pictures[index] for index in range(len(paths))])
        return ImageDataset(
            padded(images, options.get("size") if kind in ("digits", "mnist") else None),
            labels,
            mean=mean,
            std=std,
            to_sequence=columns if kind != name else None,
            resize=None if cut else options.get("resize"),
            **about,
        )
    if name in SENSORS or name == "recordings":
        frames = RecordingFrames(name, options)
        parts = [frames.cut(path) for path in paths]
        counts = Counts(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))
        return frames.dataset(counts, labels, **about)
    if name in ("fsdd", "audio"):
        spikes = encoded([read_wav(path) for path in paths], options.get("T", 100), options.get("bands", 40))
        return SpikeDataset(spikes, labels, **about)
    raise UsageError(
        f"a network for {name} takes no files: those that do are for pictures ({', '.join(_SIDES)}, folder), "
        f"recordings ({', '.join(SENSORS)}, recordings) and sound (fsdd, audio)"
    )


def class_names(name: str, num_classes: int, classes: Sequence[str] | None = None) -> list[str]:
    """Names of a network's classes: those given, or those of its data set, or numbers; arguments as of `own_files`."""
    names = classes or _NAMES.get(name.removeprefix("sequential_")) or [str(label) for label in range(num_classes)]
    return list(names)[:num_classes]
