"""`spikeloom evaluate`: the accuracy of a trained run, and the firing rate of every layer."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson, RunFolder, open_run, refuse_training_part
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError


def evaluate(
    run: RunFolder,
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="data.* settings.")] = None,
    flips: Annotated[
        bool, typer.Option("--flips", help="Also the accuracy of the mean over each image and its mirror image.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a trained run on its test data, with the firing rate of every layer.

    \b
    spikeloom evaluate RUN
    spikeloom evaluate RUN data.root=DATA --json
    """
    from spikeloom.train.recipe import check_settings, merge, parse_overrides

    opened = open_run(run)
    overrides = parse_overrides(words or [])
    for key in overrides:
        if key != "data":
            raise UsageError(f"evaluate takes data.* settings only, got {key!r}")
    refuse_training_part(overrides)
    settings = check_settings(merge(opened.settings.model_dump(), overrides), run)
    from spikeloom.train.evaluate import evaluate_run

    with show_progress() as progress:
        result = evaluate_run(opened, settings, progress, flips)
    if as_json:
        print(json.dumps(result))
        return
    accuracy = "" if result["test_accuracy"] is None else f"accuracy {result['test_accuracy']:.2f} %, "
    print(f"{opened.title}: {accuracy}loss {result['test_loss']:.4f} on {result['data']}")
    if flips:
        print(f"  with mirror images: accuracy {result['test_accuracy_flips']:.2f} %")
    print("  firing rate (spikes per neuron and step)")
    for layer, rate in result["rates"].items():
        print(f"  {100 * rate:6.2f} %  {layer}")
