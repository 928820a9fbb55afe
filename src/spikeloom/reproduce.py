"""Runs the rows of a published table, trained or measured, and sets what came out beside what was published."""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import spikeloom.bench  # noqa: F401  # pyright: ignore[reportUnusedImport] - registers its measurements
from spikeloom.analyse import MEASUREMENTS, Measured, count_cost, training_curves
from spikeloom.analyse.audit.cost import steps_of
from spikeloom.analyse.columns import published_columns
from spikeloom.analyse.plots import FOLDER, write_figure
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, make_folder, write_json
from spikeloom.registry import list_recipes
from spikeloom.train.build import build_datasets, build_model, seed_everything
from spikeloom.train.checks_of_settings import check_beginning
from spikeloom.train.environments import train_accuracies
from spikeloom.train.loop import Progress, train
from spikeloom.train.machine import environment
from spikeloom.train.pretrain import Reconstructs
from spikeloom.train.recipe import Budget, Recipe, Row, check_options, load_recipe
from spikeloom.train.run import Run
from spikeloom.train.settings import MeasureSettings, Settings

Json = dict[str, Any]
_PLACES = {"measure": {"data": {"root": True}}}  # of data on this machine, in options of measurements


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

    Rows of a recipe that measures are measured anew. Settings, data and networks of all rows are checked before the
    first one runs. A row whose data are missing is left out with a warning. One that fails on the way, such as by a
    loss that is no number, does not keep the others from running.

    Args:
        recipe: the table.
        rows: ids of its rows.
        budget: how much of it.
        overrides: settings from the command line.
        runs: where run folders go; a row with the same settings finds its own again.
        results: where `<table>/<row>.<budget>.seed<seed>.json` goes, and data of figures in `<table>/figures/`.
        progress, stop: as `train`.

    Returns:
        One record a row: published and measured numbers, settings, environment. A row without measured numbers has the
        reason as `missing` (data) or `failed` instead.

    Raises:
        UsageError: a mistake in the settings of a row, or no row has numbers: the reason of the first.
    """
    runs, results = Path(runs), Path(results)
    folder = results / recipe.short_name
    work = _Work(runs, folder, progress, stop)
    records: dict[str, Json] = {row: {} for row in rows}
    jobs: dict[str, Callable[[], Json]] = {}
    if recipe.measures:
        for row in records:
            measured = check_measure(recipe, row, budget, overrides)
            jobs[row] = functools.partial(_measure, recipe, row, budget, measured, folder)
    else:
        resolved = {row: recipe.resolve(row, budget, overrides) for row in records}
        _check_asked(recipe, resolved, overrides)
        for row, cost in _costs(recipe, resolved, progress).items():
            if isinstance(cost, UsageError):
                records[row] = _without_numbers(recipe, row, "missing", cost)
            else:
                settings = resolved[row]
                jobs[row] = functools.partial(_train_row, recipe, row, budget, settings, cost, work)
    make_folder(folder, "with --results")
    for row, job in jobs.items():
        try:
            records[row] = job()
        except UsageError as error:
            if len(jobs) == 1:
                raise
            progress.warn(f"{recipe.name}#{row} failed: {error}")
            records[row] = _without_numbers(recipe, row, "failed", error)
    if all("failed" in records[row] for row in jobs):
        raise UsageError(records[next(iter(jobs))]["failed"])
    return list(records.values())


def _check_asked(recipe: Recipe, rows: dict[str, Settings], overrides: Json) -> None:
    """Refuses settings that have no effect on any of the rows."""
    errors: list[UsageError] = []
    for row, settings in rows.items():
        try:
            check_beginning(settings.train, overrides.get("train", {}), f"{recipe.name}#{row}")
        except UsageError as error:
            errors.append(error)
    if len(errors) == len(rows):
        raise errors[0]


def _without_numbers(recipe: Recipe, row: str, why: str, error: UsageError) -> Json:
    entry = recipe.rows[row]
    return {"table": recipe.name, "row": row, "system": entry.system, "published": entry.published, why: str(error)}


def _costs(recipe: Recipe, rows: dict[str, Settings], progress: Progress) -> dict[str, Json | UsageError]:
    """What each row's network costs by its layout; of a row whose data are not there the error that says so.

    Raises:
        UsageError: no row has its data, or a network does not fit its data.
    """
    data: dict[str, _Data | UsageError] = {}  # by settings of data, which the rows of a table share
    costs: dict[str, Json | UsageError] = {}
    for row, settings in rows.items():
        key = settings.data.model_dump_json()
        if key not in data:
            data[key] = _look_at_data(settings)
        found = data[key]
        costs[row] = found if isinstance(found, UsageError) else _cost(settings, found)
    absent = {row: cost for row, cost in costs.items() if isinstance(cost, UsageError)}
    if len(absent) == len(costs):
        raise next(iter(absent.values()))
    for reason in dict.fromkeys(map(str, absent.values())):
        names = ", ".join(row for row, error in absent.items() if str(error) == reason)
        progress.warn(f"{recipe.name} without {names}: {reason}")
    return costs


@dataclass(frozen=True)
class _Data:
    """What a network must know of a data set, and an input of it."""

    title: str
    in_channels: int
    classes: int
    input_shape: tuple[int, ...]
    example: Tensor
    is_sequence: bool


def _look_at_data(settings: Settings) -> _Data | UsageError:
    """A data set as `_Data`, or the error that says why it is not there."""
    try:
        dataset, _ = build_datasets(settings)
    except UsageError as error:
        return error
    example = dataset.encode(dataset.batch([0])[0])
    classes, shape = len(dataset.classes), tuple(dataset.input_shape)
    return _Data(dataset.title, dataset.in_channels, classes, shape, example, dataset.is_sequence)


def _cost(settings: Settings, data: _Data) -> Json:
    """Parameters, and operations by the rules of `Cost`; of a model that gives its input back parameters alone."""
    model = build_model(settings, data.in_channels, data.classes)
    if isinstance(model, Reconstructs):
        parameters = {"parameters": sum(p.numel() for p in model.parameters())}
        if (decoder := getattr(model, "decoder_parameters", None)) is not None:
            parameters["decoder_params"] = decoder
        return {**parameters, "macs": None, "flops_s0": None}
    try:
        return asdict(count_cost(model, data.input_shape, steps_of(model, data.example, data.is_sequence)))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"model {settings.model.name} cannot take {data.title} of shape {data.input_shape}: {reason}"
        ) from None


@dataclass(frozen=True)
class _Work:
    """Where runs and results of a table go, and who is told and asked on the way."""

    runs: Path
    results: Path
    progress: Progress
    stop: Callable[[], bool]


def _train_row(recipe: Recipe, row: str, budget: Budget, settings: Settings, cost: Json, work: _Work) -> Json:
    """Trains a row unless that is done, and writes its record."""
    run, summary = _trained(recipe, row, budget, settings, work)
    record = _record(recipe.rows[row], recipe, run, summary, cost)
    published = recipe.rows[row].published
    record["measured"] |= published_columns(recipe.name, published, run, summary, work.progress)
    stem = f"{row}.{budget}.seed{settings.seed}"
    if "last" in summary:
        record |= _environments(summary, record["measured"])
        curves = training_curves(run.metrics(), f"{recipe.rows[row].system}, {summary['data']['train']}")
        record["figures"] = _write_figures(work.results, stem, {"curves": curves})
    write_json(work.results / f"{stem}.json", record, rows=True)
    return record


def _trained(recipe: Recipe, row: str, budget: Budget, settings: Settings, work: _Work) -> tuple[Run, Json]:
    """A row's run, trained if it was not: first the row of a recipe, if any, that it starts from."""
    base, _, base_row = (settings.train.start_from or "").partition("#")
    if base in list_recipes():
        first = load_recipe(base)
        first_settings = first.resolve(base_row, budget, {"data": {"root": settings.data.root}})
        started, _ = _trained(first, base_row, budget, first_settings, work)
        train_settings = settings.train.model_copy(update={"start_from": str(started.folder)})
        settings = settings.model_copy(update={"train": train_settings})
    name = recipe.short_name.replace("/", "-")
    folder = work.runs / name / f"{row}-{budget}-{_digest(settings)}"
    begun = (folder / "settings.json").is_file()
    run = Run.open(folder) if begun else Run.plan(folder, recipe.name, row, budget, settings)
    return run, run.summary() or train(run, work.progress, work.stop)


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
    record: Json = {
        "table": recipe.name,
        "row": row,
        "system": recipe.rows[row].system,
        "budget": budget,
        "seed": settings.seed,
        "published": recipe.rows[row].published,
        "measured": found.values,
        "tables": found.tables,
        "figures": _write_figures(folder, stem, found.figures),
        "seconds": round(time.monotonic() - start, 3),
        "settings": settings.model_dump(exclude=_PLACES),
        "environment": environment(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(folder / f"{stem}.json", record, rows=True)
    return record


def _write_figures(folder: Path, stem: str, figures: dict[str, Any]) -> list[str]:
    """Records the data of figures, and returns the files by their names in the folder of results."""
    names = {f"{FOLDER}/{stem}.{name}.json": figure for name, figure in figures.items()}
    for name, figure in names.items():
        write_figure(folder / name, figure)
    return list(names)


def recorded_figures(recipe: Recipe, results: PathLike, row: str | None, filters: Json) -> list[Path]:
    """Files of the recorded figures of a recipe.

    Args:
        recipe: the table or figure.
        results: as `reproduce`.
        row: its id; None: all rows.
        filters: `budget` and `seed`, where only figures of these are wanted.

    Raises:
        UsageError: there are none, or the recipe has no such row.
    """
    if row is not None:
        recipe.check_row(row)
    folder = Path(results) / recipe.short_name / FOLDER
    stem = f"{row or '*'}.{filters.get('budget', '*')}.seed{filters.get('seed', '*')}.*.json"
    found = sorted(folder.glob(stem))
    if found:
        return found
    if others := len(list(folder.glob("*.json"))):
        fix = f"there are {others} of other rows, budgets or seeds, drawn if none is named"
    elif recipe.measures:
        fix = f"'spikeloom reproduce {shlex.quote(recipe.name)}' records those of its measurement, if it has any"
    else:
        fix = "of trained rows, only those of several environments record curves; 'spikeloom report RUN' draws any run"
    asked = [f"{recipe.name}#{row}" if row else recipe.name, *(f"{key}={value}" for key, value in filters.items())]
    raise UsageError(f"no figure of {', '.join(asked)} is recorded in {folder}: {fix}")


def _record(row: Row, recipe: Recipe, run: Run, summary: Json, cost: Json) -> Json:
    settings = run.settings
    millions = {key: None if value is None else value / 1e6 for key, value in cost.items()}
    return {
        "table": recipe.name,
        "row": run.row,
        "system": row.system,
        "budget": run.budget,
        "seed": settings.seed,
        "published": row.published,
        "measured": {
            "acc": summary["test_accuracy"],
            "best_acc": summary["best_test_accuracy"],
            "params_M": millions["parameters"],
            "macs_M": millions["macs"],
            "flops_M": millions["flops_s0"],
            **({"decoder_params_M": millions["decoder_params"]} if "decoder_params_M" in row.published else {}),
        },
        **cost,
        "data": summary["data"],
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
        "settings": settings.model_dump(exclude={"data": {"root"}}),
        **({"changes": list(run.changes)} if run.changes else {}),
        "environment": summary["environment"],
        "date": datetime.date.today().isoformat(),
    }


def _environments(summary: Json, measured: Json) -> Json:
    """What is reported of a run over environments: the accuracies of the epoch that the paper's rule selects, if any,
    and those of the last."""
    found: Json = {}
    for prefix, epoch in (("acc", summary["selected"]), ("last", summary["last"])):
        for n, accuracy in enumerate(train_accuracies(epoch or {}), 1):
            found[f"{prefix}_train{n}"] = accuracy
        if epoch is not None:
            found |= {f"{prefix}_test": epoch["test_accuracy"], f"{prefix}_epoch": epoch["epoch"]}
    return {"measured": {**found, **measured}}


def _digest(settings: Settings) -> str:
    # Where the data lie and how often checkpoints are written do not change the result.
    values = settings.model_dump(exclude={"data": {"root", "download"}, "train": {"checkpoint_minutes"}})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
