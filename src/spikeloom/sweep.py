"""Many runs of one recipe, with every combination of some settings: `spikeloom sweep`."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.plugins import named
from spikeloom.train.checks_of_settings import check_beginning
from spikeloom.train.recipe import Budget, Recipe, parse_overrides
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings

Json = dict[str, Any]
MOST = 1000  # combinations; more are a slip of the pen


@dataclass
class Trial:
    """One combination of a sweep.

    Attributes:
        varied: the settings in which it differs, as they were written.
        folder: of its run.
        summary: of the finished run.
        problem: why there is none.
    """

    varied: dict[str, str]
    folder: Path
    summary: Json | None = None
    problem: str = ""


@dataclass
class _Process:
    trial: Trial
    process: subprocess.Popen[str]
    log: Path
    started: float = field(default_factory=time.monotonic)


def parse_grid(words: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings `key=value` with one value, and those with several: `a,b,c`, or whole numbers from `1..3`.

    Commas inside brackets belong to a value.

    Raises:
        UsageError: nothing has several values, a value is missing or stands twice, or there are too many combinations.
    """
    fixed: list[str] = []
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        values = _values(text)
        if not equals or len(values) == 1:
            fixed.append(word)
            continue
        if "" in values or len(set(values)) < len(values):
            raise UsageError(f"{word}: a value is missing or stands twice")
        axes[key] = values
    if not axes:
        raise UsageError("name settings with several values, such as train.lr=1e-3,3e-3 or seed=1..3")
    if (count := math.prod(map(len, axes.values()))) > MOST:
        raise UsageError(f"the sweep has {count} combinations, and at most {MOST} are run: leave out values")
    return fixed, axes


def _values(text: str) -> list[str]:
    span = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text)
    if span is not None:
        first, last = map(int, span.groups())
        if first >= last:
            raise UsageError(f"{text}: the first number must be below the last")
        if last - first >= MOST:
            raise UsageError(
                f"{text} has {last - first + 1} values, and a sweep at most {MOST} combinations: leave out values"
            )
        return [str(n) for n in range(first, last + 1)]
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def plan(
    recipe: Recipe, row: str, budget: Budget, fixed: list[str], axes: dict[str, list[str]], runs: PathLike
) -> list[Trial]:
    """The trials of a sweep, each combination checked before any of them starts.

    Raises:
        UsageError: settings that the recipe does not take, or a folder of `runs` that holds another run.
    """
    trials: list[Trial] = []
    for combination in itertools.product(*axes.values()):
        varied = dict(zip(axes, combination, strict=True))
        values = overrides(fixed, varied)
        settings = recipe.resolve(row, budget, values)
        check_beginning(settings.train, values.get("train", {}), describe(varied))
        trials.append(planned(varied, place_of(recipe, row, runs), settings))
    return trials


def place_of(recipe: Recipe, row: str, runs: PathLike) -> Path:
    """The folder in which the runs of a sweep lie."""
    return Path(runs, *recipe.short_name.split("/"), *([] if row == "main" else [row]))


def planned(varied: dict[str, str], place: PathLike, settings: Settings) -> Trial:
    """A trial with its folder, and its summary where it has been run.

    Raises:
        UsageError: the folder holds another run.
    """
    trial = Trial(varied, Path(place, _folder_name(varied)))
    if (trial.folder / "settings.json").is_file():
        run = Run.open(trial.folder)
        if run.settings != settings:
            raise UsageError(
                f"{trial.folder} holds a run with other settings: choose another place for the sweep with --runs"
            )
        trial.summary = run.summary()
    return trial


def overrides(fixed: list[str], varied: dict[str, str]) -> Json:
    """Settings of all and of one trial, as a recipe takes them."""
    return parse_overrides([*fixed, *(f"{key}={value}" for key, value in varied.items())])


def _folder_name(varied: dict[str, str]) -> str:
    """What a file system takes, and a reader understands: `lr=0.001_seed=1`."""
    parts = (f"{key.removeprefix('train.')}={value}" for key, value in varied.items())
    return re.sub(r"[^\w.=+-]+", "-", "_".join(parts)).strip("-")


def run_trials(
    trials: list[Trial],
    target: str,
    words: list[str],
    jobs: int,
    threads: int,
    tell: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    """Trains the trials that have no summary, several side by side, each in a process of its own.

    Args:
        trials: get their summaries, or what went wrong.
        target: recipe and row.
        words: settings of all.
        jobs: processes at a time.
        threads: of each.
        tell: is told what starts and ends, a line each.
        stop: asked all the time; True ends the processes, which leave checkpoints.

    Returns:
        Whether all were run to their end, well or not; False after `stop`.
    """
    waiting = [trial for trial in trials if trial.summary is None]
    tell(f"{len(trials)} runs, {len(trials) - len(waiting)} of them finished; {jobs} at a time, {threads} threads each")
    return run_stream(iter(waiting), lambda _: None, target, words, jobs, threads, tell, stop)


def run_stream(
    waiting: Iterator[Trial],
    ended: Callable[[Trial], None],
    target: str,
    words: list[str],
    jobs: int,
    threads: int,
    tell: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    """Trains trials as they come, several side by side; the other arguments are those of `run_trials`.

    Args:
        waiting: is asked for a trial whenever a process is free.
        ended: is told of each that ended, before the next is asked for.
    """
    running: list[_Process] = []
    try:
        while True:
            if stop():
                return False
            while len(running) < jobs and (trial := next(waiting, None)) is not None:
                running.append(_start(trial, target, words, threads))
            if not running:
                return True
            time.sleep(0.1)
            for each in [each for each in running if each.process.poll() is not None]:
                running.remove(each)
                _finish(each)
                ended(each.trial)
                tell(f"{describe(each.trial.varied)}: {_outcome(each)}")
    finally:
        for each in running:
            each.process.send_signal(signal.SIGINT)
        for each in running:
            each.process.wait()


def _start(trial: Trial, target: str, words: list[str], threads: int) -> _Process:
    if (trial.folder / "settings.json").is_file():
        arguments = ["--resume", str(trial.folder)]
    else:
        varied = [f"{key}={value}" for key, value in trial.varied.items()]
        arguments = [target, *words, *varied, "--out", str(trial.folder)]
    imports = [f"--import={module}" for module in named()]
    log = trial.folder.parent / f"{trial.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "spikeloom", *imports, "train", *arguments, "--json"],
            stdout=subprocess.DEVNULL,
            stderr=file,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C comes to us, and we end them
        )
    return _Process(trial, process, log)


def _finish(each: _Process) -> None:
    trial = each.trial
    if each.process.returncode == 0:
        trial.summary = Run.open(trial.folder).summary()
        return
    lines = each.log.read_text().splitlines() or [f"ended with code {each.process.returncode}"]
    trial.problem = lines[-1].removeprefix("spikeloom: error: ")


def _outcome(each: _Process) -> str:
    if each.trial.summary is None:
        return f"failed: {each.trial.problem} (see {each.log})"
    return f"{score(each.trial.summary):.2f} in {time.monotonic() - each.started:.0f} s"


def describe(varied: dict[str, str]) -> str:
    """The settings of a combination, as they are written."""
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in varied.items())


def score(summary: Json) -> float:
    """What trials are ranked by: accuracy on the validation part if there is one, else on the test part."""
    found = summary.get("validation_accuracy", summary["test_accuracy"])
    return -summary["test_loss"] if found is None else found


def table(trials: list[Trial]) -> list[Json]:
    """A record for each combination without its seed, best first.

    Keys: `settings`, `runs` (finished ones), `accuracy` and its `deviation` over seeds (percent, of the test part; a
    run's own where there is one), `validation_accuracy` where there is such a part, `seconds` a run, `failed`.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        varied = {key: value for key, value in trial.varied.items() if key != "seed"}
        groups.setdefault(json.dumps(varied), []).append(trial)
    records: list[Json] = []
    for varied, group in groups.items():
        done = [trial.summary for trial in group if trial.summary is not None]
        record: Json = {"settings": json.loads(varied), "runs": len(done), "failed": len(group) - len(done)}
        if done:
            key = "test_loss" if done[0]["test_accuracy"] is None else "test_accuracy"
            found = [summary[key] for summary in done]
            record["loss" if key == "test_loss" else "accuracy"] = statistics.mean(found)
            record["deviation"] = statistics.stdev(found) if len(found) > 1 else None
            if "validation_accuracy" in done[0]:
                record["validation_accuracy"] = statistics.mean(summary["validation_accuracy"] for summary in done)
            record["seconds"] = statistics.mean(summary["seconds"] for summary in done)
            record["_rank"] = statistics.mean(map(score, done))
        records.append(record)
    records.sort(key=lambda record: -record.pop("_rank", -math.inf))
    return records
