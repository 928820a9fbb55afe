"""`spikeloom export`: a network as a file of another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import (
    AsJson,
    Input,
    Settings,
    TargetName,
    check_output,
    open_run,
    read_settings,
    read_target,
)
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError

FORMATS = ("nir", "onnx", "weights")


def export(
    context: typer.Context,
    target: TargetName,
    to: Annotated[
        str,
        typer.Option("--to", metavar="nir|onnx|weights", help="The format.", autocompletion=lambda: list(FORMATS)),
    ],
    words: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="The file to write.")] = None,
    steps: Annotated[int | None, typer.Option("--T", metavar="N", help="Steps; by default the network's own.")] = None,
    shape: Input = None,
    stored: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="float16|int8",
            help="Of --to weights: how they are stored; float16 without it.",
            autocompletion=lambda: ["float16", "int8"],
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a network for other tools: ONNX with its T steps unrolled, a NIR graph of one step, or its weights.

    \b
    spikeloom export RUN --to onnx                          # RUN/model.onnx
    spikeloom export report_ms_resnet34 --to nir --out net.nir --input 3x32x32
    spikeloom export RUN --to onnx --T 4 data.root=DATA
    spikeloom export RUN --to weights --out FOLDER data.root=DATA
    spikeloom export RUN --to weights --weights int8 --out FOLDER data.root=DATA

    The shape of an input is that of the data, as `audit` finds them. What a format cannot express is an error that
    names the layer. Weights are a folder to share: tensors, settings, and a card of what was measured. Keys:
    data.*; for a model also model.*, neuron.* and seed.
    """
    from spikeloom.analyse.load import open_target
    from spikeloom.deploy.exchange.export import export_file
    from spikeloom.registry import nearest

    if to not in FORMATS:
        raise UsageError(f"unknown format {to!r}; {nearest(to, FORMATS)}")
    if to == "weights":
        if steps is not None or shape is not None:
            raise UsageError("--T and --input are not for --to weights, which writes a trained network as it is")
        _export_weights(context, target, words, out, stored or "float16", as_json)
        return
    if stored is not None:
        raise UsageError("--weights is for --to weights alone")
    values = read_target(context, words, 1, None, shape)
    name = target.removeprefix("weights:").replace("/", "-") if target.startswith("weights:") else target
    path = out or (Path(target) / f"model.{to}" if Path(target).is_dir() else Path(f"{name}.{to}"))
    check_output(path)
    opened = open_target(target, values)
    with show_progress() as progress:
        progress.work(f"writing {to.upper()}", 1)
        written = export_file(opened.model, next(opened.batches())[0], opened.sequence, to, path, steps)
        progress.advance(1)
    if as_json:
        print(json.dumps({"target": opened.title, **written}))
        return
    opset = f"opset {written['opset']}, " if to == "onnx" else ""
    print(
        f"{opened.title}: {to.upper()}, {opset}{written['nodes']} nodes, T = {written['T']}, "
        f"{written['bytes'] / 1e6:.2f} MB"
    )
    print(f"  written: {path}")


def _export_weights(
    context: typer.Context, run: str, words: list[str] | None, out: Path | None, stored: str, as_json: bool
) -> None:
    from spikeloom.cards import write_weights
    from spikeloom.train.recipe import check_settings, merge

    if out is None:
        raise UsageError("--to weights needs a folder to write: --out FOLDER")
    opened = open_run(run)
    values = read_settings(context, words, ("data",))
    settings = check_settings(merge(opened.settings.model_dump(), values), run)
    with show_progress() as progress:
        written = write_weights(opened, settings, out, progress, stored)
    if as_json:
        print(json.dumps(written))
        return
    print(f"{opened.title}: accuracy {written['test_accuracy']:.2f} %, {written['bytes'] / 1e6:.2f} MB")
    print(f"  written: {out}")
