"""`spikeloom compare`: runs side by side."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from spikeloom.cli.arguments import AsJson, complete_weights
from spikeloom.cli.tables import print_comparison
from spikeloom.errors import UsageError

Json = dict[str, Any]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs, or weights:NAME.", autocompletion=complete_weights),
    ],
    as_json: AsJson = False,
) -> None:
    """Show the settings in which runs differ, and what came out.

    \b
    spikeloom compare runs/one runs/two
    spikeloom compare runs/sweep/quickstart/digits/*/
    """
    if len(runs) < 2:
        raise UsageError("name two runs or more, for example: spikeloom compare runs/one runs/two")
    from spikeloom.train.list_runs import compare_runs

    records = compare_runs(runs)
    if as_json:
        print(json.dumps(records))
    else:
        print_comparison([{key: _shown(key, value) for key, value in record.items()} for record in records])


def _shown(key: str, value: Any) -> Any:
    if key in ("accuracy", "validation") and value is not None:
        return f"{value:.2f}"
    return f"{value:.0f}" if key == "seconds" else value
