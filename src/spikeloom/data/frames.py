"""Event streams as frames: how many events each pixel had in each slice of a recording.

A frame is [2, H, W]: channel = polarity, value = number of events, neither clipped nor made binary. With N events and
T frames, event i falls in frame

    by_count    min(i // floor(N / T), T - 1)
    by_time     min((t_i - t_0) // floor((t_{N-1} - t_0) / T), T - 1)
    windows     (t_i - t_0) // dt; later events than T windows hold are dropped, missing ones leave empty frames
    bins        t_i // dt, from t = 0, in as many frames as that takes

(`docs/events.md` says which paper uses which.)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spikeloom.data.options import check_integer
from spikeloom.errors import UsageError

Slicing = Literal["count", "time", "windows", "bins"]
Array = npt.NDArray[Any]

MOST_CELLS = 2**28  # values in the frames of one recording: 1 GB of them


def slices(t: Array, frames: Slicing, T: int | None, dt: float | None) -> tuple[Array, int]:
    """The frame of each event, and how many frames there are.

    Args:
        t: times in microseconds, int64 [N].
        frames: how a recording is cut, see above.
        T: frames; not for "bins".
        dt: milliseconds; for "windows" and "bins" only.

    Returns:
        int64 [N], -1 where an event falls in no frame; and the number of frames.

    Raises:
        UsageError: T or dt missing, too many or out of range.
    """
    check_slicing(frames, T, dt)
    n = len(t)
    if n == 0:
        return np.zeros(0, np.int64), T or 0
    if frames == "count":
        assert T is not None
        each = n // T
        # Fewer events than frames: the rule puts them all in the last one.
        return (np.minimum(np.arange(n) // each, T - 1) if each else np.full(n, T - 1)), T
    first = int(t[0])
    if frames == "time":
        assert T is not None
        step = (int(t[-1]) - first) // T
        return (np.clip((t - first) // step, 0, T - 1) if step > 0 else np.full(n, T - 1)), T
    step = round(1000 * float(dt or 0))
    if frames == "windows":
        assert T is not None
        index = np.maximum(t - first, 0) // step
        return np.where(index < T, index, -1), T
    index = t // step
    if index.min() < 0:
        raise UsageError(f"frames='bins' counts from t = 0, and the first event is at {t.min()} us; use 'windows'")
    return index, int(index.max()) + 1


def settled(frames: str, T: int | None, dt: float | None, default_T: int = 10) -> tuple[int | None, float | None]:
    """T and dt with their defaults, `default_T` frames and 5 ms, where the way of cutting needs them."""
    if frames in ("count", "time", "windows") and T is None:
        T = default_T
    if frames in ("windows", "bins") and dt is None:
        dt = 5.0
    check_slicing(frames, T, dt)
    return T, dt


def accumulate(cell: Array, index: Array, steps: int, shape: tuple[int, ...]) -> Array:
    """Counts [steps, *shape] of events in cells (flat positions in `shape`) and frames (-1: none); int64.

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


def check_slicing(frames: str, T: int | None, dt: float | None) -> None:
    """Checks the options that say how a recording is cut.

    Raises:
        UsageError: see `slices`.
    """
    wanted = {"count": (True, False), "time": (True, False), "windows": (True, True), "bins": (False, True)}
    if frames not in wanted:
        raise UsageError(f"frames must be one of {', '.join(wanted)}, got {frames!r}")
    for name, value, needed in (("T", T, wanted[frames][0]), ("dt", dt, wanted[frames][1])):
        if (value is not None) != needed:
            raise UsageError(f"frames={frames!r} {'needs' if needed else 'takes no'} {name}, got {name}={value!r}")
    if T is not None:
        check_integer("T", T, 1, 100_000)
    # A thousandth of a millisecond: what event cameras resolve.
    if dt is not None and not (isinstance(dt, int | float) and not isinstance(dt, bool) and 0.001 <= dt <= 1e6):
        raise UsageError(f"dt must be milliseconds from 0.001 to 1000000, got {dt!r}")
