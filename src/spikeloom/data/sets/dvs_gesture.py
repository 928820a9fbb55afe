"""DVS128 Gesture, from its originals, cut by their labels, or from what tonic downloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spikeloom.data.formats.events import Array, Decoded, EventFile, EventFileError, Events, Outside
from spikeloom.data.formats.read import checked
from spikeloom.data.frame_dataset import FrameDataset, Resize
from spikeloom.data.frames import Slicer, Slicing
from spikeloom.data.locate import Source, data_root, fetch_with_tonic, missing
from spikeloom.data.registry import register
from spikeloom.data.sets.dvs import Cut, Framing, Place, Reader, dataset_of
from spikeloom.errors import DataFileError

GESTURE_SOURCE = Source(
    "DVS128 Gesture",
    "get DvsGesture.tar.gz from https://ibm.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8 and unpack it there, in "
    "DVSGesture",
    (
        (
            "DVSGesture/DvsGesture/user<person>_<light>.aedat",
            "DVSGesture/DvsGesture/user<person>_<light>_labels.csv",
        ),
        ("DVSGesture/ibmGestureTrain/<recording>/<label>.npy", "DVSGesture/ibmGestureTest/<recording>/<label>.npy"),
    ),
    {"train": 1_176, "test": 288},
    11,
)
GESTURES = (
    "hand_clapping",
    "right_hand_wave",
    "left_hand_wave",
    "right_arm_clockwise",
    "right_arm_counter_clockwise",
    "left_arm_clockwise",
    "left_arm_counter_clockwise",
    "arm_roll",
    "air_drums",
    "air_guitar",
    "other_gestures",
)


@register(GESTURE_SOURCE)
def dvs_gesture(
    root: Place,
    split: str,
    *,
    subset: int | None = None,
    frames: Slicing = "count",
    T: int | None = None,
    dt: float | None = None,
    other: bool = True,
    downsample: float | None = None,
    size: int | None = None,
    resize: Resize = "bilinear",
    flatten: bool = False,
    outside: Outside = "error",
    download: bool = False,
) -> FrameDataset:
    """DVS128 Gesture: 11 gestures of 29 people under 3 lights, 128x128, frames [T, 2, 128, 128].

    Read from root/DVSGesture/DvsGesture/: the originals (.aedat, cut by their .csv files; people 1 to 23 train, 24 to
    29 test); or else from root/DVSGesture/ibmGesture{Train,Test}/, what tonic downloads, whose times are in
    milliseconds.

    Args:
        subset, frames, T, dt, flatten, outside, download: as `nmnist`.
        other: with the eleventh class, "other gestures".
        downsample, size, resize: as `cifar10_dvs`.
    """
    slicer, reader = Slicer.filled(frames, T, dt), Reader((128, 128), outside)
    folder = data_root(root, GESTURE_SOURCE)
    base = folder / "DVSGesture"
    original, copies = base / "DvsGesture", base / f"ibmGesture{split.capitalize()}"
    if download and not original.is_dir() and not copies.is_dir():
        fetch_with_tonic("DVSGesture", folder, train=split == "train")
    if original.is_dir():
        cuts, read = _original_gestures(original, split), _gesture_reader(reader)
    elif copies.is_dir():
        cuts, read = _tonic_gestures(copies), lambda cut: _read_tonic_gesture(cut, reader)
    else:
        raise missing(GESTURE_SOURCE, folder, original / "user01_natural.aedat")
    if not cuts:
        raise missing(GESTURE_SOURCE, folder, original / "user01_natural.aedat")
    classes = GESTURES if other else GESTURES[:-1]
    cuts = [cut for cut in cuts if cut.label < len(classes)]
    title = "DVS128 Gesture" if other else "DVS128 Gesture without other gestures"
    return dataset_of(
        "dvs_gesture", title, cuts, subset, classes, reader, Framing(slicer, downsample), read, size, resize, flatten
    )


def _original_gestures(folder: Path, split: str) -> list[Cut]:
    cuts: list[Cut] = []
    for path in sorted(folder.glob("user*.aedat")):
        person = re.match(r"user(\d{2})_", path.name)
        if person is None:
            raise DataFileError(f"{path}: expected a name such as user01_natural.aedat")
        if (int(person[1]) <= 23) != (split == "train"):
            continue
        labels = path.with_name(f"{path.stem}_labels.csv")
        try:
            lines = labels.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataFileError(f"{labels}: cannot be read: {error}") from None
        for number, line in enumerate(lines[1:], 2):
            values = [value.strip() for value in line.split(",")]
            if values == [""]:
                continue
            if len(values) != 3 or not all(value.isdecimal() and len(value) < 16 for value in values):
                raise DataFileError(f"{labels}: line {number} is {line!r}, expected class,start,end")
            label, start, end = map(int, values)
            if not 1 <= label <= 11:
                raise DataFileError(f"{labels}: line {number}: class {label}, expected 1 to 11")
            if end <= start:
                raise DataFileError(f"{labels}: line {number}: ends at {end} us, before its start at {start}")
            cuts.append(Cut(path, label - 1, start, end))
    return cuts


def _gesture_reader(reader: Reader) -> Callable[[Cut], Events]:
    held: dict[Path, Events] = {}  # one: the gestures of a file come in turn

    def read(cut: Cut) -> Events:
        if cut.path not in held:
            held.clear()
            held[cut.path] = reader(cut.path)
        events = held[cut.path]
        inside = (events.t >= cut.start) & (events.t < (cut.end or 0))
        t, x, y, p = (column[inside] for column in (events.t, events.x, events.y, events.p))
        return Events(t - cut.start, x, y, p, events.width, events.height)

    return read


def _tonic_gestures(folder: Path) -> list[Cut]:
    cuts: list[Cut] = []
    for path in sorted(folder.glob("user*/*.npy")):
        if not (path.stem.isdecimal() and int(path.stem) < len(GESTURES)):
            raise DataFileError(f"{path}: label {path.stem!r} out of range, expected 0.npy to 10.npy")
        cuts.append(Cut(path, int(path.stem)))
    return cuts


def _read_tonic_gesture(cut: Cut, reader: Reader) -> Events:
    """tonic's copies: [N, 4] of x, y, polarity and milliseconds."""
    try:
        with cut.path.open("rb") as stream:
            rows: Array = np.load(stream, allow_pickle=False)
    except Exception as error:  # what a damaged file can raise has no common class; its text may advise to unpickle
        raise EventFileError(f"{cut.path}: not a readable .npy file of numbers ({type(error).__name__})") from None
    if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "iuf":
        raise EventFileError(f"{cut.path}: holds {rows.dtype} {rows.shape}, expected numbers [N, 4]: x, y, p, ms")
    if not np.isfinite(rows).all() or np.abs(rows).max(initial=0) > 1e12:
        raise EventFileError(f"{cut.path}: holds values that are no coordinates or times")
    if len(rows) and not ((rows[:, 2] == 0) | (rows[:, 2] == 1)).all():
        raise EventFileError(f"{cut.path}: holds polarities other than 0 and 1")
    x, y, p, t = rows.T.astype(np.int64)
    file = EventFile(cut.path, np.zeros(cut.path.stat().st_size, np.uint8))
    start = len(file.data) - rows.nbytes
    found = Decoded(1000 * t, x, y, p, reader.sensor, lambda i: start + i * rows.strides[0])
    return reader.told(cut.path, checked(file, found, reader.sensor, reader.outside))
