"""A network behind a live event camera: a window of time is a step, and after each there is a decision."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.data.formats.events import Events
from spikeloom.data.options import check_integer
from spikeloom.data.recording_frames import RecordingFrames, WindowCutter
from spikeloom.deploy.engine.engine import Engine
from spikeloom.deploy.engine.ir import Time
from spikeloom.errors import UsageError
from spikeloom.stream import Stream


@dataclass(frozen=True)
class WindowDecision:
    """What a network says after a window of events.

    Attributes:
        end_ms: when the window ends, in milliseconds since the first event.
        events: in the window.
        logits: [classes], of this step.
        mean: [classes], float64, mean logits over the horizon.
        label: the class of the largest mean logit.
        probabilities: [classes], the softmax of the mean logits.
        latency_ms: computing time from the end of the window to the decision: frame, network, decision.
    """

    end_ms: float
    events: int
    logits: Tensor
    mean: Tensor
    label: int
    probabilities: Tensor
    latency_ms: float


class SensorStream:
    """Runs a network on events as they come, a step for each window, with neurons that remember.

        sensor = SensorStream(engine, RecordingFrames("nmnist"), window_ms=10)
        for packet in packets:                  # Events, in portions of any size
            for decision in sensor.feed(packet):
                print(decision.end_ms, decision.label)

    Args:
        network: an engine, or a network that classifies, which then runs by itself, in eval mode.
        frames: make the network's input of events.
        window_ms: length of a window in milliseconds.
        last: how many windows a decision looks back on; all since the first event without it.

    Raises:
        UsageError: a wrong length or number, or a network that cannot run step by step on such frames.
    """

    def __init__(
        self, network: Engine | nn.Module, frames: RecordingFrames, window_ms: float = 10.0, last: int | None = None
    ):
        self._cutter, self._window_ms = WindowCutter(window_ms), float(window_ms)
        if last is not None:
            check_integer("last", last, 1)
        self._frames = frames
        self._step = _steps_of(network, frames)
        self._kept: deque[Tensor] = deque(maxlen=last)
        self._sum: Tensor | float = 0.0
        self._windows = 0

    def feed(self, events: Events) -> list[WindowDecision]:
        """The decisions after the windows that these events complete: none, one or more.

        Raises:
            UsageError: a silence of more than a million windows.
        """
        found: list[WindowDecision] = []
        complete = self._cutter.feed(events)
        while True:
            start = time.perf_counter()
            window = next(complete, None)
            if window is None:
                return found
            found.append(self._decide(window, start))

    def close(self) -> list[WindowDecision]:
        """The decision after the last window, which no event has completed: at the end of a recording."""
        start = time.perf_counter()
        window = self._cutter.close()
        return [] if window is None else [self._decide(window, start)]

    def _decide(self, window: Events, start: float) -> WindowDecision:
        logits = self._step(self._frames.window(window))[0, 0]
        exact = logits.double()  # so that the sum of an hour does not drift
        if self._kept.maxlen is None:
            self._sum = self._sum + exact
            mean = self._sum / (self._windows + 1)
        else:
            self._kept.append(exact)
            mean = sum(self._kept, torch.zeros_like(exact)) / len(self._kept)
        self._windows += 1
        label, probabilities = int(mean.argmax()), mean.softmax(0)
        return WindowDecision(
            end_ms=self._windows * self._window_ms,
            events=len(window),
            logits=logits,
            mean=mean,
            label=label,
            probabilities=probabilities,
            latency_ms=1e3 * (time.perf_counter() - start),
        )


def _steps_of(network: Engine | nn.Module, frames: RecordingFrames) -> Callable[[Tensor], Tensor]:
    """What runs a step after the other from rest, tried on a window without events.

    Raises:
        UsageError: the network cannot run so, or not on such frames.
    """
    joins = "the network joins its steps before it decides, so that no window has a decision of its own"
    if isinstance(network, Engine) and any(isinstance(step, Time) for step in network.steps):
        raise UsageError(joins)

    def started() -> Callable[[Tensor], Tensor]:
        return network.stream() if isinstance(network, Engine) else torch.no_grad()(Stream(network.eval()))

    none = np.zeros(0, np.int64)
    try:
        logits = started()(frames.window(Events(none, none, none, none, *frames.sensor)))
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        shape = "x".join(map(str, frames.input_shape))
        raise UsageError(f"the network cannot run window by window on frames of {shape}: {reason}") from None
    if logits.dim() != 3:
        raise UsageError(joins)
    return started()
