"""`spikeloom report`: one HTML page about a run, or several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson
from spikeloom.cli.progress import show_progress
from spikeloom.errors import UsageError


def report(
    words: Annotated[list[str], typer.Argument(metavar="RUN [RUN]... [KEY=VALUE]...", help="Folders and settings.")],
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a run, or several side by side: curves, confusion, audit, spikes, how to repeat it.

    \b
    spikeloom report RUN                            # RUN/report.html, which training has written already
    spikeloom report RUN OTHER                      # RUN/compared.html
    spikeloom report RUN images=500 data.root=DATA  # measure it anew on these images

    Keys: out (the file to write), images (of the test data), data.*. The page needs no network.
    """
    from spikeloom.analyse.report import write_report
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    folders = [Path(word) for word in words if "=" not in word or Path(word).is_dir()]
    values = parse_overrides([word for word in words if Path(word) not in folders])
    for key in values:
        if key not in ("out", "images", "data"):
            raise UsageError(f"unknown key {key!r}; {nearest(key, ('out', 'images', 'data'))}")
    if not folders:
        raise UsageError("name the folder of a run, for example 'spikeloom report runs/RUN'")
    out = values.pop("out", None)
    with show_progress(as_json) as progress:
        page, problems = write_report(folders, values, progress, None if out is None else Path(str(out)))
        for problem in problems:
            progress.warn(problem)
    print(json.dumps({"report": str(page), "problems": problems}) if as_json else f"report: {page}")
