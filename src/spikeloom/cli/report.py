"""`spikeloom report`: one HTML page about a run, or several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson, check_output, own_folder, read_settings
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError


def report(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="RUN|KEY=VALUE", help="Folders or weights:NAME, and settings.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="PATH", help="The file to write.")] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, metavar="N", help="Measure anew, on so many test images.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run, or several side by side: curves, confusion, audit, spikes, how to repeat it.

    \b
    spikeloom report RUN                              # RUN/report.html, which training has written already
    spikeloom report RUN OTHER                        # RUN/compared.html
    spikeloom report RUN --images 500 data.root=DATA  # measure it anew on these images
    spikeloom report weights:cifar10 data.root=DATA   # a network of the package, copied to runs/

    Keys: data.*. The page needs no network.
    """
    from spikeloom.analyse.report.render import write_report

    names = [word for word in words if "=" not in word or Path(word).is_dir()]
    values = read_settings(context, [word for word in words if word not in names], ("data",))
    folders = [own_folder(name) for name in names]
    if images is not None:
        values["images"] = images
    if not folders:
        raise UsageError("name the folder of a run, for example 'spikeloom report runs/RUN'")
    check_output(out)
    with show_progress() as progress:
        page, problems = write_report(folders, values, progress, out)
        for problem in problems:
            progress.warn(problem)
    print(json.dumps({"report": str(page), "problems": problems}) if as_json else f"report: {page}")
