"""`spikeloom sweep`: a recipe with every combination of some settings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeloom.cli.arguments import RECIPE_KEYS, AsJson, Words, read_budget, read_settings
from spikeloom.cli.progress import stop_on_signal
from spikeloom.cli.tables import print_sweep
from spikeloom.errors import UsageError

Json = dict[str, Any]


def sweep(
    context: typer.Context,
    words: Words = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="PATH", help="Where run folders go.")] = Path("runs/sweep"),
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, metavar="N", help="Runs at a time; as many as there are cores.")
    ] = None,
    search: Annotated[
        int | None,
        typer.Option("--search", min=1, metavar="N", help="Train N combinations that Optuna chooses from ranges."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a row of a recipe with every combination of settings, and print mean and deviation of each.

    \b
    spikeloom sweep quickstart/digits train.lr=0.05,0.1,0.2 seed=1..3
    spikeloom sweep report/table2#s0t2b budget=short train.lr=0.05,0.1 data.validation=0.1 data.root=DATA
    spikeloom sweep quickstart/digits --search 20 train.lr=1e-3..1e-1 data.validation=0.1

    Several values are separated by commas; 1..3 are whole numbers. Each run has a folder of its own. The same command
    continues a sweep that was stopped. With data.validation combinations are ranked by the validation part. With
    --search 1e-3..1e-1 is a range of numbers, and N counts the runs of earlier calls too.
    """
    words = list(words or [])
    if not words or "=" in words[0]:
        raise UsageError("name a recipe, for example: spikeloom sweep quickstart/digits train.lr=0.1,0.2 seed=1..3")
    from spikeloom.search import Search, import_optuna, parse_space
    from spikeloom.sweep import parse_grid, plan, run_trials, table
    from spikeloom.train.recipe import load_row

    target, settings = words[0], words[1:]
    if search is None:
        fixed, axes = parse_grid(settings)
        if "budget" in axes:
            raise UsageError("a sweep has one budget: give budget= a single value")
        checked = [*fixed, *(f"{key}={found[0]}" for key, found in axes.items())]
    else:
        fixed, axes = parse_space(settings, import_optuna())
        checked = fixed
    values = read_settings(context, checked, RECIPE_KEYS)
    recipe, row = load_row(target)
    own = [word for word in fixed if not word.startswith("budget=")]
    budget, cores = read_budget(values) or recipe.budget, os.cpu_count() or 1
    if search is None:
        trials = plan(recipe, row, budget, own, axes, runs)
        jobs = min(jobs or cores, len(trials))
        with stop_on_signal() as stop:
            whole = run_trials(trials, target, fixed, jobs, max(1, cores // jobs), _say, stop)
    else:
        searched = Search(recipe, row, budget, own, axes, runs, search)
        jobs, trials = min(jobs or cores, search), searched.trials
        with stop_on_signal() as stop:
            whole = searched.run(target, fixed, jobs, max(1, cores // jobs), _say, stop)
    if not whole:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130)
    records = table(trials)
    if as_json:
        print(json.dumps({"runs": str(runs), "rows": records}))
    else:
        print_sweep(target, records)
    if any(record["failed"] for record in records):
        raise typer.Exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
