"""`spikeloom reproduce`: the rows of a published table, published beside measured."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, Words, read_budget, read_recipe
from spikeloom.cli.progress import show_progress, stop_on_signal
from spikeloom.cli.tables import print_drawn, print_measured, print_scores, print_table
from spikeloom.errors import UsageError, cannot_write

if TYPE_CHECKING:
    from spikeloom.train.recipe import Recipe


def reproduce(
    context: typer.Context,
    words: Words = None,
    runs: Annotated[Path | None, typer.Option("--runs", metavar="PATH", help="Where run folders go: runs.")] = None,
    results: Annotated[Path, typer.Option("--results", metavar="PATH", help="Where numbers go.")] = Path("results"),
    scores: Annotated[
        bool, typer.Option("--scores", help="Train nothing: print every published accuracy beside the best measured.")
    ] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Train and measure nothing: draw the recorded figures as HTML pages.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Of --scores: a page, .md or .html. Of --figures: the folder of the pages, figures/RECIPE without it.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train or measure every row of a published table and print published beside measured.

    \b
    spikeloom reproduce report/table2 budget=smoke data.root=DATA
    spikeloom reproduce report/table2#s0t2b budget=short data.root=DATA
    spikeloom reproduce --scores --out docs/scores.md
    spikeloom reproduce report/table3 --figures

    Finished rows are taken from their run folders, interrupted ones are continued, and rows whose data are missing
    are left out. Keys: seed, budget (smoke, short, hours, full), and anything under data., model., neuron., train. and
    measure. that a recipe may set. Figures are recorded as data beside the numbers; --figures takes budget= and seed=
    where only those of one budget or seed are to be drawn.
    """
    if scores and figures:
        raise UsageError("--scores and --figures are two commands: give one of them")
    if runs is not None and (scores or figures):
        raise UsageError("--runs is where rows are trained; --scores and --figures read --results")
    if scores:
        _print_scores(words, results, out, as_json)
        return
    if out is not None and not figures:
        raise UsageError(
            "--out is the page of --scores or the folder of --figures; tables write their numbers to --results"
        )
    name, values = read_recipe(context, words)
    if name is None:
        raise UsageError("name a table, for example 'spikeloom reproduce report/table2'; see 'spikeloom list recipes'")
    from spikeloom.train.recipe import load_recipe

    recipe_name, _, row = name.partition("#")
    recipe = load_recipe(recipe_name)
    budget = read_budget(values)
    if figures:
        filters = values if budget is None else {"budget": budget, **values}
        _draw_figures(recipe, row or None, filters, results, out, as_json)
        return
    budget = budget or recipe.budget
    from spikeloom.reproduce import reproduce as run_table
    from spikeloom.train.loop import Interrupted

    with show_progress() as progress, stop_on_signal() as stop:
        try:
            rows, folder = [row] if row else list(recipe.rows), runs or Path("runs")
            records = run_table(recipe, rows, budget, values, folder, results, progress, stop)
        except Interrupted:
            print("stopped; the same command continues", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(records))
    else:
        whole = recipe.measures or any("figures" in record for record in records)
        (print_measured if whole else print_table)(recipe.title, recipe.paper, budget, records)
        print(f"results: {results / recipe.short_name}")
        if any(record.get("figures") for record in records):
            place = "" if results == Path("results") else f" --results {shlex.quote(str(results))}"
            print(f"draw its figures: spikeloom reproduce {shlex.quote(recipe.name)} --figures{place}")
    if any("failed" in record for record in records):
        raise typer.Exit(2)


def _draw_figures(
    recipe: Recipe, row: str | None, filters: dict[str, Any], results: Path, out: Path | None, as_json: bool
) -> None:
    from spikeloom.analyse.plots import FOLDER, draw_figures
    from spikeloom.reproduce import recorded_figures

    for key in filters.keys() - {"budget", "seed"}:
        raise UsageError(f"--figures draws what is recorded and takes budget= and seed= alone, got {key!r}")
    recorded = recorded_figures(recipe, results, row, filters)
    print_drawn(draw_figures(recorded, out or Path(FOLDER) / recipe.short_name), as_json)


def _print_scores(words: list[str] | None, results: Path, out: Path | None, as_json: bool) -> None:
    from spikeloom.scores import as_markdown, as_page, scoreboard, summary

    if words:
        raise UsageError(f"--scores is of all recipes and takes no settings, got {words[0]!r}")
    if out is not None and out.suffix not in (".md", ".html"):
        raise UsageError(f"--out takes a page that ends in .md or .html, got {out}")
    if not results.is_dir():
        raise UsageError(f"there are no results in {results}: give their folder as --results PATH")
    scores = scoreboard(results)
    if out is not None:
        try:
            page = as_page(scores) if out.suffix == ".html" else as_markdown(scores)
            out.write_text(page, encoding="utf-8")
        except OSError as error:
            raise cannot_write(out, error) from None
    if as_json:
        print(json.dumps([dataclasses.asdict(score) | {"difference": score.difference} for score in scores]))
        return
    print_scores(scores)
    for line in summary(scores):
        print(line)
    if out is not None:
        print(f"page: {out}")
