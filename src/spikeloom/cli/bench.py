"""`spikeloom bench`: time and memory on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, read_settings
from spikeloom.cli.tables import print_drawn, print_names
from spikeloom.errors import UsageError
from spikeloom.registry import nearest

BENCHMARKS = {
    "neurons": "time and memory of every neuron, against the bytes that must move and SpikingJelly: minutes",
    "methods": "a training step by BPTT and SLTT over T, of another network with --model NAME",
    "events": "reading event files and cutting them into frames, beside tonic; files of your own with --data FOLDER",
    "audit": "what an audit costs over an inference of the same batches",
}


RESULTS = Path("results/bench")


def bench(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(metavar="|".join(BENCHMARKS), help="What to measure.", autocompletion=lambda: list(BENCHMARKS)),
    ] = None,
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: fewer sizes, no plot.")] = False,
    figures: Annotated[
        bool, typer.Option("--figures", help="Measure nothing: draw the recorded plots as HTML pages.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where the tables go: results/bench. Of --figures, the pages: figures/bench.",
        ),
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="FOLDER", help="Of --figures: where the tables are.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Of `methods`: the network.")] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="FOLDER", help="Of `events`: event files.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine. Without a name, list what can be measured.

    \b
    spikeloom bench neurons              # tables and the data of a plot go to results/bench
    spikeloom bench neurons --figures    # draws that plot
    spikeloom bench neurons --quick
    spikeloom bench methods --model spikformer_2_384
    spikeloom bench events --data DATA

    Install the extra `bench` to have the rivals in the same run.
    """
    read_settings(context, words, ())
    if what is None and not figures:
        if quick or out is not None or results is not None:
            raise UsageError(f"name what to measure: {', '.join(BENCHMARKS)}")
        print_names(BENCHMARKS, as_json)
        return
    if what is not None and what not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {what!r}; {nearest(what, BENCHMARKS)}")
    for option, value, owner in (("--model", model, "methods"), ("--data", data, "events")):
        if value is not None and what != owner:
            raise UsageError(f"{option} is an option of 'spikeloom bench {owner}', not of {what or 'all'}")
    if what is None or figures:
        if quick:
            raise UsageError("--figures draws what is recorded: leave out --quick")
        _draw_figures(what, model, results or RESULTS, out or Path("figures/bench"), as_json)
        return
    if results is not None:
        raise UsageError("--results is of --figures; tables go to --out")
    out = out or RESULTS
    tables, stem = _measure(what, quick, out, model or "report_sew_resnet34", data, as_json)
    print(json.dumps(tables) if as_json else f"written: {out / stem}.md")


def _draw_figures(what: str | None, model: str | None, results: Path, out: Path, as_json: bool) -> None:
    from spikeloom.analyse.plots import FOLDER, draw_figures

    stems = {"neurons": "psn_speed", "methods": f"methods-{model or '*'}"}
    if what is not None and what not in stems:
        raise UsageError(f"'spikeloom bench {what}' has no plot; those with one: {', '.join(stems)}")
    stem = stems[what] if what else "*"
    recorded = sorted((results / FOLDER).glob(f"{stem}.json"))
    if not recorded:
        command = f"spikeloom bench {what or 'neurons'}" + (f" --model {model}" if model else "")
        raise UsageError(f"no plot {stem} is recorded in {results / FOLDER}: '{command}' records one")
    print_drawn(draw_figures(recorded, out), as_json)


def _measure(
    what: str, quick: bool, out: Path, model: str, data: Path | None, as_json: bool
) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The tables of a benchmark, and the stem of the files that hold them; rows are printed as they are measured."""
    from spikeloom.bench.run import bench_audit, bench_events, bench_methods, bench_neurons
    from spikeloom.files import make_folder

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=sys.stderr if as_json else sys.stdout, flush=True)

    if what == "methods":
        from spikeloom.models import MODELS

        MODELS[model]  # or says which there are
    make_folder(out, "with --out")  # before minutes of work
    if what == "methods":
        return bench_methods(out, quick, tell, model), f"methods-{model}"
    if what == "events":
        return bench_events(out, quick, tell, data), what
    return (bench_audit if what == "audit" else bench_neurons)(out, quick, tell), what
