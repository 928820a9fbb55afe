"""Writes docs/models.md from the registry, the recipes, results/ and the weights of the package.

python docs/_ext/model_table.py
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spikeloom.analyse import Cost, count_cost
from spikeloom.models import MODELS, list_weights
from spikeloom.models.trained_weights import weights_folder
from spikeloom.registry import list_recipes
from spikeloom.train.build import make_model
from spikeloom.train.recipe import Recipe, load_recipe

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "results"
PAGE = DOCS / "models.md"
HEAD = "model", "data", "parameters, M", "operations, M", "published, %", "measured, %", "weights", "recipe", "input"
COUNTED = "parameters, M", "operations, M", "input"
# Of each data set: the shape of an image or of one step, and the number of classes.
INPUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "arrays": ((3, 32, 32), 10),
    "audio": ((700,), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "cifar10_dvs": ((2, 128, 128), 10),
    "colored_mnist": ((3, 28, 28), 1),
    "digits": ((1, 8, 8), 10),
    "dvs_gesture": ((2, 128, 128), 11),
    "folder": ((3, 32, 32), 10),
    "fsdd": ((700,), 10),
    "imagenet": ((3, 224, 224), 1000),
    "mnist": ((1, 28, 28), 10),
    "n_caltech101": ((2, 180, 240), 101),
    "n_tidigits": ((64,), 11),
    "nmnist": ((2, 34, 34), 10),
    "recordings": ((2, 128, 128), 10),
    "sequential_cifar10": ((3, 32), 10),
    "sequential_cifar100": ((3, 32), 100),
    "sequential_mnist": ((1, 28), 10),
    "shd": ((700,), 20),
}
INTRODUCTION = """\
# Table of models

Every network that `spikeloom.create_model` builds, by paper, on each data set that a recipe trains it on.
`python docs/_ext/model_table.py` writes this page.

- *Parameters* and *operations* are those of the recipe's row, for the input in the last column. Operations are
  multiply-accumulates of convolutions and linear layers for one image and one time step, with every input counted.
  `spikeloom audit NAME` counts spikes.
- *Published* is the highest accuracy that a recipe quotes for this network on these data, and *recipe* is its row.
- *Measured* is the highest accuracy in `results/` for this network on these data, with its budget, of the same recipe
  row unless another one is named. Most were trained far shorter than published: [Scores](scores.md) has both side by
  side, row by row.
- Where a network was trained with other options than its row's, such as another size, they stand behind the accuracy.
- *Weights* come with the package: `create_model(NAME, weights=TASK)`, and `weights:TASK` on the command line.

`spikeloom train RECIPE` trains a row. Where a cell is empty, there is nothing: no published accuracy, no result, no
weights.
"""


@dataclass
class Line:
    """A network on a data set: its recipe rows, with the accuracies that they publish, and what was measured."""

    model: str
    data: str
    rows: list[tuple[Recipe, str, float | None]] = field(default_factory=list)
    measured: list[tuple[float, str, str]] = field(default_factory=list)

    def best(self) -> tuple[Recipe, str, float | None]:
        """The row with the highest published accuracy; the first one if there is none."""
        return max(self.rows, key=lambda row: row[2] or 0.0)


def lines() -> list[Line]:
    """A line for each network and data set that a recipe brings together, in the order of the registry."""
    found: dict[tuple[str, str], Line] = {}
    for name in list_recipes():
        recipe = load_recipe(name)
        if recipe.measures:
            continue
        for row, entry in recipe.rows.items():
            settings = recipe.resolve(row, "full")
            key = (settings.model.name, settings.data.name)
            published = next(
                (v for k in ("acc", "acc_test") if isinstance(v := entry.published.get(k), int | float)), None
            )
            found.setdefault(key, Line(*key)).rows.append((recipe, row, published))
    for path in sorted(RESULTS.rglob("*.json")):
        record: Any = json.loads(path.read_text())
        measured = record.get("measured", {}) if isinstance(record, dict) else {}
        accuracy = measured.get("acc", measured.get("acc_test"))
        if accuracy is not None and record.get("budget") != "smoke" and "settings" in record:
            if record["settings"]["data"].get("grayscale"):  # Colored MNIST without its colour is another task
                continue
            key = (record["settings"]["model"]["name"], record["settings"]["data"]["name"])
            if key in found:
                budget = record["budget"] + _resized(found[key], record)
                found[key].measured.append((float(accuracy), f"{record['table']}#{record['row']}", budget))
    order = list(MODELS)
    alone = [Line(model, "") for model in order if model not in {line.model for line in found.values()}]
    return sorted([*found.values(), *alone], key=lambda line: (order.index(line.model), line.data))


def _resized(line: Line, record: Any) -> str:
    """How a network that was trained differs from that of the line's recipe row, whose parameters are counted."""
    recipe, row, _ = line.best()
    there = recipe.resolve(row, "full").model.options
    other = {k: v for k, v in record["settings"]["model"].items() if k not in ("name", "T") and there.get(k) != v}
    return "".join(f", `model.{key}={str(value).lower()}`" for key, value in other.items())


def shape_of(data: Any) -> tuple[int, ...]:
    """The input of a network under a row's data settings."""
    shape, options = INPUTS[data.name][0], data.options
    if options.get("polarity") is not None:
        shape = (1, *shape[1:])
    if "size" in options:
        shape = (shape[0], options["size"], options["size"])
    if "downsample" in options:
        shape = (shape[0], *(int(side / options["downsample"]) for side in shape[1:]))
    if options.get("flatten"):
        shape = (shape[0] * shape[1] * shape[2],)
    return shape


def count(line: Line) -> tuple[tuple[int, ...], Cost]:
    """The input of a network and what it costs; without memory for its weights."""
    shape, steps = (3, 224, 224), None
    if line.rows:
        recipe, row, _ = line.best()
        settings = recipe.resolve(row, "full")
        shape = shape_of(settings.data)
        steps = shape[-1] if line.data.startswith("sequential") else settings.data.options.get("T")
    with torch.device("meta"):
        model = make_model(settings, shape[0], INPUTS[line.data][1]) if line.rows else MODELS[line.model]()
        if line.model == "masked_autoencoder":  # which tokens it computes depends on what is hidden
            return shape, Cost(sum(p.numel() for p in model.parameters()), 0, 0)
        return shape, count_cost(model, shape, int(steps or getattr(model, "T", None) or 4))


def _millions(number: int) -> str:
    """Three digits, without an exponent."""
    millions = number / 1e6
    return "" if not number else f"{millions:,.0f}" if millions >= 100 else f"{millions:.3g}"


def _weights(line: Line) -> str:
    tasks = [name.split("/")[1] for name in list_weights(f"{line.model}/*")]
    found: list[str] = []
    for task in tasks:
        folder = weights_folder(f"{line.model}/{task}")
        run = json.loads((folder / "settings.json").read_text())
        accuracy = json.loads((folder / "summary.json").read_text())["test_accuracy"]
        if run["settings"]["data"]["name"] == line.data:
            found.append(f"`{task}`, {accuracy:.2f} %{_resized(line, run)}")
    return ", ".join(found)


def cells(line: Line) -> dict[str, str]:
    """What stands in a line of the table without running the network."""
    found = dict.fromkeys(HEAD, "")
    found |= {"model": f"`{line.model}`", "data": line.data and f"`{line.data}`", "weights": _weights(line)}
    if line.rows:
        recipe, row, published = line.best()
        found["published, %"] = "" if published is None else f"{published:g}"
        found["recipe"] = f"`{recipe.name}#{row}`"
        if line.measured:
            accuracy, where, budget = max(line.measured)
            found["measured, %"] = f"{accuracy:.2f}, {budget}"
            if where != f"{recipe.name}#{row}":
                found["recipe"] += f"; measured: `{where}`"
    return found


def counted(line: Line) -> dict[str, str]:
    """What stands in a line after running the network."""
    shape, cost = count(line)
    found = _millions(cost.parameters), _millions(cost.macs), "x".join(map(str, shape))
    return dict(zip(COUNTED, found, strict=True))


def _title(model: str) -> tuple[str, str]:
    """The paper's module, and the first sentence of its docstring."""
    module = inspect.getmodule(MODELS[model])
    assert module is not None
    return module.__name__, " ".join((module.__doc__ or "").split("\n\n")[0].split())


def as_markdown(counts: Mapping[tuple[str, str], Mapping[str, str]]) -> str:
    """The page, with the columns that cost time given by (model, data)."""
    text, before = [INTRODUCTION], ""
    for line in lines():
        module, title = _title(line.model)
        if module != before:
            before = module
            name = module.removeprefix("spikeloom.models.")
            text += ["", f"## {name}", "", f"{title} Source: [`{name}`](reference/models.md#{name}).", ""]
            text += [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
        row = cells(line) | counts[line.model, line.data]
        text.append(f"| {' | '.join(row[name] for name in HEAD)} |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)) + "\n"


def read_counts(page: str) -> Iterator[tuple[tuple[str, str], dict[str, str]]]:
    """The columns that cost time, as a page has them."""
    for row in re.findall(r"^\| `.*\|$", page, re.MULTILINE):
        found = dict(zip(HEAD, (cell.strip() for cell in row[1:-1].split("|")), strict=True))
        yield (found["model"].strip("`"), found["data"].strip("`")), {name: found[name] for name in COUNTED}


if __name__ == "__main__":
    PAGE.write_text(as_markdown({(line.model, line.data): counted(line) for line in lines()}))
