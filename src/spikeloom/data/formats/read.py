"""Recordings of event cameras: one reader for all file formats, which are told apart by content.

`docs/events.md` lists the formats and what each reader does.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import numpy as np

from spikeloom.data.formats.aedat import aedat2, aedat3
from spikeloom.data.formats.aedat4 import aedat4
from spikeloom.data.formats.event_stream import event_stream
from spikeloom.data.formats.events import (
    TOLERANCE_US,
    Array,
    Decoded,
    EventFile,
    EventFileError,
    Events,
    Evt3Time,
    Outside,
)
from spikeloom.data.formats.five_bytes import five_bytes
from spikeloom.data.formats.matlab import st_mnist
from spikeloom.data.formats.prophesee import prophesee
from spikeloom.errors import UsageError

# Headerless formats do not name their sensor: the smallest of these that holds the events is taken.
SENSORS = ((34, 34), (128, 128), (240, 180), (256, 256))
# What is often given by mistake: known beginnings of other files.
_FOREIGN = {
    b"\x89PNG\r\n": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x1f\x8b\x08": "gzip-compressed; unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"RIFF": "a WAV, AVI or WebP file",
    b"\x80\x04\x95": "a pickle",
    b"\x89HDF\r\n": "an HDF5 file, which holds many recordings: use create_dataset('shd' or 'n_tidigits', ...)",
}


def read_events(
    path: str | os.PathLike[str],
    sensor: tuple[int, int] | None = None,
    *,
    outside: Outside = "error",
    evt3_time: Evt3Time = "specification",
) -> Events:
    """Reads one recording: AEDAT 2, 3.1 and 4, Prophesee EVT2, EVT2.1, EVT3 and DAT, Event Stream, the 5-byte records
    of N-MNIST and N-Caltech101 (.bin), ST-MNIST (.mat) and N-TIDIGITS (.bs1).

    The format is told by content, only .bs1 by name. Needs memory of a few times the file, not for what its counts
    claim. Warns (`UserWarning`) where an AEDAT 2 header names a chip of another size than `sensor`.

    Args:
        path: the file.
        sensor: (width, height), where the file does not say; elsewhere it must hold all events. Without it headerless
            files get the smallest of `SENSORS` that does, Prophesee files their camera's.
        outside: what becomes of events outside the sensor: "error" refuses the file, "drop" leaves them out and counts
            them in `Events.dropped`.
        evt3_time: "specification" decodes EVT3 times as Prophesee's openeb does, "expelliarmus" as expelliarmus 1.1
            does, whose times run up to twice as fast; only to compare with what was made with it.

    Returns:
        All pixel events; frames, IMU samples and triggers are left out.

    Raises:
        EventFileError: not an event file, truncated, damaged, events outside the sensor, or times that go back by more
            than `TOLERANCE_US`.
        UsageError: an unknown value of `outside` or `evt3_time`.
    """
    for name, value, known in (("outside", outside, Outside), ("evt3_time", evt3_time, Evt3Time)):
        if value not in get_args(known):
            raise UsageError(f"{name} must be {' or '.join(map(repr, get_args(known)))}, got {value!r}")
    place = Path(path)
    sensor = sensor if sensor is None else _sides(place, sensor)
    try:
        data = np.fromfile(place, np.uint8)
    except OSError as error:
        raise EventFileError(f"{place}: cannot be read: {error.strerror or error}") from None
    file = EventFile(place, data)
    if not len(data):
        raise file.error(0, "the file is empty")
    return checked(file, decode(file, sensor, evt3_time), sensor, outside)


def decode(file: EventFile, sensor: tuple[int, int] | None, evt3_time: Evt3Time) -> Decoded:
    """The events of a file in any known format, their coordinates and times not yet checked.

    Raises:
        EventFileError: another kind of file, or a damaged one.
    """
    start = file.data[:16].tobytes()
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise file.error(0, f"not an event file but {kind}")
    if start.startswith(b"BM") and int.from_bytes(start[2:6], "little") == len(file.data):
        raise file.error(0, "not an event file but a BMP picture")
    if start.startswith(b"#!AER-DAT"):
        version = start[9:].split(b"\r")[0].split(b"\n")[0]
        readers = {b"2": aedat2, b"3": aedat3}
        if version.startswith(b"4"):
            return aedat4(file)
        if version[:1] in readers:
            return readers[version[:1]](file, sensor)
        raise file.error(9, f"AEDAT version {version!r}, expected 2.0, 3.1 or 4.0")
    if start.startswith(b"% "):
        return prophesee(file, evt3_time)
    if start.startswith(b"Event Stream"):
        return event_stream(file)
    if start.startswith(b"MATLAB 5.0"):
        return st_mnist(file)
    return five_bytes(file, sensor)


def _sides(path: Path, sensor: object) -> tuple[int, int]:
    try:
        width, height = (operator.index(side) for side in cast("tuple[int, int]", sensor))
    except (TypeError, ValueError):
        width, height = 0, 0
    if not (0 < width < 2**15 and 0 < height < 2**15):
        raise EventFileError(f"{path}: sensor must be (width, height), each from 1 to {2**15 - 1}, got {sensor!r}")
    return width, height


def checked(file: EventFile, found: Decoded, sensor: tuple[int, int] | None, outside: Outside = "error") -> Events:
    """The events, if they are possible.

    Raises:
        EventFileError: coordinates outside the sensor, unless they are dropped, or times that go back.
    """
    width, height = sensor or found.size or _smallest(found)
    t, x, y, p, place = found.t, found.x, found.y, found.p, found.place
    dropped = 0
    if len(x) and (int(x.max()) >= width or int(y.max()) >= height or int(x.min()) < 0 or int(y.min()) < 0):
        wrong = (x >= width) | (y >= height) | (x < 0) | (y < 0)
        if outside == "error":
            i = int(np.argmax(wrong))
            raise file.error(
                place(i), f"event {i} is at x = {x[i]}, y = {y[i]}, outside the sensor of {width}x{height}"
            )
        kept = np.flatnonzero(~wrong)
        dropped = len(x) - len(kept)
        t, x, y, p, place = t[kept], x[kept], y[kept], p[kept], lambda i: found.place(int(kept[i]))
    t = t.astype(np.int64, copy=False)
    _check_order(file, t, place)
    return Events(
        t,
        x.astype(np.int16, copy=False),
        y.astype(np.int16, copy=False),
        p.astype(np.uint8, copy=False),
        width,
        height,
        dropped,
    )


def _smallest(found: Decoded) -> tuple[int, int]:
    """The smallest usual sensor that holds all events, or one made for them."""
    width, height = int(found.x.max(initial=0)) + 1, int(found.y.max(initial=0)) + 1
    return next((size for size in SENSORS if width <= size[0] and height <= size[1]), (width, height))


def _check_order(file: EventFile, t: Array, place: Callable[[int], int]) -> None:
    latest = np.iinfo(np.int64).min
    for begin in range(0, len(t), 1 << 16):  # in blocks: no second array of times
        block = t[begin : begin + (1 << 16)]
        late = np.maximum(np.maximum.accumulate(block), latest)
        latest = int(late[-1])
        late -= block
        if late.max() > TOLERANCE_US:
            i = int(np.argmax(late > TOLERANCE_US))
            raise file.error(
                place(begin + i),
                f"event {begin + i} is {late[i]} us earlier than one before it, more than the {TOLERANCE_US} us that "
                "cameras are out of order",
            )
