"""Frames hold every event they should, once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_events import made
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeloom.data import Events, RecordingFrames, augmentation, event_frames
from spikeloom.data.recording_frames import WindowCutter
from spikeloom.errors import UsageError


def stream(t: list[int]) -> Events:
    n = len(t)
    return Events(
        np.array(t, np.int64),
        np.arange(n, dtype=np.int16) % 4,
        np.zeros(n, np.int16),
        np.arange(n, dtype=np.uint8) % 2,
        4,
        3,
    )


def plain(e: Events, first: list[int]) -> torch.Tensor:
    """Frames event by event; frame j holds events first[j] to first[j + 1]."""
    frames = torch.zeros(len(first) - 1, 2, e.height, e.width, dtype=torch.int64)
    for j, (left, right) in enumerate(itertools.pairwise(first)):
        for i in range(left, right):
            frames[j, e.p[i], e.y[i], e.x[i]] += 1
    return frames


def test_golden_stream() -> None:
    """Ten events at t = 0 to 9: by count 3, 3, 4; by time 3, 3, 4; in windows of 4: 4, 4, 2."""
    e = stream(list(range(10)))
    assert event_frames(e, "count", 3).sum((1, 2, 3)).tolist() == [3, 3, 4]
    assert event_frames(e, "time", 3).sum((1, 2, 3)).tolist() == [3, 3, 4]
    assert event_frames(e, "bins", dt=0.004).sum((1, 2, 3)).tolist() == [4, 4, 2]
    assert event_frames(e, "windows", 2, 0.004).sum((1, 2, 3)).tolist() == [4, 4]
    assert event_frames(e, "windows", 4, 0.004).sum((1, 2, 3)).tolist() == [4, 4, 2, 0]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(n=st.integers(0, 300), T=st.integers(1, 12), seed=st.integers(0, 99), span=st.sampled_from([1, 50, 100_000]))
def test_properties(n: int, T: int, seed: int, span: int) -> None:
    e = made(n, 7, 5, seed, span)
    count, time = event_frames(e, "count", T), event_frames(e, "time", T)
    for frames in (count, time):
        assert frames.shape == (T, 2, 5, 7)
        assert frames.sum() == n
        assert torch.equal(frames.sum((0, 2, 3)), torch.from_numpy(np.bincount(e.p, minlength=2)))
    assert count.sum((1, 2, 3)).tolist() == [n // T] * (T - 1) + [n - n // T * (T - 1)]
    assert torch.equal(count, plain(e, [n // T * j for j in range(T)] + [n]))
    assert torch.equal(event_frames(e, "count", T), count)
    kept = int((e.t - e.t[0] < T * 1000).sum()) if n else 0
    assert event_frames(e, "windows", T, 1.0).sum() == kept
    bins = event_frames(e, "bins", dt=1.0)
    assert bins.sum() == n
    assert len(bins) == (int(e.t[-1]) // 1000 + 1 if n else 0)
    if n and (step := int(e.t[-1] - e.t[0]) // T):
        bounds = [int((e.t < e.t[0] + step * j).sum()) for j in range(T)]
        assert torch.equal(time, plain(e, [*bounds, n]))


def test_counts_do_not_wrap() -> None:
    e = Events(
        np.zeros(70_000, np.int64), *(np.zeros(70_000, np.int16) for _ in range(2)), np.ones(70_000, np.uint8), 3, 2
    )
    frames = event_frames(e, "time", 4)
    assert frames[3, 1, 0, 0] == 70_000
    assert frames.sum() == 70_000


def test_times_a_little_out_of_order_lose_nothing() -> None:
    e = stream([500, 100, 700, 1500, 900, 1400])
    assert event_frames(e, "time", 3).sum() == 6
    assert event_frames(e, "windows", 1, 0.3).sum() == 3  # -400, 0 and 200 us after the first event


@pytest.mark.parametrize(
    ("frames", "T", "dt", "reason"),
    [
        ("number", 3, None, "frames must be one of count, time, windows, bins, got 'number'"),
        ("count", 3, 5.0, "frames='count' takes no dt, got dt=5.0"),
        ("bins", 3, 5.0, "frames='bins' takes no T, got T=3"),
        ("count", 0, None, "T must be an integer from 1"),
        ("bins", None, 0, "dt must be a number from 0.001 to 1e\\+06 milliseconds, got 0"),
        ("bins", None, float("nan"), "dt must be a number"),
    ],
)
def test_wrong_options(frames: str, T: int | None, dt: float | None, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        event_frames(stream([1, 2]), frames, T, dt)  # pyright: ignore[reportArgumentType]


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(UsageError, match=r"frames of 2x3x4 would need .* GB: take longer steps, or frames='windows'"):
        event_frames(stream([1_600_000_000_000_000]), "bins", dt=5.0)
    with pytest.raises(UsageError, match="an event is at -3 us: use 'windows'"):
        event_frames(stream([-3]), "bins")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("x", [0, 1, 4, -1], r"event 2 is at x = 4, y = 0, outside the sensor of 4x3$"),
        ("x", [0, -1, 4, 9], r"event 1 is at x = -1, y = 0, outside the sensor of 4x3$"),
        ("y", [0, 0, 0, 3], r"event 3 is at x = 3, y = 3, outside the sensor of 4x3$"),
        ("p", [0, 0, 2, -1], r"event 2 has p = 2, expected 0 or 1$"),
        ("p", [0, -1, 0, 0], r"event 1 has p = -1, expected 0 or 1$"),
        (
            "y",
            [0, 0],
            r"must be whole numbers and of one length \[N\], got t int64 \[4\], x int16 \[4\], y int64 \[2\]",
        ),
        ("x", [0.5, 0, 0, 0], r"must be whole numbers .*, x float64 \[4\]"),
    ],
)
def test_events_that_are_none_of_the_sensor_are_refused(column: str, values: list[Any], message: str) -> None:
    """They would count in other pixels, however the events become frames."""
    events = dataclasses.replace(stream([1, 2, 3, 4]), **{column: np.array(values)})
    windows = RecordingFrames("recordings", {"sensor": (4, 3)})
    made_by: list[Callable[[Events], Any]] = [event_frames, windows.window, lambda e: list(WindowCutter(10).feed(e))]
    for make in made_by:
        with pytest.raises(UsageError, match=message):
            make(events)


def test_events_of_another_sensor_are_refused() -> None:
    frames = RecordingFrames("recordings", {"sensor": (3, 3)})
    with pytest.raises(UsageError, match="events of a sensor of 4x3: the network takes those of one of 3x3"):
        frames.window(stream([1]))


def test_transforms_move_all_frames_of_a_clip_alike() -> None:
    x = torch.randint(0, 5, (6, 1, 2, 9, 9)).float().repeat(1, 4, 1, 1, 1)
    augment = augmentation([{"name": "random_crop", "padding": 3}, {"name": "random_horizontal_flip"}])
    moved = augment(x, torch.zeros(2))
    assert moved.shape == x.shape
    assert not torch.equal(moved, x)
    assert all(torch.equal(moved[:, 0], moved[:, t]) for t in range(4))
