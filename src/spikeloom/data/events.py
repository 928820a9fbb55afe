"""Recordings of event cameras: one reader for all file formats, which are told apart by content.

An event is a pixel's change of brightness: (t, x, y, p). `docs/events.md` lists the formats and what each reader does.
"""

from __future__ import annotations

import operator
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from spikeloom.errors import DataFileError, UsageError

Array = npt.NDArray[Any]
Outside = Literal["error", "drop"]
Evt3Time = Literal["specification", "expelliarmus"]

# Cameras read out rows in bursts and merge streams: an event may carry a time this much before the latest one.
TOLERANCE_US = 1000
_LONGEST_HEADER = 1 << 20  # bytes: preferences of jAER take up to some 100,000
# Headerless formats do not name their sensor: the smallest of these that holds the events is taken.
SENSORS = ((34, 34), (128, 128), (240, 180), (256, 256))


class EventFileError(DataFileError):
    """An event file that cannot be read; the message names the file, the byte where it fails, and the reason."""


@dataclass(frozen=True)
class Events:
    """N events in file order.

    Attributes:
        t: int64 [N], microseconds on the camera's clock (AEDAT4: since 1970); at most `TOLERANCE_US` out of order.
        x, y: int16 [N], column and row, as stored: 0 is the left and, except in Event Stream files, the top.
        p: uint8 [N], 1 where the brightness rose, as stored.
        width, height: of the sensor.
        dropped: how many events outside the sensor were left out.
    """

    t: Array
    x: Array
    y: Array
    p: Array
    width: int
    height: int
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class EventFile:
    """A file that is being decoded: its bytes, and how to say what is wrong with them."""

    path: Path
    data: Array  # uint8

    def error(self, offset: int, reason: str) -> EventFileError:
        """The error for something at a byte of the file."""
        return EventFileError(f"{self.path}: at byte {offset} of {len(self.data)}: {reason}")

    def unpack(self, kind: str, start: int) -> tuple[Any, ...]:
        """Numbers at a byte, which must be there, as `struct` names them."""
        return struct.unpack(kind, self.data[start : start + struct.calcsize(kind)].tobytes())

    def records(self, start: int, dtype: str) -> Array:
        """The rest of the file from a byte on as an array of fixed-size records.

        Raises:
            EventFileError: the last record is cut short.
        """
        size = np.dtype(dtype).itemsize
        count, rest = divmod(len(self.data) - start, size)
        if rest:
            raise self.error(start + count * size, f"truncated: the last record has {rest} of {size} bytes")
        return self.data[start:].view(dtype)

    def lines(self, mark: bytes, last: tuple[str, ...]) -> tuple[list[str], int]:
        """The text lines at the beginning that start with a mark, up to a last one, and the byte after them.

        Raises:
            EventFileError: a line without end.
        """
        found: list[str] = []
        head, start = self.data[:_LONGEST_HEADER].tobytes(), 0
        while head.startswith(mark, start):
            end = head.find(b"\n", start)
            if end < 0:
                raise self.error(start, f"truncated: a line of the header has no end within {len(head)} bytes")
            line = head[start:end].decode("latin-1").strip()
            # Binary data may begin with the mark by chance: a line of text is printable.
            if not line.replace("\t", " ").isprintable():
                break
            found.append(line)
            start = end + 1
            if line.startswith(last):
                break
        return found, start


@dataclass
class Decoded:
    """What a format's reader found.

    Attributes:
        t, x, y, p: as `Events`, of any integer type.
        size: (width, height), where the file says or implies it.
        place: the byte of an event, by its index.
    """

    t: Array
    x: Array
    y: Array
    p: Array
    size: tuple[int, int] | None
    place: Callable[[int], int]


_TYPES = (np.int64, np.int16, np.int16, np.uint8)


class Columns:
    """Events gathered part by part, such as packets, with what is needed to find their bytes again."""

    def __init__(self):
        self._columns: tuple[list[Array], ...] = ([], [], [], [], [])
        self._counts: list[int] = []
        self._starts: list[int] = []

    def add(self, t: Array, x: Array, y: Array, p: Array, start: int, at: Array) -> None:
        """Adds events that lie at bytes `start + at`; `at` is kept in its own type, best a narrow one."""
        for column, values, dtype in zip(self._columns, (t, x, y, p, at), (*_TYPES, at.dtype), strict=True):
            # A coordinate beyond int16 becomes negative, which no sensor holds.
            column.append(values.astype(dtype))
        self._counts.append(len(t))
        self._starts.append(start)

    def decoded(self, size: tuple[int, int] | None) -> Decoded:
        """All events, in the order in which they were added."""
        t, x, y, p, at = (_joined(column) for column in self._columns)
        ends, starts = np.cumsum(self._counts), self._starts
        return Decoded(t, x, y, p, size, lambda i: starts[int(np.searchsorted(ends, i, "right"))] + int(at[i]))


def _joined(parts: list[Array]) -> Array:
    # The parts go as soon as their column is whole.
    whole = np.concatenate(parts) if parts else np.empty(0, np.int64)
    parts.clear()
    return whole


def unwrap(t: Array, period: int) -> Array:
    """Times, int64, of a counter that starts again at 0 after `period`, more than twice `TOLERANCE_US`.

    A step back by more than half of the period is such a start, and a step forward to within `TOLERANCE_US` of it an
    event of before. Other steps forward are taken as they are, so recordings may be silent for long. A time far ahead
    of both its neighbours is left as it is: it is damage, and what follows it goes back.
    """
    t = t.astype(np.int64, copy=False)
    step = t[1:] - t[:-1]
    if step.min(initial=0) >= -(period // 2) and step.max(initial=0) < period - TOLERANCE_US:
        return t
    back, late = step < -(period // 2), step >= period - TOLERANCE_US
    back[1:] &= (step[:-1] <= period // 2) | late[:-1]
    turns = np.cumsum(back, dtype=np.int64)
    turns -= np.cumsum(late, dtype=np.int64)
    turns *= period
    turns += t[1:]
    return np.concatenate([t[:1], turns])


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
    from spikeloom.data.event_formats import decode

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
