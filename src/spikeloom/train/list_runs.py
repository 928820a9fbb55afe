"""Which runs are in a folder, and a line about each: `spikeloom list runs`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.train.recipe import flatten
from spikeloom.train.run import Run

Json = dict[str, Any]


def find_runs(place: PathLike) -> list[Path]:
    """The folders of runs in a folder, at most two folders deep, as `train` and `reproduce` make them; oldest first.

    Raises:
        UsageError: there is no such folder.
    """
    place = Path(place)
    if not place.is_dir():
        raise UsageError(f"there are no runs in {place}: give their folder as --runs PATH")
    found = [path for pattern in ("*", "*/*") for path in place.glob(f"{pattern}/settings.json")]
    return [path.parent for path in sorted(found, key=lambda path: (path.stat().st_mtime, path))]


def describe_run(folder: PathLike) -> str:
    """A line about a run: what it trains, how far it is, its accuracy and its time; or what is wrong with it."""
    try:
        run = Run.open(folder)
        summary, records = run.summary(), run.metrics()
    except UsageError as error:
        return f"damaged: {error}"
    what, epochs = f"{run.title} ({run.budget}), seed {run.settings.seed}", run.settings.train.epochs
    if summary is None:
        last = records[-1].get("test_accuracy") if records else None
        now = "" if last is None else f", {last:.2f} % so far"
        return f"{what}: epoch {len(records)} of {epochs}{now}, not finished"
    accuracy = summary["test_accuracy"]
    result = f"loss {summary['test_loss']:.4f}" if accuracy is None else f"{accuracy:.2f} %"
    return f"{what}: {result}, {summary['epochs']} epochs, {_duration(summary['seconds'])}"


def compare_runs(folders: Iterable[PathLike]) -> list[Json]:
    """A record for each run: its folder as it is given, the settings in which the runs differ, and what came out.

    Keys after the settings: `accuracy` and `validation` (percent, None where there is none), `epochs`, `seconds`,
    `parameters` (None of an unfinished run) and `state`.

    Raises:
        UsageError: a folder is no run.
    """
    names = [os.fspath(folder) for folder in folders]
    runs = [Run.open(name) for name in names]
    settings = [{"recipe": run.title, "budget": run.budget, **flatten(run.settings.model_dump())} for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
    records: list[Json] = []
    for name, run, each in zip(names, runs, settings, strict=True):
        summary, metrics = run.summary(), run.metrics()
        last = summary or (metrics[-1] if metrics else {})
        records.append(
            {
                "run": name,
                **{key: each.get(key) for key in differing},
                "accuracy": last.get("test_accuracy"),
                "validation": last.get("validation_accuracy"),
                "epochs": len(metrics),
                "seconds": run.seconds() if summary is None else summary["seconds"],
                "parameters": None if summary is None else summary["parameters"],
                "state": "finished" if summary else f"{len(metrics)} of {run.settings.train.epochs} epochs",
            }
        )
    return records


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
