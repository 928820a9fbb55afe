"""Events, and what the readers of their file formats share.

An event is a pixel's change of brightness: (t, x, y, p).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spikeloom.errors import DataFileError, UsageError

Array = npt.NDArray[Any]
Outside = Literal["error", "drop"]
Evt3Time = Literal["specification", "expelliarmus"]

# Cameras read out rows in bursts and merge streams: an event may carry a time this much before the latest one.
TOLERANCE_US = 1000
_LONGEST_HEADER = 1 << 20  # bytes: preferences of jAER take up to some 100,000


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

    def part(self, start: int, end: int | None = None) -> Events:
        """The events from number `start` to before number `end`, which share their memory with these."""
        t, x, y, p = (column[start:end] for column in (self.t, self.x, self.y, self.p))
        return Events(t, x, y, p, self.width, self.height)

    def check(self) -> None:
        """Checks that these are events of their sensor, as what `read_events` gives always is.

        Raises:
            UsageError: columns that are not whole numbers or of one length, or an event outside the sensor; the first.
        """
        columns = {"t": self.t, "x": self.x, "y": self.y, "p": self.p}
        if not all(column.dtype.kind in "iub" and column.shape == self.t.shape[:1] for column in columns.values()):
            found = ", ".join(f"{name} {column.dtype} {list(column.shape)}" for name, column in columns.items())
            raise UsageError(f"t, x, y and p of events must be whole numbers and of one length [N], got {found}")
        limits = ((self.x, self.width), (self.y, self.height), (self.p, 2))
        if not len(self) or all(int(column.min()) >= 0 and int(column.max()) < limit for column, limit in limits):
            return
        x, y, p = ((column < 0) | (column >= limit) for column, limit in limits)
        i = int(np.argmax(x | y | p))
        if not x[i] and not y[i]:
            raise UsageError(f"event {i} has p = {self.p[i]}, expected 0 or 1")
        size = f"{self.width}x{self.height}"
        raise UsageError(f"event {i} is at x = {self.x[i]}, y = {self.y[i]}, outside the sensor of {size}")


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
            line = head[start : end if end >= 0 else None].decode("latin-1").strip()
            # Binary data may begin with the mark by chance: a line of text is printable.
            if not line.replace("\t", " ").isprintable():
                break
            if end < 0:
                raise self.error(start, f"truncated: a line of the header has no end within {len(head)} bytes")
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
