"""What several commands take: settings, runs, and networks to measure."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.errors import UsageError

if TYPE_CHECKING:
    from spikeloom.analyse import Target
    from spikeloom.train.recipe import Budget
    from spikeloom.train.run import Run

Json = dict[str, Any]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE[#ROW]] [KEY=VALUE]...", help="A recipe, and settings to override."),
]


def parse(words: list[str] | None, *more: str) -> tuple[str | None, Json]:
    """The recipe, if the first word is one, and the settings, with `more` keys of the command's own."""
    from spikeloom.registry import nearest
    from spikeloom.train.recipe import parse_overrides

    words = list(words or [])
    name = words.pop(0) if words and "=" not in words[0] else None
    values = parse_overrides(words)
    known = ("seed", "budget", "data", "model", "neuron", "train", "measure", *more)
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
    return name, values


def read_budget(values: Json) -> Budget | None:
    from spikeloom.registry import nearest

    budget = values.pop("budget", None)
    if budget not in (None, *BUDGETS):
        raise UsageError(f"unknown budget {budget!r}; {nearest(str(budget), BUDGETS)}")
    return budget


def open_run(folder: str) -> Run:
    from spikeloom.train.run import Run

    return Run.open(Path(folder))


@contextlib.contextmanager
def running(opened: Target) -> Generator[None]:
    """What a network cannot take is the user's mistake: its data do not fit it."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{opened.title} cannot run on {opened.data}: {error}") from None
