"""The scoreboard: what a result says of a published accuracy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import spikeloom

from spikeloom.errors import DataFileError
from spikeloom.registry import list_recipes
from spikeloom.scores import ACCURACIES, SIZES, STATES, Score, as_markdown, as_page, scoreboard, summary
from spikeloom.train.recipe import load_recipe, merge


def write(folder: Path, acc: float | None, budget: str = "hours", seed: int = 1, **changes: Any) -> None:
    """A result of `report/table1#s0t1b`, published 89.03."""
    recipe = load_recipe("report/table1")
    settings = merge(recipe.resolve("s0t1b", "full").model_dump(), changes)
    record = {
        "table": "report/table1",
        "row": "s0t1b",
        "budget": budget,
        "seed": seed,
        "measured": {"acc": acc},
        "epochs": settings["train"]["epochs"],
        "settings": settings,
    }
    folder = folder / "report/table1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"s0t1b.{budget}.seed{seed}.json").write_text(json.dumps(record))


def score(folder: Path, row: str = "s0t1b") -> Score:
    [found] = [s for s in scoreboard(folder) if (s.table, s.row) == ("report/table1", row)]
    return found


@pytest.mark.parametrize(
    ("acc", "changes", "state"),
    [
        (89.5, {}, "met"),
        (88.4, {}, "met"),  # within two standard errors of 0.36 points
        (87.5, {}, "close"),
        (80.0, {}, "contradicts"),
        (80.0, {"train": {"epochs": 90}}, "budget too small"),
        (80.0, {"data": {"subset": 10_000}, "train": {"epochs": 960}}, "budget too small"),
        (88.4, {"train": {"epochs": 1}}, "met"),  # less training that was enough
    ],
)
def test_states(tmp_path: Path, acc: float, changes: dict[str, Any], state: str) -> None:
    write(tmp_path, acc, **changes)
    assert score(tmp_path).state == state


def test_settings_that_were_changed_by_hand_are_shown(tmp_path: Path) -> None:
    write(tmp_path, 80.0, "full", data={"root": "elsewhere"})
    assert score(tmp_path).changed == ()
    write(tmp_path, 80.0, "full", model={"name": "report_sew_resnet34", "T": 4}, train={"lr": 0.2})
    found = score(tmp_path)
    assert set(found.changed) == {"model.T=4", "train.lr=0.2"}
    assert "| full, 1, model.T=4, train.lr=0.2 |" in as_markdown([found])
    assert "full, model.T=4, train.lr=0.2" in as_page([found])


def test_a_smoke_run_is_never_a_result(tmp_path: Path) -> None:
    write(tmp_path, 95.0, "smoke")
    assert score(tmp_path).state == "budget too small"


def test_without_results(tmp_path: Path) -> None:
    found = score(tmp_path)
    assert (found.state, found.measured, found.difference) == ("not run", None, None)
    write(tmp_path, None)
    assert score(tmp_path).state == "not run"
    states = {s.state for s in scoreboard(tmp_path) if s.table == "sew/table2"}
    assert states == {"no data"}


def test_a_published_failure_is_met_by_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "report/table1"
    write(tmp_path, 47.0)
    record = json.loads((folder / "s0t1b.hours.seed1.json").read_text())
    for acc, state in ((10.2, "met"), (47.0, "contradicts")):
        (folder / "s0x1.hours.seed1.json").write_text(json.dumps({**record, "row": "s0x1", "measured": {"acc": acc}}))
        assert score(tmp_path, "s0x1").state == state


def test_the_largest_budget_over_its_seeds(tmp_path: Path) -> None:
    """Mean and standard error by hand."""
    write(tmp_path, 95.0, "short")
    for seed, acc in enumerate((80.0, 86.0, 83.0), 1):
        write(tmp_path, acc, "hours", seed, train={"epochs": 38})
    found = score(tmp_path)
    assert (found.budget, found.seeds, found.measured) == ("hours", 3, 83.0)
    assert found.error == pytest.approx(3 / math.sqrt(3))
    assert found.share == pytest.approx(0.2)
    assert found.difference == pytest.approx(83.0 - 89.03)
    write(tmp_path, 80.0, "full")
    assert score(tmp_path).error == pytest.approx(100 * math.sqrt(0.8 * 0.2 / 8000))


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    write(tmp_path, 80.0)
    (tmp_path / "report/table1/s0t1b.hours.seed1.json").write_text("{")
    with pytest.raises(DataFileError, match=r"seed1\.json is not valid JSON"):
        scoreboard(tmp_path)


def test_the_page(tmp_path: Path) -> None:
    write(tmp_path, 87.5, "full")
    scores = scoreboard(tmp_path)
    lines = summary(scores)
    assert len(lines) == len(STATES) == 6
    assert sum(int(line.split()[0]) for line in lines) == len(scores) > 200
    page = as_markdown(scores)
    assert page.count("\n| `") == len(scores)
    row = next(line for line in page.splitlines() if line.startswith("| `s0t1b` | SEW-ResNet-34"))
    assert row == "| `s0t1b` | SEW-ResNet-34 | 89.03 | 87.50 ± 0.37 | -1.53 | full, 1 | 100 % | close |"


def test_the_html_page_needs_no_network(tmp_path: Path) -> None:
    write(tmp_path, 88.5, "full")
    scores = scoreboard(tmp_path)
    page = as_page(scores)
    assert "http" not in page.replace("http-equiv", "")
    body = page.partition('id="rows"')[2]
    assert body.count("<tr>") == len(scores) + 1
    [row] = [line for line in body.splitlines() if ">s0t1b<" in line]
    for cell in ("report/table1", "SEW-ResNet-34", "89.03", "88.5", "full", "met"):
        assert f">{cell}<" in row


def test_every_data_set_of_a_recipe_has_its_size() -> None:
    recipes = [load_recipe(name) for name in list_recipes()]
    names = {
        r.resolve(row, "full").data.name
        for r in recipes
        if not r.measures
        for row, entry in r.rows.items()
        if any(key in entry.published for key in ACCURACIES)
    }
    assert names <= set(SIZES)


def test_the_command_prints_rows_and_counts_and_writes_the_page(tmp_path: Path) -> None:
    write(tmp_path / "results", 89.5)
    places = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "scores.md")]
    found = spikeloom("reproduce", "--scores", *places)
    assert found.code == 0
    [row] = [line for line in found.out.splitlines() if "report/table1#s0t1b" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")[2:5]] == ["89.03", "89.50 ± 0.34", "hours"]
    scores = scoreboard(tmp_path / "results")
    assert found.out.splitlines()[-7:] == [*summary(scores), f"page: {tmp_path / 'scores.md'}"]
    assert (tmp_path / "scores.md").read_text() == as_markdown(scores)
    listed = json.loads(spikeloom("reproduce", "--scores", *places[:2], "--json").out)
    assert [s["measured"] for s in listed if (s["table"], s["row"]) == ("report/table1", "s0t1b")] == [89.5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scores", "--results", "none"], "there are no results in none: give their folder as --results PATH"),
        (["--scores", "--figures"], "--scores and --figures are two commands: give one of them"),
        (["--scores", "report/table1"], "--scores is of all recipes and takes no settings, got 'report/table1'"),
        (["report/table1", "--out", "x"], "or the folder of --figures; tables write their numbers to --results"),
        (["--scores", "--out", "scores.txt"], "--out takes a page that ends in .md or .html, got scores.txt"),
        (["--scores", "--out", "none/scores.md"], "cannot write none/scores.md: there is no folder none; make it"),
    ],
)
def test_wrong_options_of_scores(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    found = spikeloom("reproduce", *words)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert message in found.err
