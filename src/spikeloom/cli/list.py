"""`spikeloom list`: what can be named."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson
from spikeloom.errors import UsageError


def list_(
    what: Annotated[str, typer.Argument(metavar="models|recipes|datasets|neurons")],
    as_json: AsJson = False,
) -> None:
    """List what can be named: models, recipes, datasets, neurons."""
    entries = _entries(what)
    if as_json:
        print(json.dumps(entries))
        return
    width = max(map(len, entries), default=0)
    for name, line in entries.items():
        print(f"{name:{width}}  {line}")


def _entries(what: str) -> dict[str, str]:
    from spikeloom.registry import nearest

    kinds = ("models", "recipes", "datasets", "neurons")
    if what == "recipes":
        from spikeloom.train.recipe import list_recipes, load_recipe

        return {name: load_recipe(name).title for name in list_recipes()}
    if what == "models":
        from spikeloom.models import MODELS as registry
    elif what == "neurons":
        from spikeloom.neurons import NEURONS as registry
    elif what == "datasets":
        from spikeloom.data import DATASETS as registry
    else:
        raise UsageError(f"unknown list {what!r}; {nearest(what, kinds)}")
    return {name: (registry[name].__doc__ or "").strip().split("\n")[0] for name in registry}
