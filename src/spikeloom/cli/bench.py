"""`spikeloom bench`: time and memory on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson
from spikeloom.errors import UsageError


def bench(
    what: Annotated[str, typer.Argument(metavar="neurons|methods|events|audit", help="What to measure.")] = "neurons",
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="quick=true, out=PATH.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine: time and memory of every neuron, against the bytes that must move and SpikingJelly.

    \b
    spikeloom bench neurons              # minutes; tables and a plot go to results/bench
    spikeloom bench neurons quick=true   # seconds: T = 4 and 64, no plot
    spikeloom bench methods              # BPTT and SLTT over T; another network with model=NAME
    spikeloom bench events data=DATA     # reading event files and cutting them into frames, beside tonic
    spikeloom bench audit                # what an audit costs over an inference of the same batches

    Install the extra `bench` to have the rivals in the same run.
    """
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    own = {"neurons": (), "methods": ("model",), "events": ("data",), "audit": ()}
    if what not in own:
        raise UsageError(f"unknown benchmark {what!r}; {nearest(what, own)}")
    values = parse_overrides(words or [])
    known = ("quick", "out", *own[what])
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
    from spikeloom.bench.run import bench_audit, bench_events, bench_methods, bench_neurons

    quick = values.get("quick", False)
    if not isinstance(quick, bool):
        raise UsageError(f"quick must be true or false, got {quick!r}")
    folder = Path(str(values.get("out", "results/bench")))
    tell = None if as_json else lambda row: print(json.dumps(row), flush=True)
    stem = what
    if what == "methods":
        model = str(values.get("model", "report_sew_resnet34"))
        tables, stem = bench_methods(folder, quick, tell, model), f"methods-{model}"
    elif what == "events":
        tables = bench_events(folder, quick, tell, Path(str(values["data"])) if "data" in values else None)
    elif what == "audit":
        tables = bench_audit(folder, quick, tell)
    else:
        tables = bench_neurons(folder, quick, tell)
    if as_json:
        print(json.dumps(tables))
    else:
        print(f"written: {folder / stem}.md")
