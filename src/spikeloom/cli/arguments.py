"""What several commands take: settings, runs, and networks to measure."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tomllib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spikeloom.errors import UsageError, cannot_write
from spikeloom.registry import list_recipes, recipe_text

if TYPE_CHECKING:
    from spikeloom.analyse import Target
    from spikeloom.files import PathLike
    from spikeloom.train.recipe import Budget
    from spikeloom.train.run import Run

Json = dict[str, Any]


def complete_recipe(context: typer.Context, incomplete: str) -> list[str]:
    """What the tab key offers for the first word: recipes, and behind a `#` the rows of one."""
    if context.params.get("words"):
        return []
    recipe, sharp, _ = incomplete.partition("#")
    names = list_recipes()
    if sharp and recipe in names:
        names = [f"{recipe}#{row}" for row in tomllib.loads(recipe_text(recipe))["rows"]]
    return [name for name in names if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE[#ROW] KEY=VALUE",
        help="A recipe, and settings to override.",
        autocompletion=complete_recipe,
    ),
]
Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module of yours that registers models, neurons or data. May stand behind a command, and again.",
    ),
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings.")]


def complete_weights(incomplete: str) -> list[str]:
    """What the tab key offers for a run: the trained networks of the package. Folders are the shell's own."""
    from spikeloom.models.trained_weights import PREFIX, list_weights

    names = [f"{PREFIX}{name}" for name in list_weights()]
    return [name for name in names if name.startswith(incomplete)]


RunFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The folder of a finished run, or weights:NAME.", autocompletion=complete_weights
    ),
]
TargetName = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="The folder of a run, weights:NAME, or a model's name.",
        autocompletion=complete_weights,
    ),
]
Images = Annotated[
    int | None, typer.Option("--images", min=1, metavar="N", help="How many test images: 1000; of random inputs 64.")
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, metavar="N", help="Images at a time: 32.")]
Input = Annotated[
    str | None, typer.Option("--input", metavar="SHAPE", help="Of a model: random inputs of this shape, as 3x32x32.")
]
RECIPE_KEYS = ("seed", "budget", "data", "model", "neuron", "train", "measure")
# Options whose name is not that of the key they had. torchrun takes `--run` for its own, even behind our command.
_RENAMED = {"run": ("--out", "--runs")}
TARGET_KEYS = ("data", "model", "neuron", "seed")


def read_settings(context: typer.Context, words: list[str] | None, keys: Iterable[str]) -> Json:
    """The settings `KEY=VALUE` among the words of a command.

    Args:
        context: of the command, whose options are named where one is written as a setting.
        words: what the user wrote.
        keys: the first parts of the keys that the command takes.

    Raises:
        UsageError: another key, or an option of the command written `option=value`.
    """
    from spikeloom.train.recipe import nearest_key, parse_overrides

    values = parse_overrides(words or [])
    keys = tuple(keys)
    for key, value in values.items():
        if key in keys:
            continue
        for option in context.command.params:
            if not {f"--{key.replace('_', '-')}", *_RENAMED.get(key, ())}.isdisjoint(option.opts):
                raise UsageError(f"{key}= is an option: {_as_option(option, value)}")
        options = [name for option in context.command.params for name in option.opts if name.startswith("--")]
        raise UsageError(f"unknown key {key!r}; {nearest_key(key, [*keys, *options])}")
    return values


def _as_option(option: Any, value: Any) -> str:
    """How a value is given to an option."""
    name = option.opts[0]
    if not getattr(option, "is_flag", False):
        return f"write {name} {'VALUE' if isinstance(value, dict | list) else shlex.quote(str(value))}"
    if value is True:
        return f"write {name}"
    return f"write {option.secondary_opts[0]}" if option.secondary_opts else f"write {name}, or leave it out"


def read_recipe(context: typer.Context, words: list[str] | None) -> tuple[str | None, Json]:
    """The recipe, if the first word is one, and the settings."""
    words = list(words or [])
    name = words.pop(0) if words and "=" not in words[0] else None
    return name, read_settings(context, words, RECIPE_KEYS)


def read_target(
    context: typer.Context, words: list[str] | None, images: int | None, batch: int | None, shape: str | None
) -> Json:
    """What `open_target` takes, from settings and options."""
    values = read_settings(context, words, TARGET_KEYS)
    refuse_training_part(values)
    options = {"images": images, "batch": batch, "input": shape}
    return values | {name: value for name, value in options.items() if value is not None}


def refuse_training_part(values: Json) -> None:
    """Refuses settings of the training part, where the test part alone is read.

    Raises:
        UsageError: there is one.
    """
    for key in ("subset", "validation"):
        if key in values.get("data", {}):
            raise UsageError(f"data.{key} is of the training part; of the test part data.test_subset takes the first")


def read_budget(values: Json) -> Budget | None:
    """Takes the budget out of some settings."""
    from spikeloom.train.recipe import take_budget

    return take_budget(values)


def open_run(folder: PathLike) -> Run:
    """The run in a folder, or behind `weights:NAME`."""
    from spikeloom.train.run import Run

    return Run.open(folder)


def own_folder(name: str) -> Path:
    """The folder of a run; of a trained network of the package a copy in runs/, as a page is written beside it."""
    from spikeloom.files import atomic_folder
    from spikeloom.models.trained_weights import PREFIX, run_folder

    folder = run_folder(name)
    if not name.startswith(PREFIX):
        return folder
    copy = Path("runs") / f"{folder.parent.name}-{folder.name}"
    if not copy.exists():
        with atomic_folder(copy) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
    return copy


def check_output(path: Path | None) -> None:
    """Checks before the work that a file can be written.

    Raises:
        UsageError: it is a folder, or there is no folder to hold it.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise cannot_write(path)


@contextlib.contextmanager
def running(opened: Target) -> Generator[None]:
    """What a network cannot take is the user's mistake: its data do not fit it."""
    try:
        yield
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{opened.title} cannot run on {opened.data}: {error}") from None
