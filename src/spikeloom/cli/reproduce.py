"""`spikeloom reproduce`: the rows of a published table, published beside measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from spikeloom.cli.arguments import AsJson, Words, parse, read_budget
from spikeloom.cli.progress import show_progress, stop_on_signal
from spikeloom.cli.tables import print_measured, print_table
from spikeloom.errors import UsageError


def reproduce(words: Words = None, as_json: AsJson = False) -> None:
    """Train or measure every row of a published table and print published beside measured.

    \b
    spikeloom reproduce report/table2 budget=smoke data.root=DATA
    spikeloom reproduce report/table2#s0t2b budget=short data.root=DATA

    Finished rows are taken from their run folders, interrupted ones are continued. Numbers go to results/ (or
    results=PATH), run folders to runs/ (or run=PATH).
    """
    name, values = parse(words, "run", "results")
    if name is None:
        raise UsageError("name a table, for example 'spikeloom reproduce report/table2'; see 'spikeloom list recipes'")
    from spikeloom.train.recipe import load_recipe

    recipe_name, _, row = name.partition("#")
    recipe = load_recipe(recipe_name)
    budget = read_budget(values) or recipe.budget
    runs, results = Path(str(values.pop("run", "runs"))), Path(str(values.pop("results", "results")))
    from spikeloom.reproduce import reproduce as run_table
    from spikeloom.train.loop import Interrupted

    with show_progress(as_json) as progress, stop_on_signal() as stop:
        try:
            records = run_table(
                recipe, [row] if row else list(recipe.rows), budget, values, runs, results, progress, stop
            )
        except Interrupted:
            print("stopped; the same command continues", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(records))
        return
    if recipe.measures or "figures" in records[0]:
        print_measured(recipe.title, recipe.paper, budget, records)
    else:
        print_table(recipe.title, recipe.paper, budget, records)
    print(f"results: {results / recipe.name}")
