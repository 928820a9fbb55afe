"""`spikeloom run`: a trained network by its spikes, beside the network itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spikeloom.cli.arguments import (
    AsJson,
    Batch,
    Images,
    Input,
    Json,
    Settings,
    TargetName,
    check_output,
    read_target,
    running,
)
from spikeloom.cli.play import Events, Last, Out, WindowMs, check_options, play_recording
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.deploy import Engine

Portable = Annotated[
    bool, typer.Option("--portable", help="No layer by PyTorch's kernels: spikeloom.runtime gives the same bits.")
]
WEIGHTS = ("fp32", "bf16", "int8", "exact")


def run(
    context: typer.Context,
    target: TargetName,
    words: Settings = None,
    images: Images = None,
    batch: Batch = None,
    shape: Input = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="PATH", help="Write the engine to a file.")] = None,
    file: Annotated[Path | None, typer.Option("--engine", metavar="PATH", help="Take the engine from a file.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="|".join(WEIGHTS),
            help="bf16: half the file; int8: a quarter, and faster; exact: rounded until no sum of spikes rounds.",
            autocompletion=lambda: list(WEIGHTS),
        ),
    ] = "fp32",
    portable: Portable = False,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the network itself as well, or not.")
    ] = True,
    show_plan: Annotated[bool, typer.Option("--plan", help="Show every layer: how it runs, and why.")] = False,
    events: Events = None,
    window_ms: WindowMs = None,
    last: Last = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run a trained network by its spikes on the test data, beside the network itself.

    \b
    spikeloom run RUN --images 1000 data.root=DATA
    spikeloom run RUN --save engine.safetensors --plan
    spikeloom run RUN --engine engine.safetensors --no-compare
    spikeloom run RUN --events recording.bin --window-ms 10 --out played.html

    Keys: data.*; for a model also model.*, neuron.* and seed. With exact weights the engine says to the bit what
    PyTorch says. A recording is cut into windows of time, each of which is a step of the network.
    """
    check_options(context, events, words)
    if events is not None:
        play_recording(target, events, window_ms, last, file, out, as_json)
        return
    from spikeloom import deploy
    from spikeloom.analyse.load import open_target
    from spikeloom.deploy.engine.evaluate import evaluate_engine
    from spikeloom.files import fingerprint

    made = _checked(weights, portable, file)
    values = read_target(context, words, images, batch, shape)
    check_output(save)
    opened = open_target(target, values)
    with show_progress() as progress, running(opened):
        progress.work("running", opened.images)
        example = next(opened.batches())[0]
        model = opened.ready(example)
        source = fingerprint(model) if save or file else ""
        if weights == "exact":
            model = deploy.exact(model, example)
        if file is not None:
            engine = _loaded(file, source, target)
        else:
            stored, way = ("fp32", portable) if made == "exact" else (made, portable or None)
            engine = deploy.compile(model, example, weights=stored, portable=way)
        if save is not None:
            engine.source = source
            engine.save(str(save))
        found = evaluate_engine(engine, opened.batches(), model if compare else None, progress.advance)
    if not opened.labelled:
        found |= dict.fromkeys(name for name in ("accuracy", "model_accuracy") if name in found)
    if as_json:
        print(json.dumps({"target": opened.title, "data": opened.data, **found, "plan": engine.layers()}))
        return
    if show_plan:
        print(engine.plan())
    print(f"{opened.title} on {opened.data}")
    _print_found(found, "the network" if weights != "exact" else "in PyTorch ")
    if save is not None:
        print(f"  written: {save}")


def _checked(weights: str, portable: bool, file: Path | None) -> Literal["fp32", "bf16", "int8", "exact"]:
    """The weights; refuses unknown ones, and options that say how an engine is made where a file has answered that."""
    if weights not in WEIGHTS:
        raise UsageError(f"--weights must be fp32, bf16, int8 or exact, got {weights!r}")
    if file is None:
        return weights
    if weights in ("bf16", "int8"):
        raise UsageError(f"--weights {weights} says how an engine is made; --engine has its own: leave one of them out")
    if portable:
        raise UsageError("--portable says how an engine is made; --engine has its own ways: leave one of them out")
    return weights


def _loaded(file: Path, source: str, target: str) -> Engine:
    """The engine of a file, which must be of the network with the fingerprint `source`, if it says of which it is."""
    from spikeloom import deploy

    engine = deploy.load(file)
    if engine.source not in ("", source):
        raise UsageError(f"{file} was made of another network than {target}: make it again with --save")
    return engine


def _print_found(found: Json, model: str) -> None:
    """Prints accuracy, where the inputs have labels, and time of the engine and of the network called `model`."""
    for name, prefix in (("by events  ", ""), (model, "model_")):
        if f"{prefix}ms" in found:
            accuracy = found[f"{prefix}accuracy"]
            shown = "" if accuracy is None else f"accuracy {accuracy:6.2f} %   "
            print(f"  {name} {shown}{found[f'{prefix}ms']:8.3f} ms an image")
    if "same" in found:
        print(
            f"  the same prediction for {found['same']:.2f} % of images; mean logits within 1e-4 for "
            f"{found['close']:.2f} %, largest difference {found['difference']:.2g}"
        )
