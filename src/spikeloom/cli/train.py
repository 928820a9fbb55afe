"""`spikeloom train`: trains a row of a recipe, or continues a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from spikeloom.cli.arguments import AsJson, Json, Words, open_run, parse, read_budget
from spikeloom.cli.progress import show_progress, stop_on_signal
from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.train.run import Run


def train(words: Words = None, as_json: AsJson = False) -> None:
    """Train a recipe (without one: quickstart/digits), or continue a run.

    \b
    spikeloom train
    spikeloom train quickstart/mnist data.root=DATA
    spikeloom train report/table2#s0t2b budget=smoke data.root=DATA train.precision=bf16
    spikeloom train resume=RUN

    Keys: seed, budget (smoke, short, hours, full), run (the folder to write), resume, and anything under
    data., model., neuron. and train. that a recipe may set.
    """
    name, values = parse(words, "run", "resume")
    resume = values.pop("resume", None)
    if resume is not None:
        if name is not None or values:
            raise UsageError("resume=RUN continues a run with its own settings: give no recipe and no other key")
        run = open_run(str(resume))
        if run.summary() is not None:
            raise UsageError(f"{run.folder} is finished; evaluate it with 'spikeloom evaluate {run.folder}'")
    else:
        run = _new_run(name or "quickstart/digits", values)
    from spikeloom.train.loop import Interrupted
    from spikeloom.train.loop import train as train_run

    with show_progress(as_json) as progress, stop_on_signal() as stop:
        try:
            summary = train_run(run, progress, stop)
        except Interrupted:
            print(f"stopped; continue with: spikeloom train resume={run.folder}", file=sys.stderr)
            raise typer.Exit(130) from None
    if not summary:
        return  # not the main process
    if as_json:
        print(json.dumps({"run": str(run.folder), **summary}), flush=True)
        _report_of_training(run, as_json)
        return
    classifies = summary["test_accuracy"] is not None
    found = f"accuracy {summary['test_accuracy']:.2f} %" if classifies else f"loss {summary['test_loss']:.4f}"
    best = f"best {summary['best_test_accuracy']:.2f} %" if classifies else "best loss"
    print(f"\n{run.title} ({run.budget}): test {found} on {summary['data']['test']}")
    print(f"  {best} at epoch {summary['best_epoch']} of {summary['epochs']}; "
          f"{summary['parameters']:,} parameters; {summary['seconds']:.0f} s")  # fmt: skip
    print(f"  run:   {run.folder}")
    if classifies:
        print(f"  next:  spikeloom evaluate {run.folder}")
    else:
        print(f"  drawn: {run.folder / 'pictures.png'}")
        print(f"  next:  another recipe with train.start_from={run.folder}")
    print(f"         tensorboard --logdir {run.folder / 'tensorboard'}", flush=True)
    _report_of_training(run, as_json)


def _report_of_training(run: Run, as_json: bool) -> None:
    """The last thing of `train`: whatever happens to it, the run is finished and its numbers are printed."""
    from spikeloom.analyse.report import write_report

    with show_progress(as_json) as progress:
        try:
            page, problems = write_report([run.folder], {}, progress)
        except Exception as error:
            progress.warn(
                f"the run is complete, but not its report: {type(error).__name__}: {' '.join(str(error).split())}; "
                f"make it with: spikeloom report {shlex.quote(str(run.folder))}"
            )
            return
        for problem in problems:
            progress.warn(problem)
    if not as_json:
        print(f"  report: {page}")


def _new_run(name: str, values: Json) -> Run:
    import datetime

    from spikeloom.train.recipe import load_recipe
    from spikeloom.train.run import Run

    recipe_name, _, row = name.partition("#")
    recipe = load_recipe(recipe_name)
    if not row:
        if len(recipe.rows) > 1:
            raise UsageError(
                f"{recipe_name} has several rows: name one, as in '{recipe_name}#{next(iter(recipe.rows))}' "
                f"({', '.join(recipe.rows)}), or use 'spikeloom reproduce {recipe_name}'"
            )
        row = next(iter(recipe.rows))
    budget = read_budget(values) or recipe.budget
    folder = values.pop("run", None)
    settings = recipe.resolve(row, budget, values)
    if folder is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        stem = "-".join([*recipe.name.removesuffix(".toml").split("/"), *([] if row == "main" else [row]), stamp])
        folder = f"runs/{stem}"
    return Run.plan(Path(_agree(str(folder))), recipe.name, row, budget, settings)


def _agree(folder: str) -> str:
    """The main process's folder: the clocks of several need not agree."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return folder
    from accelerate.utils import broadcast_object_list

    from spikeloom.train.build import make_accelerator

    make_accelerator("fp32")
    shared: list[Any] = [folder]
    broadcast_object_list(shared)
    return str(shared[0])
