"""The Python in README and docs runs, and the commands in them name recipes and keys that exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from spikeloom import cli
from spikeloom.registry import list_recipes
from spikeloom.reproduce import check_measure
from spikeloom.scores import as_markdown, scoreboard, summary
from spikeloom.train.recipe import DataSettings, TrainSettings, load_recipe, parse_overrides

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


def _commands(names: str) -> list[str]:
    lines = [line for page in PAGES for line in page.read_text().splitlines()]
    found = [re.sub(r"^\$ ", "", line).split("#  ")[0].split("  # ")[0] for line in lines]
    found += re.findall(r"`(spikeloom [^`]*)`", "".join(page.read_text().replace("\n", " ") for page in PAGES))
    found += [load_recipe(name).command for name in list_recipes()]
    # What messages advise, as far as it stands in one line.
    source = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    found += re.findall(r"(spikeloom [a-z]+ [^`'\"\n{]*--[a-z][a-z-]*)", "\n".join(source))
    return sorted({line.strip() for line in found if re.match(rf"spikeloom ({names}) ", line)})


def _split(command: str) -> tuple[list[str], set[str]]:
    """The words of a command that are no options, and the names of its options."""
    options = {option.split("=")[0] for option in re.findall(r" (--[^ ]+)", command)}
    valued = r" --(runs|resume|results|out|to|T|images|input|save|engine|weights)[ =][^ ]+"
    words = shlex.split(re.sub(valued, "", command))[2:]
    return [word for word in words if not word.startswith("--")], options


@pytest.mark.parametrize("command", _commands("[a-z]+"))
def test_options_of_commands_exist(command):
    name = command.split()[1]
    [known] = [c for c in typer.main.get_command(cli.app).commands.values() if c.name == name]
    options = {option for param in known.params for option in (*param.opts, *param.secondary_opts)}
    words, used = _split(command)
    assert used <= options
    for word in words:
        assert f"--{word.split('=')[0]}" not in options or "=" not in word, f"{word} is an option"


@pytest.mark.parametrize("command", _commands("train|reproduce"))
def test_commands_name_what_exists(command):
    words, options = _split(command)
    recipe = words.pop(0) if words and "=" not in words[0] else "quickstart/digits"
    overrides = parse_overrides(words)
    if "--resume" in options or recipe.startswith("./") or recipe == "RECIPE":
        return
    name, _, row = recipe.partition("#")
    loaded = load_recipe(name)
    budget = overrides.pop("budget", None)
    for each in [row] if row else loaded.rows:
        if loaded.measures:
            check_measure(loaded, each, budget, overrides)
        else:
            loaded.resolve(each, budget, overrides)


def test_there_are_examples():
    assert len(_blocks("python")) >= 4
    assert len(_commands("[a-z]+")) >= 40


def test_every_setting_of_training_is_explained():
    pages = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("training", "few-epochs"))
    keys = [f"train.{key}" for key in TrainSettings.model_fields] + [f"data.{key}" for key in DataSettings.model_fields]
    assert [key for key in keys if f"`{key}" not in pages] == []


def test_the_scores_are_those_of_the_results():
    scores = scoreboard(ROOT / "results")
    assert (ROOT / "docs" / "scores.md").read_text() == as_markdown(scores), (
        "run: spikeloom reproduce --scores --out docs/scores.md"
    )
    readme = (ROOT / "README.md").read_text()
    for line in summary(scores):
        assert line in readme, f"README's scores are older than results/: {line}"


def _named_files() -> list[str]:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in section.splitlines() if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_files_of_everyday_changes_exist():
    names = _named_files()
    assert len(names) >= 24
    missing = [
        name for name in names if not any((root / name).is_file() for root in (ROOT / "src" / "spikeloom", ROOT))
    ]
    assert not missing
