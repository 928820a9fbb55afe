"""A recording of an event camera played through a trained network as it came: `spikeloom run RUN --events FILE`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spikeloom import deploy
from spikeloom.analyse.report.plain_figure import plain_figure
from spikeloom.analyse.report.template import Plot, Table, fill
from spikeloom.analyse.training_curves import COLORS
from spikeloom.data import Events, RecordingFrames
from spikeloom.data.own_files import class_names
from spikeloom.data.recording_frames import WindowCutter
from spikeloom.deploy import Engine, SensorStream, WindowDecision
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, atomic
from spikeloom.record import RateMeter
from spikeloom.stream import Stream
from spikeloom.train.evaluate import load_classifier

_EXAMPLES = 4  # windows, by which the engine decides how layers run
_CLASSES = 5  # that are drawn, the last ones by their mean logits
_POINTS = 2000  # windows that are drawn


@dataclass(frozen=True)
class Played:
    """A recording that was played.

    Attributes:
        title: of the network.
        file: the recording.
        classes: names.
        window_ms: length of a window.
        last: how many windows a decision looks back on; None for all.
        decisions: one a window; the last window may be shorter.
        events: of the recording.
        seconds: from its first event to its last.
        computing_s: wall-clock time of cutting, frames, network and decisions; reading the file is not in it.
        cpu_s: processor time of the same.
        read_s: wall-clock time of reading the file.
        frame_events: events that a frame holds on average where the network's data set cuts this recording.
        by: "engine" or "network".
        why: why the engine does not run it; empty where it does.
        spikes: of all layers at each window, by the network itself; empty without a page.
        page: the file that shows it, if one was asked for.
    """

    title: str
    file: str
    classes: tuple[str, ...]
    window_ms: float
    last: int | None
    decisions: tuple[WindowDecision, ...]
    events: int
    seconds: float
    computing_s: float
    cpu_s: float
    read_s: float
    frame_events: float
    by: str
    why: str
    spikes: tuple[int, ...]
    page: Path | None

    @property
    def real_time_factor(self) -> float:
        """Length of the recording by computing time."""
        return self.seconds / self.computing_s

    @property
    def events_per_second(self) -> float:
        """Events that are computed in a second, at the density of this recording."""
        return self.events / self.computing_s

    def latency_ms(self, percent: float) -> float:
        """The percentile of the time from the end of a window to its decision."""
        return float(np.percentile([decision.latency_ms for decision in self.decisions], percent))

    def changes(self) -> list[tuple[float, str]]:
        """From which time in milliseconds on the decision is which class."""
        found: list[tuple[float, str]] = []
        for decision in self.decisions:
            name = self.classes[decision.label]
            if not found or found[-1][1] != name:
                found.append((decision.end_ms, name))
        return found


def play(
    run: PathLike,
    file: PathLike,
    window_ms: float | None = None,
    last: int | None = None,
    engine: PathLike | None = None,
    out: PathLike | None = None,
) -> Played:
    """Plays a recording through a trained network: a step for each window of time, neurons remember.

    Args:
        run: the folder of a finished run, or `weights:NAME`.
        file: the recording, in any format of `read_events`.
        window_ms: length of a window; without it that of the data set's frames, or 10 where these have none.
        last: how many windows a decision looks back on; all without it.
        engine: a file of `Engine.save`; without it an engine is made, or where that cannot be, the network runs.
        out: a page to write, of decisions, events and spikes over time.

    Raises:
        UsageError: an unfinished run, one that takes no events or cannot run step by step, a recording that cannot be
            read, has no events or does not fit the sensor, a wrong number, or a place that cannot be written.
    """
    trained = load_classifier(run)
    data, model = trained.run.settings.data, trained.model
    frames = RecordingFrames(data.name, data.options)
    window_ms = frames.slicer.dt or 10.0 if window_ms is None else window_ms
    WindowCutter(window_ms)  # a wrong length is told before the file is read
    start = time.perf_counter()
    events = frames.read(file)
    read_s = time.perf_counter() - start
    if not len(events):
        raise DataFileError(f"{os.fspath(file)}: no events to play")
    network, why = (deploy.load(engine), "") if engine is not None else engine_of(model, frames, events, window_ms)
    sensor = SensorStream(network, frames, window_ms, last)
    started = time.perf_counter(), time.process_time()
    decisions = (*sensor.feed(events), *sensor.close())
    computing_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    found = Played(
        title=trained.run.title,
        file=os.fspath(file),
        classes=tuple(class_names(data.name, trained.num_classes, trained.summary.get("classes"))),
        window_ms=window_ms,
        last=last,
        decisions=decisions,
        events=len(events),
        seconds=(int(events.t.max()) - int(events.t[0])) / 1e6,
        computing_s=computing_s,
        cpu_s=cpu_s,
        read_s=read_s,
        frame_events=frames.events_a_frame(events),
        by="engine" if isinstance(network, Engine) else "network",
        why=why,
        spikes=() if out is None else _spikes(model, frames, _windows(events, window_ms)),
        page=None if out is None else Path(out),
    )
    if found.page is not None:
        with atomic(found.page) as temporary:
            temporary.write_text(_page(found), encoding="utf-8")
    return found


def _windows(events: Events, window_ms: float) -> Iterator[Events]:
    cutter = WindowCutter(window_ms)
    yield from cutter.feed(events)
    if (rest := cutter.close()) is not None:
        yield rest


def engine_of(
    model: nn.Module, frames: RecordingFrames, events: Events, window_ms: float
) -> tuple[Engine | nn.Module, str]:
    """An engine tuned on windows from the middle of a recording, and ""; or the network and why there is none.

    Args:
        model: a trained network.
        frames: make its input of events.
        events: of the recording.
        window_ms: length of a window in milliseconds.
    """
    middle = itertools.islice(_windows(events.part(len(events) // 2), window_ms), _EXAMPLES)
    try:
        return deploy.compile(model, torch.cat([frames.window(window) for window in middle])), ""
    except UsageError as error:
        return model, " ".join(str(error).split())


@torch.no_grad()
def _spikes(model: nn.Module, frames: RecordingFrames, windows: Iterator[Events]) -> tuple[int, ...]:
    """Spikes of all layers at each window, in a second run that is not timed."""
    totals: list[int] = [0]
    stream = Stream(model)
    with RateMeter(model) as meter:
        for window in windows:
            stream(frames.window(window))
            totals.append(round(sum(meter.spikes().values())))
    return tuple(after - before for before, after in itertools.pairwise(totals))


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(found: Played) -> str:
    count = len(found.decisions)
    shown = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(int)).tolist()
    times = [found.decisions[i].end_ms for i in shown]
    events = [found.decisions[i].events for i in shown]
    latencies = [round(found.decisions[i].latency_ms, 4) for i in shown]
    leaders = [found.classes[found.decisions[i].label] for i in shown]
    order: list[int] = found.decisions[-1].mean.argsort(descending=True, stable=True).tolist()
    chances = {
        found.classes[label]: [round(100 * float(found.decisions[i].probabilities[label]), 2) for i in shown]
        for label in order[:_CLASSES]
    }
    horizon = "all windows so far" if found.last is None else f"the last {found.last} windows"
    plots = [
        _lines(
            "Decision over time",
            f"Probability of a class: softmax of the mean logits of {horizon}. At the end: {leaders[-1]}.",
            times,
            chances,
            "probability, %",
            {"decision": leaders, **chances},
        ),
        _lines(
            "Events over time",
            f"{found.events:,} events in {found.seconds:.3g} s, in windows of {found.window_ms:g} ms.",
            times,
            {"events": events},
            "events in a window",
        ),
        _lines(
            "Spikes over time",
            f"{sum(found.spikes):,} spikes of all layers of the network.",
            times,
            {"spikes": [found.spikes[i] for i in shown]},
            "spikes in a window",
        ),
        _lines(
            "Latency over time",
            f"From the end of a window to its decision, by the {found.by}: half within {found.latency_ms(50):.3g} ms, "
            f"99 of 100 within {found.latency_ms(99):.3g} ms.",
            times,
            {"latency": latencies},
            "milliseconds",
        ),
    ]
    left_out = f"{len(shown):,} of {count:,} windows are drawn, evenly spread." if len(shown) < count else ""
    return fill("play.html", plots=True, found=found, figures=plots, decided=leaders[-1], left_out=left_out)


def _lines(
    title: str,
    words: str,
    times: Sequence[float],
    series: dict[str, list[Any]],
    axis: str,
    cells: dict[str, list[Any]] | None = None,
) -> Plot:
    """Lines over time, with their values, or other `cells`, as a table."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, values) in enumerate(series.items()):
        figure.add_scatter(
            x=times, y=values, name=name, mode="lines", line={"color": COLORS[index % len(COLORS)], "shape": "vh"}
        )
    figure.update_layout(xaxis_title="milliseconds since the first event", yaxis_title=axis)
    cells = cells or series
    rows = [(round(at, 4), *row) for at, row in zip(times, zip(*cells.values(), strict=True), strict=True)]
    return Plot(title, words, plain_figure(figure), Table(title, ("window ends at, ms", *cells), rows))
