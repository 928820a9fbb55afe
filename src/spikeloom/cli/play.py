"""`spikeloom run RUN --events FILE`: a recording of an event camera, as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.cli.arguments import Json, check_output
from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.play import Played

Events = Annotated[
    Path | None,
    typer.Option("--events", metavar="FILE", help="Play a recording of an event camera instead of the test data."),
]
WindowMs = Annotated[
    float | None,
    typer.Option("--window-ms", metavar="MS", help="Of a recording: length of a step; data.dt of the run, or 10."),
]
Last = Annotated[
    int | None,
    typer.Option("--last", min=1, metavar="N", help="Of a recording: a decision is of the last N windows, not of all."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="PATH", help="Of a recording: write a page of decision, events and spikes."),
]
_CHANGES = 8  # of the decision, that are printed


def check_options(context: typer.Context, events: Path | None, words: list[str] | None) -> None:
    """Checks that the options of test data and those of a recording are not mixed.

    Raises:
        UsageError: one of the other kind is given.
    """
    of_a_recording, of_both = {"window_ms", "last", "out"}, {"target", "words", "events", "file", "as_json"}
    given = [
        option
        for option in context.command.params
        if (source := context.get_parameter_source(option.name or "")) is not None and source.name == "COMMANDLINE"
    ]
    for option in given:
        if events is None and option.name in of_a_recording:
            raise UsageError(f"{option.opts[0]} is of a recording: add --events FILE, or leave it out")
    others = [option.opts[0] for option in given if option.name not in of_a_recording | of_both] + (words or [])
    if events is not None and others:
        raise UsageError(f"{others[0]} is of the test data, and --events plays a recording: leave one of them out")


def play_recording(
    run: str,
    events: Path,
    window_ms: float | None,
    last: int | None,
    engine: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Plays a recording and prints what the network says of it, and how fast."""
    from spikeloom.play import play

    check_output(out)
    found = play(run, events, window_ms, last, engine, out)
    if as_json:
        print(json.dumps(_plain(found)))
    else:
        _print(found)


def _plain(found: Played) -> Json:
    steps: list[dict[str, Any]] = [
        {
            "end_ms": decision.end_ms,
            "events": decision.events,
            "class": found.classes[decision.label],
            "probability": float(decision.probabilities[decision.label]),
            "mean_logit": float(decision.mean[decision.label]),
            "latency_ms": decision.latency_ms,
        }
        for decision in found.decisions
    ]
    for step, spikes in zip(steps, found.spikes, strict=False):
        step["spikes"] = spikes
    return {
        "target": found.title,
        "file": found.file,
        "class": steps[-1]["class"],
        "probability": steps[-1]["probability"],
        "window_ms": found.window_ms,
        "last": found.last,
        "windows": len(steps),
        "events": found.events,
        "seconds": found.seconds,
        "computing_s": found.computing_s,
        "cpu_s": found.cpu_s,
        "read_s": found.read_s,
        "real_time_factor": found.real_time_factor,
        "events_per_second": found.events_per_second,
        "latency_ms": {"p50": found.latency_ms(50), "p99": found.latency_ms(99)},
        "events_a_window": found.events / len(steps),
        "events_a_frame": found.frame_events,
        "by": found.by,
        "why": found.why,
        "page": None if found.page is None else str(found.page),
        "decisions": steps,
    }


def _print(found: Played) -> None:
    windows, end = len(found.decisions), found.decisions[-1]
    horizon = "all windows" if found.last is None else f"the last {found.last} windows"
    changes = found.changes()
    listed = ", ".join(f"{name} from {at:g} ms" for at, name in changes[-_CHANGES:])
    before = f"{len(changes) - _CHANGES} changes, then " if len(changes) > _CHANGES else ""
    print(f"{found.title} on {found.file}: {found.classes[end.label]}")
    print(
        f"  {100 * float(end.probabilities[end.label]):.1f} % by the mean logits of {horizon}; {before}{listed}\n"
        f"  {windows:,} windows of {found.window_ms:g} ms, {found.events:,} events in {found.seconds:.3g} s; "
        f"{found.events / windows:,.0f} events a window, {found.frame_events:,.0f} a frame of the training's kind\n"
        f"  {found.real_time_factor:,.3g} times real time, {found.events_per_second:,.0f} events a second: "
        f"{found.computing_s:.3g} s, {found.cpu_s:.3g} s of processor time, by the {found.by}\n"
        f"  from the end of a window to its decision {found.latency_ms(50):.3g} ms (median), "
        f"{found.latency_ms(99):.3g} ms (99th percentile)"
    )
    if found.why:
        print(f"  the engine cannot run this network: {found.why}")
    if found.page is not None:
        print(f"  page: {found.page}")
