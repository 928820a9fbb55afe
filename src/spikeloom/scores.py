"""The scoreboard: every published accuracy beside the best that was measured here, and what that says.

`spikeloom reproduce --scores` prints it, and writes it as Markdown or HTML.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spikeloom.errors import DataFileError
from spikeloom.registry import list_recipes
from spikeloom.train.recipe import BUDGETS, Recipe, Row, load_recipe

Json = dict[str, Any]
State = Literal["met", "close", "contradicts", "budget too small", "not run", "no data"]

STATES: dict[State, str] = {
    "met": "at least the published value, within two standard errors of the measurement",
    "close": "at most 2 points below it",
    "contradicts": "more than 2 points below it, with at least half of the published epochs on all images",
    "budget too small": "more than 2 points below it, with less training, or on part of the images",
    "not run": "no result, though the data are freely available or come with the package",
    "no data": "no result, and the data must be asked for or are large",
}
INTRODUCTION = (
    "Every published accuracy that a recipe stands for, and the best that was measured with this library, in percent.",
    "Written by `spikeloom reproduce --scores`; every measured number has its settings, seed, machine and time in "
    "`results/`.",
    "Accuracies are of the last epoch, never of the epoch that is best on the test part. A setting beside the budget "
    "is one that was changed by hand.",
)
ACCURACIES = ("acc", "acc_test")
CLOSE = 2.0  # points of accuracy
FAILS = 15.0  # percent, up to which a row of ten classes is published as one that does not learn
# What a search for a copy did not find, or what no desk trains on.
RARE = frozenset(
    {"imagenet", "cifar10_dvs", "dvs_gesture", "n_caltech101", "shd", "n_tidigits", "cifar100", "sequential_cifar100"}
)


@dataclass(frozen=True)
class Score:
    """One published accuracy.

    Attributes:
        table, row, system: where it is published.
        published: in percent.
        measured: mean over seeds, of the largest budget with a result; None without one.
        error: standard error of the mean, in points: of the test images, and of the seeds where there are several.
        budget, seeds: of the measurement.
        share: its part of the published training, as images seen.
        state: what the two say.
        note: what the row's published entry adds.
        changed: settings of the measurement that are not the recipe's of that budget, as `key=value`.
    """

    table: str
    row: str
    system: str
    published: float
    measured: float | None
    error: float
    budget: str
    seeds: int
    share: float
    state: State
    note: str = ""
    changed: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Measured minus published, in points."""
        return None if self.measured is None else self.measured - self.published


def scoreboard(results: str | os.PathLike[str]) -> list[Score]:
    """Every row of every recipe that publishes an accuracy, with what `results` holds of it.

    Args:
        results: as `spikeloom reproduce` writes it.

    Raises:
        DataFileError: a result that is not JSON.
    """
    scores: list[Score] = []
    for name in list_recipes():
        recipe = load_recipe(name)
        found = _results(Path(results) / name)
        for row, entry in recipe.rows.items():
            key = next((k for k in ACCURACIES if isinstance(entry.published.get(k), int | float)), None)
            if key is not None and not recipe.measures:
                scores.append(_score(recipe, row, entry, key, [r for r in found if r["row"] == row]))
    return scores


def _results(folder: Path) -> list[Json]:
    records: list[Json] = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(json.loads(path.read_text()))
        except ValueError as error:
            raise DataFileError(f"{path} is not valid JSON: {error}") from None
    return records


def _score(recipe: Recipe, row: str, entry: Row, key: str, records: list[Json]) -> Score:
    published = float(entry.published[key])
    note = str(entry.published.get("note", ""))
    usable = [r for r in records if r["measured"].get(key) is not None]
    if not usable:
        data = recipe.resolve(row, "full").data.name
        state: State = "no data" if data in RARE else "not run"
        return Score(recipe.name, row, entry.system, published, None, 0.0, "", 0, 0.0, state, note)
    budget = max((r["budget"] for r in usable), key=BUDGETS.index)
    best = [r for r in usable if r["budget"] == budget]
    values = [float(r["measured"][key]) for r in best]
    measured = sum(values) / len(values)
    error = _error(values, _test_images(best[0]))
    share = _images_seen(best[0]["settings"], best[0]["epochs"]) / _images_seen(
        recipe.resolve(row, "full").model_dump(), recipe.resolve(row, "full").train.epochs
    )
    state = _state(measured - published, error, share, budget, best[0]["settings"]["data"], published <= FAILS)
    changed = tuple(recipe.changes(row, budget, best[0]["settings"]))
    head = (recipe.name, row, entry.system, published)
    return Score(*head, measured, error, budget, len(best), share, state, note, changed)


def _state(difference: float, error: float, share: float, budget: str, data: Json, fails: bool) -> State:
    if fails:  # a published failure is met by a failure
        difference = -abs(difference)
    if budget == "smoke":
        return "budget too small"
    if difference >= -2 * error:
        return "met"
    if difference >= -CLOSE:
        return "close"
    whole = data.get("subset") is None and data.get("test_subset") is None
    return "contradicts" if whole and share >= 0.5 else "budget too small"


# Images of the training and the test part, where no subset is taken.
SIZES = {
    "digits": (1438, 359),
    "mnist": (60_000, 10_000),
    "cifar10": (50_000, 8_000),
    "cifar100": (50_000, 10_000),
    "sequential_mnist": (60_000, 10_000),
    "sequential_cifar10": (50_000, 8_000),
    "sequential_cifar100": (50_000, 10_000),
    "fsdd": (2_400, 300),
    "colored_mnist": (40_000, 20_000),
    "imagenet": (1_281_167, 50_000),
    "nmnist": (1_000, 100),
    "cifar10_dvs": (9_000, 1_000),
    "dvs_gesture": (1_176, 288),
    "n_caltech101": (7_838, 871),
    "shd": (8_156, 2_264),
    "n_tidigits": (2_464, 2_486),
}


def _images_seen(settings: Json, epochs: int) -> float:
    data = settings["data"]
    images = data.get("subset") or SIZES[data["name"]][0]
    return epochs * images * (1 - (data.get("validation") or 0.0))


def _test_images(record: Json) -> int:
    data = record["settings"]["data"]
    return data.get("test_subset") or SIZES[data["name"]][1]


def _error(values: list[float], images: int) -> float:
    """The standard error of a mean accuracy in percent: binomial, and of the seeds if that is larger."""
    mean = sum(values) / len(values)
    binomial = 100 * math.sqrt(max(mean / 100 * (1 - mean / 100), 1e-6) / (images * len(values)))
    if len(values) == 1:
        return binomial
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return max(binomial, spread)


def summary(scores: Iterable[Score]) -> list[str]:
    """The counts of the states, a line each."""
    counts = Counter(score.state for score in scores)
    return [f"{counts[state]:4d}  {state}: {meaning}" for state, meaning in STATES.items()]


def as_page(scores: list[Score]) -> str:
    """The scoreboard as one HTML file that needs no network, with a table that sorts by any column."""
    from spikeloom.analyse.report.template import Table, fill

    counts = Counter(score.state for score in scores)
    states = Table(
        "Rows by what their result says",
        ("state", "rows", "meaning"),
        [(state, counts[state], meaning) for state, meaning in STATES.items()],
    )
    head = (
        "table",
        "row",
        "system",
        "published, %",
        "measured, %",
        "standard error",
        "difference",
        "budget",
        "seeds",
        "of the training, %",
        "state",
    )
    rows: list[tuple[Any, ...]] = []
    for score in scores:
        found = score.measured is not None
        numbers = (score.measured, score.error, score.difference) if found else (None, None, None)
        rounded = [None if number is None else round(number, 2) for number in numbers]
        share = 100 * score.share if found else None
        rows.append(
            (
                score.table,
                score.row,
                score.system,
                score.published,
                *rounded,
                ", ".join([score.budget, *score.changed]),
                score.seeds if found else None,
                share,
                score.state,
            )
        )
    table = Table("Published accuracies beside the best measured", head, rows, sortable=True)
    return fill(
        "scores.html", plots=False, intro=[line.replace("`", "") for line in INTRODUCTION], states=states, rows=table
    )


def as_markdown(scores: list[Score]) -> str:
    """The scoreboard as a page."""
    lines = [
        "# Scores",
        "",
        *textwrap.wrap(" ".join(INTRODUCTION), 119, break_on_hyphens=False),
        "",
        "| state | rows | meaning |",
        "|---|---|---|",
    ]
    counts = Counter(score.state for score in scores)
    lines += [f"| {state} | {counts[state]} | {meaning} |" for state, meaning in STATES.items()]
    table = ""
    for score in scores:
        if score.table != table:
            table = score.table
            lines += [
                "",
                f"## {table}: {load_recipe(table).title}",
                "",
                "| row | system | published | measured | difference | budget, seeds | of the training | state |",
                "|---|---|---|---|---|---|---|---|",
            ]
        measured = "" if score.measured is None else f"{score.measured:.2f} ± {score.error:.2f}"
        difference = "" if score.difference is None else f"{score.difference:+.2f}"
        budget = "" if score.measured is None else ", ".join([score.budget, str(score.seeds), *score.changed])
        percent = 100 * score.share
        share = "" if score.measured is None else f"{percent:.{0 if percent >= 1 else 2}f} %"
        cells = [f"`{score.row}`", score.system, f"{score.published:g}", measured, difference, budget, share]
        lines.append(f"| {' | '.join([*cells, score.state])} |")
    return "\n".join(lines) + "\n"
