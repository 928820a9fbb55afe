"""Event streams as frames: how many events each pixel had in each slice of a recording.

A frame is [2, H, W]: channel = polarity, value = number of events, neither clipped nor made binary. With N events and
T frames, event i falls in frame

    count       min(i // floor(N / T), T - 1)
    time        min((t_i - t_0) // floor((t_{N-1} - t_0) / T), T - 1)
    windows     (t_i - t_0) // dt; later events than T windows hold are dropped, missing ones leave empty frames
    bins        t_i // dt, from t = 0, in as many frames as that takes

so "count" and "time" keep every event. `docs/events.md` says which paper uses which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.formats.events import Array, Events
from spikeloom.data.options import check_integer
from spikeloom.errors import UsageError

Slicing = Literal["count", "time", "windows", "bins"]

MOST_CELLS = 2**28  # values in the frames of one recording
_NEEDS_T, _NEEDS_DT = ("count", "time", "windows"), ("windows", "bins")


@dataclass(frozen=True)
class Slicer:
    """Says in which frame an event falls.

    Args:
        frames: how a recording is cut, see above.
        T: frames; not for "bins".
        dt: milliseconds; for "windows" and "bins" only.

    Raises:
        UsageError: T or dt missing, too many or out of range.
    """

    frames: Slicing
    T: int | None
    dt: float | None

    def __post_init__(self):
        known = ("count", "time", "windows", "bins")
        if self.frames not in known:
            raise UsageError(f"frames must be one of {', '.join(known)}, got {self.frames!r}")
        for name, value, needing in (("T", self.T, _NEEDS_T), ("dt", self.dt, _NEEDS_DT)):
            if (value is not None) != (self.frames in needing):
                verb = "needs" if self.frames in needing else "takes no"
                raise UsageError(f"frames={self.frames!r} {verb} {name}, got {name}={value!r}")
        if self.T is not None:
            check_integer("T", self.T, 1, 100_000)
        if self.dt is not None:
            check_number("dt", self.dt, 0.001, 1e6, " milliseconds")  # from 1 us, what event cameras resolve

    @classmethod
    def filled(cls, frames: Slicing, T: int | None, dt: float | None, default_T: int = 10) -> Slicer:
        """With `default_T` frames and 5 ms where they are needed and not given."""
        steps = default_T if T is None and frames in _NEEDS_T else T
        return cls(frames, steps, 5.0 if dt is None and frames in _NEEDS_DT else dt)

    def __call__(self, t: Array) -> tuple[Array, int]:
        """The frame of each event, int64 [N], -1 where it falls in none; and how many frames there are.

        Args:
            t: times in microseconds, int64 [N].
        """
        n, T = len(t), self.T or 0
        if n == 0:
            return np.zeros(0, np.int64), T
        first = int(t[0])
        if self.frames == "count":
            # Fewer events than frames: the rule puts them all in the last one.
            each = n // T
            return np.repeat(np.arange(T), [each] * (T - 1) + [n - each * (T - 1)]), T
        if self.frames == "time":
            step = (int(t[-1]) - first) // T
            return (np.clip((t - first) // step, 0, T - 1) if step > 0 else np.full(n, T - 1)), T
        step = round(1000 * float(self.dt or 0))
        if self.frames == "windows":
            index = np.maximum(t - first, 0) // step
            return np.where(index < T, index, -1), T
        index = t // step
        if index.min() < 0:
            raise UsageError(f"frames='bins' counts from t = 0, and an event is at {t.min()} us: use 'windows'")
        return index, int(index.max()) + 1


def accumulate(cell: Array, index: Array, steps: int, shape: tuple[int, ...]) -> Array:
    """Counts int64 [steps, *shape] of events in cells (flat positions in `shape`) and frames (-1: none).

    Raises:
        UsageError: the frames would not fit in memory.
    """
    size = int(np.prod(shape))
    if steps * size > MOST_CELLS:
        raise UsageError(
            f"{steps} frames of {'x'.join(map(str, shape))} would need {8 * steps * size / 1e9:.0f} GB: "
            "take longer steps, or frames='windows', which begin at the first event"
        )
    flat = index * size
    flat += cell
    if len(index) and index.min() < 0:
        flat = flat[index >= 0]
    return np.bincount(flat, minlength=steps * size).reshape(steps, *shape)


def event_frames(events: Events, frames: Slicing = "count", T: int | None = None, dt: float | None = None) -> Tensor:
    """A recording as frames, int64 [T, 2, H, W]: how many events each pixel had, by polarity.

    Args:
        events: the recording.
        frames: "count" and "time" cut it into T parts of equal number or duration, "windows" takes T windows of dt
            milliseconds from the first event, "bins" as many of dt from t = 0 as there are.
        T, dt: see `frames`; 10 and 5 ms unless given.

    Raises:
        UsageError: T or dt where they have no meaning, or out of range; or an event outside the sensor.
    """
    events.check()
    index, steps = Slicer.filled(frames, T, dt)(events.t)
    cell = events.p.astype(np.int64)
    cell *= events.height
    cell += events.y
    cell *= events.width
    cell += events.x
    return torch.from_numpy(accumulate(cell, index, steps, (2, events.height, events.width)))


def check_number(name: str, value: object, low: float, high: float, unit: str = "") -> None:
    """Checks that low <= value <= high.

    Raises:
        UsageError: the value is no number or lies outside.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}{unit}, got {cast(object, value)!r}")
