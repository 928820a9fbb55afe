"""Runs the rows of a published table, trained or measured, and sets what came out beside what was published."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import spikeloom.bench  # noqa: F401  # pyright: ignore[reportUnusedImport] - registers its measurements
from spikeloom.analyse import MEASUREMENTS, Measured, count_cost, training_curves
from spikeloom.errors import UsageError
from spikeloom.train.build import build_datasets, build_model, seed_everything
from spikeloom.train.checkpoint import PathLike, write_json
from spikeloom.train.environments import train_accuracies
from spikeloom.train.loop import Progress, train
from spikeloom.train.recipe import (
    Budget,
    MeasureSettings,
    Recipe,
    Row,
    Settings,
    check_options,
    list_recipes,
    load_recipe,
)
from spikeloom.train.run import Run, environment

Json = dict[str, Any]


def reproduce(
    recipe: Recipe,
    rows: Iterable[str],
    budget: Budget,
    overrides: Json,
    runs: PathLike,
    results: PathLike,
    progress: Progress,
    stop: Callable[[], bool],
) -> list[Json]:
    """Trains every row that is not trained yet, continues one that was interrupted, and writes `results`.

    Rows of a recipe that measures are measured anew.

    Args:
        recipe: the table.
        rows: ids of its rows.
        budget: how much of it.
        overrides: settings from the command line.
        runs: where run folders go; a row with the same settings finds its own again.
        results: where `<table>/<row>.<budget>.seed<seed>.json` goes.
        progress, stop: as `train`.

    Returns:
        One record a row: published and measured numbers, settings, environment.
    """
    runs, results = Path(runs), Path(results)
    name = recipe.short_name
    records: list[Json] = []
    # All rows are checked before the first one runs.
    if recipe.measures:
        planned = {row: check_measure(recipe, row, budget, overrides) for row in rows}
        with _writable(results / name):
            (results / name).mkdir(parents=True, exist_ok=True)
        return [_measure(recipe, row, budget, planned[row], results / name) for row in planned]
    resolved = {row: recipe.resolve(row, budget, overrides) for row in rows}
    with _writable(results / name):
        (results / name).mkdir(parents=True, exist_ok=True)
    for row, settings in resolved.items():
        run, summary = _trained(recipe, row, budget, settings, runs, progress, stop)
        record = _record(recipe.rows[row], recipe, run, summary)
        stem = f"{row}.{budget}.seed{settings.seed}"
        if "last" in summary:
            record |= _environments(summary, record["measured"], f"{stem}.curves.html")
            curves = training_curves(run.metrics(), f"{recipe.rows[row].system}, {summary['data']['train']}")
            curves.write_html(str(results / name / f"{stem}.curves.html"), include_plotlyjs=True)
        write_json(results / name / f"{stem}.json", record)
        records.append(record)
    return records


def _trained(
    recipe: Recipe,
    row: str,
    budget: Budget,
    settings: Settings,
    runs: Path,
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[Run, Json]:
    """A row's run, trained if it was not: first the row of a recipe, if any, that it starts from."""
    base, _, base_row = (settings.train.start_from or "").partition("#")
    if base in list_recipes():
        first = load_recipe(base)
        first_settings = first.resolve(base_row, budget, {"data": {"root": settings.data.root}})
        started, _ = _trained(first, base_row, budget, first_settings, runs, progress, stop)
        train_settings = settings.train.model_copy(update={"start_from": str(started.folder)})
        settings = settings.model_copy(update={"train": train_settings})
    name = recipe.short_name.replace("/", "-")
    folder = runs / name / f"{row}-{budget}-{_digest(settings)}"
    begun = (folder / "settings.json").is_file()
    run = Run.open(folder) if begun else Run.plan(folder, recipe.name, row, budget, settings)
    return run, run.summary() or train(run, progress, stop)


def check_measure(recipe: Recipe, row: str, budget: Budget | None, overrides: Json) -> MeasureSettings:
    """What a row of a recipe measures, its options checked.

    Raises:
        UsageError: an unknown measurement or option.
    """
    settings = recipe.resolve_measure(row, budget, overrides)
    check_options(settings.measure, MEASUREMENTS, f"{recipe.name}#{row}: measure", set())
    return settings


def _measure(recipe: Recipe, row: str, budget: Budget, settings: MeasureSettings, folder: Path) -> Json:
    seed_everything(settings.seed)
    start = time.monotonic()
    found: Measured = MEASUREMENTS[settings.measure.name](**settings.measure.options)
    stem = f"{row}.{budget}.seed{settings.seed}"
    for name, figure in found.figures.items():
        figure.write_html(str(folder / f"{stem}.{name}.html"), include_plotlyjs=True)
    record: Json = {
        "table": recipe.name, "row": row, "system": recipe.rows[row].system, "budget": budget, "seed": settings.seed,
        "published": recipe.rows[row].published, "measured": found.values, "tables": found.tables,
        "figures": [f"{stem}.{name}.html" for name in found.figures],
        "seconds": round(time.monotonic() - start, 3), "settings": settings.model_dump(),
        "environment": environment(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    write_json(folder / f"{stem}.json", record)
    return record


@contextlib.contextmanager
def _writable(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}; choose another with --results") from None


def _record(row: Row, recipe: Recipe, run: Run, summary: Json) -> Json:
    settings = run.settings
    train_set, _ = build_datasets(settings)
    model = build_model(settings, train_set.in_channels, len(train_set.classes))
    steps = int(getattr(model, "T", 1))
    cost = count_cost(model, train_set.input_shape, steps)
    return {
        "table": recipe.name, "row": run.row, "system": row.system, "budget": run.budget, "seed": settings.seed,
        "published": row.published,
        "measured": {
            "acc": summary["test_accuracy"], "best_acc": summary["best_test_accuracy"],
            "params_M": cost.parameters / 1e6, "macs_M": cost.macs / 1e6, "flops_M": cost.flops_s0 / 1e6,
        },
        "parameters": cost.parameters, "macs": cost.macs, "flops_s0": cost.flops_s0,
        "data": summary["data"], "epochs": summary["epochs"], "seconds": summary["seconds"],
        "settings": settings.model_dump(exclude={"data": {"root"}}),
        **({"changes": list(run.changes)} if run.changes else {}),
        "environment": summary["environment"], "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _environments(summary: Json, measured: Json, figure: str) -> Json:
    """What is reported of a run over environments: the accuracies of the epoch that the paper's rule selects, if any,
    and those of the last."""
    found: Json = {}
    for prefix, epoch in (("acc", summary["selected"]), ("last", summary["last"])):
        for n, accuracy in enumerate(train_accuracies(epoch or {}), 1):
            found[f"{prefix}_train{n}"] = accuracy
        if epoch is not None:
            found |= {f"{prefix}_test": epoch["test_accuracy"], f"{prefix}_epoch": epoch["epoch"]}
    return {"measured": {**found, **measured}, "figures": [figure]}


def _digest(settings: Settings) -> str:
    # Where the data lie and how often checkpoints are written do not change the result.
    values = settings.model_dump(exclude={"data": {"root", "download"}, "train": {"checkpoint_minutes"}})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
