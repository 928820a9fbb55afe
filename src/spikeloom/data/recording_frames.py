"""How a data set of event recordings reads a file and makes frames of it, and how live events become such frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.cache import Counts
from spikeloom.data.formats.events import Array, Events
from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.frames import Slicer, check_number
from spikeloom.data.sets.dvs import Framing, Reader, upright
from spikeloom.errors import UsageError
from spikeloom.files import PathLike

Json = dict[str, Any]

SENSORS = {"nmnist": (34, 34), "cifar10_dvs": (128, 128), "dvs_gesture": (128, 128), "n_caltech101": (240, 180)}
MOST_WINDOWS = 1_000_000  # that one call completes: a damaged time must not run a network for days


class RecordingFrames:
    """How a data set reads recordings, and makes what a network takes of events.

    Args:
        name: of the data set that the network was trained on: one of event recordings.
        options: of that data set; those about its files are not used.

    Attributes:
        sensor: width and height that recordings must fit.
        slicer: how the data set cuts a recording into frames.

    Raises:
        UsageError: the data set has no recordings of events.
    """

    def __init__(self, name: str, options: Json | None = None):
        options = options or {}
        if name not in SENSORS and name != "recordings":
            raise UsageError(
                f"a network for {name} takes no events: those that do are for {', '.join(SENSORS)} and recordings"
            )
        self.sensor: tuple[int, int] = SENSORS.get(name) or tuple(options["sensor"])
        self.slicer = Slicer.filled(options.get("frames", "count"), options.get("T"), options.get("dt"))
        self._turned = name == "cifar10_dvs"
        self._reader = Reader(self.sensor, options.get("outside", "error"))
        self._framing = Framing(self.slicer, options.get("downsample"), options.get("polarity"))
        self._looks: Json = {
            "size": options.get("size"),
            "resize": options.get("resize", "bilinear"),
            "flatten": options.get("flatten", False),
        }
        none = Counts(np.zeros((0, *self._framing.shape(self.sensor)), np.uint8), np.zeros(1, np.int64))
        labels = torch.zeros(0, dtype=torch.int64)
        self._empty = self.dataset(none, labels, name=name, title="live events", classes=())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of a frame, as a network sees it."""
        return self._empty.input_shape

    def read(self, path: PathLike) -> Events:
        """The events of a file, turned as the data set turns them.

        Raises:
            EventFileError: a file that cannot be read, or events outside the sensor.
        """
        place = Path(path)
        events = self._reader(place)
        return upright(events, place) if self._turned else events

    def cut(self, path: PathLike) -> Array:
        """The frames [T, *shape] of a file, as the data set cuts it."""
        return self._framing(self.read(path), Path(path))

    def dataset(self, counts: Counts, labels: Tensor, **about: Any) -> FrameDataset:
        """Frames as the data set shows them to a network; `about` are the names that a `FrameDataset` takes."""
        return FrameDataset(counts, labels, **self._looks, **about)

    def window(self, events: Events) -> Tensor:
        """All events in one frame, as a network takes it: float32 [1, 1, *input_shape].

        Raises:
            UsageError: events of another sensor, or outside it.
        """
        if (events.width, events.height) != self.sensor:
            wanted, given = ("x".join(map(str, size)) for size in (self.sensor, (events.width, events.height)))
            raise UsageError(f"events of a sensor of {given}: the network takes those of one of {wanted}")
        return self._empty.inputs(self._framing.count(events, np.zeros(len(events), np.int64), 1))

    def events_a_frame(self, events: Events) -> float:
        """How many events a frame has on average where the data set cuts this recording, which has some."""
        index, _ = self.slicer(events.t)
        kept = index[index >= 0]
        return len(kept) / (int(kept.max()) - int(kept.min()) + 1)


class WindowCutter:
    """Cuts events into windows of time, as they come.

    Windows lie end to end from the first event. An event belongs to the window of the latest time so far: one that
    comes late, as cameras send them, counts in the window that is open when it comes. So it does not matter in which
    portions the events come.

    Args:
        window_ms: length of a window in milliseconds, from 0.001.

    Raises:
        UsageError: no such length.
    """

    def __init__(self, window_ms: float):
        check_number("window_ms", window_ms, 0.001, 1e6, " milliseconds")
        self._step = round(1000 * float(window_ms))
        self._begin: int | None = None  # of the open window
        self._latest = 0
        self._open: list[Events] = []

    def feed(self, events: Events) -> Iterator[Events]:
        """The events of each window that these ones complete; a silent window has none.

        Raises:
            UsageError: an event outside the sensor, or a silence of more than `MOST_WINDOWS` windows.
        """
        events.check()
        if not len(events):
            return
        if self._begin is None:
            self._begin = self._latest = int(events.t[0])
        latest = np.maximum(np.maximum.accumulate(events.t), self._latest)
        complete = (int(latest[-1]) - self._begin) // self._step
        if complete > MOST_WINDOWS:
            raise UsageError(
                f"{complete:,} windows of {self._step / 1000:g} ms up to the event at {latest[-1]} us, at most "
                f"{MOST_WINDOWS:,} go at once: take longer windows"
            )
        ends = np.searchsorted(latest, self._begin + self._step * np.arange(1, complete + 1)).tolist()
        self._begin += self._step * complete
        self._latest = int(latest[-1])
        start = 0
        for end in ends:
            self._open.append(events.part(start, end))
            yield self._joined()
            start = end
        self._open.append(events.part(start))

    def close(self) -> Events | None:
        """The events of the last window, which is not over; None where no event came."""
        return self._joined() if self._open else None

    def _joined(self) -> Events:
        parts, self._open = self._open, []
        if len(parts) == 1:
            return parts[0]
        t, x, y, p = (np.concatenate([getattr(part, name) for part in parts]) for name in ("t", "x", "y", "p"))
        return Events(t, x, y, p, parts[0].width, parts[0].height)
