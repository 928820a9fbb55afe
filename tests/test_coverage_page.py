"""docs/coverage.md names what exists: recipes and their rows, modules and functions, tests."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikeloom.registry import list_recipes
from spikeloom.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coverage.md").read_text()
NAMES = sorted(set(re.findall(r"`(spikeloom(?:\.\w+)+)`", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def _rows() -> Iterator[tuple[str, str]]:
    """Recipes and rows; `#row` alone is of the recipe that is named before it in its line."""
    folders = "|".join({name.partition("/")[0] for name in list_recipes()})
    for line in PAGE.splitlines():
        recipe = ""
        for name, row in re.findall(rf"`((?:{folders})/\w+)?(?:#(\w+))?`", line):
            recipe = name or recipe
            if recipe:
                yield recipe, row


@pytest.mark.parametrize(("recipe", "row"), sorted(set(_rows())))
def test_recipes_and_rows_exist(recipe: str, row: str) -> None:
    assert recipe in list_recipes()
    assert not row or row in load_recipe(recipe).rows


@pytest.mark.parametrize("name", NAMES)
def test_names_exist(name: str) -> None:
    *_, last = parts = name.split(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(".".join(parts[:-1])), last)


@pytest.mark.parametrize(("path", "test"), TESTS)
def test_tests_exist(path: str, test: str) -> None:
    assert f"\ndef {test}(" in (ROOT / path).read_text()


def test_every_recipe_of_a_paper_is_on_the_page() -> None:
    named = {recipe for recipe, _ in _rows()}
    ours = {"psn/sequential_mnist", "spikformer_v2/pretrain"}  # no paper has them
    assert {name for name in list_recipes() if not name.startswith("quickstart/")} - named == ours


def test_states_are_the_three() -> None:
    states = [line.split("|")[3].strip() for line in PAGE.splitlines() if line.startswith("|") and line.count("|") == 5]
    assert set(states) - {"state", "---"} == {"complete", "partial", "cited"}
    assert len(states) > 100


def test_every_item_that_is_not_complete_says_why() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("|") and line.count("|") == 5]
    assert [row[1] for row in rows if row[3].strip() in ("partial", "cited") and not row[4].strip()] == []
