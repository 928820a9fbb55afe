"""`spikeloom train`: trains a row of a recipe, or continues a run."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, Json, Words, open_run, read_budget, read_recipe
from spikeloom.cli.progress import is_main_process, show_progress, stop_on_signal
from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.train.run import Run


def train(
    context: typer.Context,
    words: Words = None,
    folder: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="The run's folder.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Continue this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe (without one: quickstart/digits), or continue a run.

    \b
    spikeloom train
    spikeloom train quickstart/mnist data.root=DATA
    spikeloom train report/table2#s0t2b budget=smoke data.root=DATA train.precision=bf16
    spikeloom train --resume RUN
    spikeloom train --resume RUN train.lr=0.01      # from its last checkpoint on

    Keys: seed, budget (smoke, short, hours, full), and anything under data., model., neuron. and train. that a recipe
    may set.
    """
    name, values = read_recipe(context, words)
    if resume is None:
        run = _new_run(name or "quickstart/digits", values, folder)
    else:
        run = _continued(resume, name, values, folder)
    from spikeloom.train.loop import Interrupted
    from spikeloom.train.loop import train as train_run

    with show_progress() as progress, stop_on_signal() as stop:
        try:
            summary = train_run(run, progress, stop)
        except Interrupted:
            if is_main_process():
                print(f"stopped; continue with: spikeloom train --resume {_quoted(run.folder)}", file=sys.stderr)
            raise typer.Exit(130) from None
        except RuntimeError as error:
            if not _lost_another(error):
                raise
            print(
                "spikeloom: error: another process of this run ended, or its machine cannot be reached: continue from "
                f"the last checkpoint with: spikeloom train --resume {_quoted(run.folder)}",
                file=sys.stderr,
            )
            raise typer.Exit(1) from None
    if not summary:
        return  # not the main process
    if as_json:
        print(json.dumps({"run": str(run.folder), **summary}), flush=True)
    else:
        _print_summary(run, summary)
    _write_report(run, as_json)


def _continued(folder: Path, name: str | None, values: Json, other: Path | None) -> Run:
    """A run that has epochs before it, with settings that may change from its last checkpoint on."""
    if name is not None or other is not None or "budget" in values:
        raise UsageError("--resume RUN continues a run in its folder: give no recipe, no budget and no --out")
    run = open_run(folder)
    changed, summary = run.changed(values), run.summary()
    # What it trained counts, not what it was asked for: a first try may have failed after it wrote that down.
    if summary is None or (values and run.checkpoint.is_file() and changed.settings.train.epochs > summary["epochs"]):
        return changed
    more = f"give it more epochs, such as train.epochs={2 * summary['epochs']}, or " if run.checkpoint.is_file() else ""
    raise UsageError(f"{folder} is finished: {more}evaluate it with: spikeloom evaluate {_quoted(folder)}")


def _new_run(name: str, values: Json, folder: Path | None) -> Run:
    import datetime

    from spikeloom.train.recipe import load_row
    from spikeloom.train.run import Run

    recipe, row = load_row(name, f"or use: spikeloom reproduce {_quoted(name)}")
    budget = read_budget(values) or recipe.budget
    settings = recipe.resolve(row, budget, values)
    if folder is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs", "-".join([*recipe.short_name.split("/"), *([] if row == "main" else [row]), stamp]))
    return Run.plan(Path(_agree(str(folder))), recipe.name, row, budget, settings, values)


def _lost_another(error: RuntimeError) -> bool:
    """Whether an error is that of a connection to another process of the run."""
    from torch.distributed import DistError

    return _processes() > 1 and (isinstance(error, DistError) or "gloo" in str(error))


def _processes() -> int:
    """How many a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _agree(folder: str) -> str:
    """The main process's folder: the clocks of several need not agree."""
    if _processes() == 1:
        return folder
    from accelerate.utils import broadcast_object_list

    from spikeloom.train.build import make_accelerator

    make_accelerator("fp32")
    shared: list[Any] = [folder]
    broadcast_object_list(shared)
    return str(shared[0])


def _print_summary(run: Run, summary: Json) -> None:
    classifies = summary["test_accuracy"] is not None
    found = f"accuracy {summary['test_accuracy']:.2f} %" if classifies else f"loss {summary['test_loss']:.4f}"
    print(f"\n{run.title} ({run.budget}): test {found} on {summary['data']['test']}, {summary['rule']}")
    best = f"{summary['best_test_accuracy']:.2f} %" if classifies else "the lowest loss"
    print(
        f"  on test data {best} was best, at epoch {summary['best_epoch']} of {summary['epochs']}; "
        f"{summary['parameters']:,} parameters; {summary['seconds']:.0f} s"
    )
    for change in run.changes_in_words():
        print(f"  changed {change}")
    print(f"  run:   {run.folder}")
    if classifies:
        print(f"  next:  spikeloom evaluate {_quoted(run.folder)}")
    else:
        print(f"  drawn: {run.folder / 'pictures.png'}")
        print(f"  next:  another recipe with {_quoted(f'train.start_from={run.folder}')}")
    if run.settings.train.tracker == "tensorboard":
        print(f"         tensorboard --logdir {_quoted(run.folder / 'tensorboard')}", flush=True)


def _write_report(run: Run, as_json: bool) -> None:
    """The last thing of `train`: whatever happens to it, the run is finished and its numbers are printed."""
    from spikeloom.analyse.report.render import write_report

    with show_progress() as progress:
        try:
            page, problems = write_report([run.folder], {}, progress)
        except Exception as error:
            progress.warn(
                f"the run is complete, but not its report: {type(error).__name__}: {' '.join(str(error).split())}; "
                f"make it with: spikeloom report {_quoted(run.folder)}"
            )
            return
        for problem in problems:
            progress.warn(problem)
    if not as_json:
        print(f"  report: {page}")


def _quoted(value: Path | str) -> str:
    return shlex.quote(str(value))
