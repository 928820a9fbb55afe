"""`spikeloom show`: one input through a trained network, step by step, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson, RunFolder, check_output, own_folder, read_settings
from spikeloom.errors import UsageError


def show(
    context: typer.Context,
    run: RunFolder,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|KEY=VALUE", help="A picture, an event recording or sound; or settings."),
    ] = None,
    index: Annotated[
        int | None, typer.Option("--index", min=0, metavar="N", help="Without a file: which test sample, from 0.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="NAME", help="Only this layer of neurons. May be given again."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="The file to write: show.html in the run's folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page that plays the spikes of every layer on one input, with potentials and the decision over time.

    \b
    spikeloom show RUN                                # the first test sample
    spikeloom show RUN --index 7 data.root=DATA
    spikeloom show weights:cifar10 cat.jpg --out cat.html

    Keys: data.* of the test data. A file is as `spikeloom predict` takes it. The page needs no network.
    """
    from spikeloom.show import show as write_page

    words = words or []
    files = [word for word in words if "=" not in word or Path(word).exists()]
    values = read_settings(context, [word for word in words if word not in files], ("data",))
    if len(files) > 1:
        raise UsageError(f"show takes one file, got {len(files)}: {', '.join(files)}")
    if files and (index is not None or values):
        given = "data.*" if index is None else "--index"
        raise UsageError(f"{given} is of the test data, and {files[0]} is a file: leave one of them out")
    check_output(out)
    page = out or own_folder(run) / "show.html"
    found = write_page(run, page, *files[:1], index=index or 0, layers=layers or [], data=values.get("data"))
    decision = found.decision
    if as_json:
        steps = [dict(zip(decision.classes, row, strict=True)) for row in decision.probabilities]
        print(
            json.dumps(
                {
                    "page": str(found.page),
                    "input": found.source,
                    "class": decision.leaders[-1],
                    "probability": max(decision.probabilities[-1]),
                    "true_class": decision.truth,
                    "leaders": decision.leaders,
                    "probabilities": steps,
                    "rates": found.rates,
                    "left_out": found.left_out,
                }
            )
        )
        return
    print(f"{found.source}: {decision.leaders[-1]}, {100 * max(decision.probabilities[-1]):.1f} %")
    print(f"page: {found.page}")
