"""`spikeloom export`: a network as a file of another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson, Input, Settings, TargetName, check_output, read_target
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError


def export(
    context: typer.Context,
    target: TargetName,
    to: Annotated[
        str,
        typer.Option("--to", metavar="nir|onnx", help="The format.", autocompletion=lambda: ["nir", "onnx"]),
    ],
    words: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="The file to write.")] = None,
    steps: Annotated[int | None, typer.Option("--T", metavar="N", help="Steps; by default the network's own.")] = None,
    shape: Input = None,
    as_json: AsJson = False,
) -> None:
    """Write a network for other tools: ONNX with its T steps unrolled, or a NIR graph of one step.

    \b
    spikeloom export RUN --to onnx                          # RUN/model.onnx
    spikeloom export report_ms_resnet34 --to nir --out net.nir --input 3x32x32
    spikeloom export RUN --to onnx --T 4 data.root=DATA

    The shape of an input is that of the data, as `audit` finds them. What a format cannot express is an error that
    names the layer. Keys: data.*; for a model also model.*, neuron.* and seed.
    """
    from spikeloom.analyse.target import open_target
    from spikeloom.deploy.export import export_file
    from spikeloom.registry import nearest

    if to not in ("nir", "onnx"):
        raise UsageError(f"unknown format {to!r}; {nearest(to, ('nir', 'onnx'))}")
    values = read_target(context, words, 1, None, shape)
    path = out or (Path(target) / f"model.{to}" if Path(target).is_dir() else Path(f"{target}.{to}"))
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
    print(f"{opened.title}: {to.upper()}, {opset}{written['nodes']} nodes, T = {written['T']}, "
          f"{written['bytes'] / 1e6:.2f} MB")  # fmt: skip
    print(f"  written: {path}")
