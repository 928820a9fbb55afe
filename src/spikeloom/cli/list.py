"""`spikeloom list`: what can be named."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from spikeloom.cli.arguments import AsJson
from spikeloom.cli.tables import print_names
from spikeloom.errors import UsageError
from spikeloom.registry import list_recipes, nearest

# The module and the registry of each kind, and where a name of it goes.
REGISTRIES = {
    "models": ("spikeloom.models", "MODELS", "networks: model.name="),
    "datasets": ("spikeloom.data", "DATASETS", "data sets: data.name="),
    "neurons": ("spikeloom.neurons", "NEURONS", "neurons: neuron.name="),
    "surrogates": ("spikeloom.surrogates", "SURROGATES", "surrogate gradients: neuron.surrogate="),
    "losses": ("spikeloom.train.losses", "LOSSES", "losses: train.loss="),
    "methods": ("spikeloom.train.methods", "METHODS", "training methods: train.method="),
    "penalties": ("spikeloom.train.environments", "PENALTIES", "penalties over environments: train.penalty.name="),
    "transforms": ("spikeloom.data", "TRANSFORMS", "augmentations: in train.augment"),
    "measurements": ("spikeloom.reproduce", "MEASUREMENTS", "what a recipe can measure: measure.name="),
}
RECIPES = "published tables, for train and reproduce"
KINDS = {
    "recipes": RECIPES,
    "runs": "folders of runs, with accuracy, time and state: --runs PATH",
    "weights": "trained networks that come with the package: weights:NAME",
    **{kind: line for kind, (_, _, line) in REGISTRIES.items()},
}


def list_(
    what: Annotated[
        str | None, typer.Argument(metavar="KIND", help=", ".join(KINDS), autocompletion=lambda: list(KINDS))
    ] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", metavar="PATH", help="Of the kind runs: where they are; runs without it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what can be named. Without a kind, list the kinds.

    \b
    spikeloom list models
    spikeloom list runs
    """
    if runs is not None and what != "runs":
        raise UsageError(f"--runs is of 'spikeloom list runs', not of {what or 'the kinds'}")
    print_names(KINDS if what is None else _entries(what, runs or Path("runs")), as_json)


def _entries(kind: str, runs: Path) -> dict[str, str]:
    """A line about each thing of a kind, by its name."""
    if kind not in KINDS:
        raise UsageError(f"unknown list {kind!r}; {nearest(kind, KINDS)}")
    if kind == "recipes":
        from spikeloom.train.recipe import load_recipe

        return {name: load_recipe(name).title for name in list_recipes()}
    if kind == "runs":
        from spikeloom.train.list_runs import describe_run, find_runs

        return {str(folder): describe_run(folder) for folder in find_runs(runs)}
    if kind == "weights":
        from spikeloom.models.trained_weights import describe_weights, list_weights

        return {name: describe_weights(name) for name in list_weights()}
    module, name, _ = REGISTRIES[kind]
    registry = getattr(importlib.import_module(module), name)
    return {name: (registry[name].__doc__ or "").strip().split("\n")[0] for name in registry}
