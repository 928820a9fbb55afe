"""`spikeloom data check`: what is there of a data set, and what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, check_output, read_settings
from spikeloom.cli.tables import print_data_check
from spikeloom.errors import UsageError, cannot_write

if TYPE_CHECKING:
    from spikeloom.data.check import DataCheck

app = typer.Typer(help="Look at data sets: `spikeloom list datasets` names them.", rich_markup_mode=None)


def _complete_dataset(incomplete: str) -> list[str]:
    """What the tab key offers: the data sets."""
    from spikeloom.data import DATASETS

    return [name for name in DATASETS if name.startswith(incomplete)]


@app.command()
def check(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A data set, as in data.name.", autocompletion=_complete_dataset)
    ],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="data.root, and options of the data set.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the first training sample as a PNG picture."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is there of a data set, and what is missing.

    Names its files, counts the samples beside the published numbers, and loads some.

    \b
    spikeloom data check cifar10 data.root=DATA
    spikeloom data check dvs_gesture data.root=DATA --picture gesture.png
    spikeloom data check folder data.root=pets

    Samples are counted by names of files; three of each part are loaded. With --picture a recording is drawn as the sum
    of its frames, red where brightness fell and blue where it rose; sound as a raster of its spikes. The exit code is 0
    if both parts load and 2 if not.
    """
    from spikeloom.data.check import check_dataset
    from spikeloom.train.recipe import check_data

    values = read_settings(context, words, ("data",)).get("data", {})
    if not isinstance(values, dict) or "name" in values:
        raise UsageError(f"the data set is {name}: give its options as data.KEY=VALUE, without data.name")
    settings = check_data({**values, "name": name}, "data check")
    parts = {key: values[key] for key in ("test_subset", "validation") if key in values}
    check_output(picture)
    if picture is not None and picture.suffix.lower() != ".png":
        raise UsageError(f"--picture must end in .png, got {picture}")
    found = check_dataset(name, settings.root, **settings.options, **parts)
    if found.picture is not None and picture is not None:
        try:
            found.picture.save(picture, "PNG")
        except OSError as error:
            raise cannot_write(picture, error) from None
    if as_json:
        print(json.dumps(_plain(found, picture)))
    else:
        print_data_check(found, picture)
    if not found.usable:
        raise UsageError(next(iter(found.errors.values())))


def _plain(found: DataCheck, picture: Path | None) -> dict[str, Any]:
    return {
        "name": found.name,
        "title": found.title,
        "folder": None if found.folder is None else str(found.folder),
        "files": found.files,
        "published": found.published,
        "classes": found.classes,
        "parts": {split: dataclasses.asdict(part) for split, part in found.parts.items()},
        "usable": found.usable,
        "errors": found.errors,
        "picture": None if picture is None or found.picture is None else str(picture),
    }
