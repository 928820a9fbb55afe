"""The Python in README and docs runs, and the commands in them name recipes and keys that exist."""

import re
import shlex
from pathlib import Path

import pytest

from spikeloom.reproduce import check_measure
from spikeloom.train.recipe import load_recipe, parse_overrides

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for i, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(block, id=f"{page.name}-{i}"))
    return found


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_examples_run(code):
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def _commands() -> list[str]:
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    found = [re.sub(r"^\$ ", "", line).split("#  ")[0].split("  # ")[0] for line in lines]
    return sorted({line.strip() for line in found if re.match(r"spikeloom (train|reproduce) ", line)})


@pytest.mark.parametrize("command", _commands())
def test_commands_name_what_exists(command):
    words = shlex.split(command)[2:]
    recipe = words.pop(0) if "=" not in words[0] else "quickstart/digits"
    overrides = parse_overrides(words)
    if "resume" in overrides or recipe.startswith("./"):
        return
    name, _, row = recipe.partition("#")
    loaded = load_recipe(name)
    budget = overrides.pop("budget", None)
    for place in ("run", "results"):
        overrides.pop(place, None)
    for each in [row] if row else loaded.rows:
        if loaded.measures:
            check_measure(loaded, each, budget, overrides)
        else:
            loaded.resolve(each, budget, overrides)


def test_there_are_examples():
    assert len(_blocks("python")) >= 4
    assert len(_commands()) >= 4
