"""`spikeloom predict`: what a trained network says of a user's own files."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, RunFolder
from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.predict import Prediction


def predict(
    run: RunFolder,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Pictures, event recordings or sound, or folders of them.")
    ],
    top: Annotated[int | None, typer.Option("--top", min=1, metavar="N", help="How many classes to name: 3.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a table with commas, a line a file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a trained network takes files for, with the spikes, the energy and the time that each needs.

    \b
    spikeloom predict weights:cifar10_net/cifar10 cat.jpg
    spikeloom predict weights:colored_mnist_net/nmnist recordings/ --csv
    spikeloom predict RUN seven.wav --json

    A picture is cut to the square in its middle and resized to the side of the network's data. Sound is WAV of 8 kHz,
    one channel. Recordings are of any format in docs/events.md.
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json are two ways to print: leave one of them out")
    if as_csv and top is not None:
        raise UsageError("--csv has one class a file: leave out --top, or take --json")
    from spikeloom.predict import predict as answer

    found = answer(run, files, top or 3)
    if as_json:
        print(json.dumps([_plain(each) for each in found]))
    elif as_csv:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["file", "label", "class", "probability", "spikes", "energy_uJ", "ms"])
        for each in found:
            table.writerow(
                [
                    each.file,
                    each.label,
                    each.name,
                    f"{each.probability:.4f}",
                    each.spikes,
                    f"{each.energy_uJ:.4g}",
                    f"{each.ms:.4g}",
                ]
            )
    else:
        for each in found:
            _print(each)


def _plain(found: Prediction) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"top": [{"class": name, "probability": p} for name, p in found.top]}


def _print(found: Prediction) -> None:
    print(f"{found.file}: {found.name}")
    print("  " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in found.top))
    print(f"  {found.spikes:,} spikes, {found.energy_uJ:.3g} uJ, {found.ms:.3g} ms by the {found.by}")
