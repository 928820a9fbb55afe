"""Recipes: what to train and on what, or what to measure, as TOML with every key checked.

A recipe is a table of a paper. Its rows share `settings`; a row, a budget, a row's own budget and the command line
override them, in this order. Keys that nothing reads are errors, with the nearest known ones.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from spikeloom.errors import UsageError
from spikeloom.registry import nearest, recipe_text
from spikeloom.train.settings import DataSettings, MeasureSettings, Named, Settings, Strict, TrainSettings, as_tuple

Budget = Literal["smoke", "short", "hours", "full"]
BUDGETS: tuple[Budget, ...] = typing.get_args(Budget)
Json = dict[str, Any]


class Row(BaseModel):
    """One line of a published table: overrides of the recipe's settings, and the published numbers."""

    model_config = ConfigDict(extra="allow", strict=True)

    system: str
    published: dict[str, float | str] = {}
    budgets: dict[Budget, Json] = {}

    @property
    def overrides(self) -> Json:
        """The row's settings."""
        return dict(self.model_extra or {})


class Recipe(Strict):
    """A table or figure: see the files under `recipes/`."""

    name: str
    title: str
    paper: str
    command: str
    notes: str = ""
    budget: Budget = Field("short", description="taken when none is asked for; without such a budget, full")
    settings: Json
    budgets: dict[Budget, Json]
    rows: dict[str, Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _its_own_budget(self) -> Recipe:
        """A recipe without `short` is taken as it stands, unless it names another budget."""
        known = [self.budgets, *(row.budgets for row in self.rows.values())]
        if "budget" not in self.model_fields_set and not any("short" in budgets for budgets in known):
            self.budget = "full"
        return self

    @property
    def measures(self) -> bool:
        """Whether its rows are measured, not trained."""
        return "measure" in self.settings

    @property
    def short_name(self) -> str:
        """What folders of its runs and results are called: its name, or of a recipe of the user's own its file's."""
        return Path(self.name).stem if self.name.endswith(".toml") else self.name

    def check_row(self, row: str) -> None:
        """Raises a `UsageError` with the nearest row if there is none of this name."""
        if row not in self.rows:
            raise UsageError(f"recipe {self.name} has no row {row!r}; {nearest(row, self.rows)}")

    def resolve(self, row: str, budget: Budget | None = None, overrides: Json | None = None) -> Settings:
        """The settings of one row under a budget, checked against what they name."""
        if self.measures:
            raise UsageError(f"{self.name} is measured, not trained: use: spikeloom reproduce {shlex.quote(self.name)}")
        return check_settings(self._merged(row, budget, overrides), f"{self.name}#{row}")

    def changes(self, row: str, budget: Budget | None, record: Json) -> list[str]:
        """The settings of a record that differ from those of a row, as words of the command line.

        Args:
            row: of the recipe.
            budget: of the record.
            record: settings as they were saved; an older one may lack keys, which count as unchanged.
        """
        wanted = flatten(self.resolve(row, budget).model_dump())
        return [
            f"{key}={value if isinstance(value, str) else as_toml(value)}"
            for key, value in flatten(record).items()
            if key not in _CIRCUMSTANCES and wanted.get(key) != value
        ]

    def resolve_measure(self, row: str, budget: Budget | None = None, overrides: Json | None = None) -> MeasureSettings:
        """What one row measures under a budget; its options are checked by who knows the measurement."""
        return _validate(MeasureSettings, self._merged(row, budget, overrides), f"{self.name}#{row}")

    def _merged(self, row: str, budget: Budget | None, overrides: Json | None) -> Json:
        self.check_row(row)
        entry, budget = self.rows[row], budget or self.budget
        known = [b for b in BUDGETS if b == "full" or b in self.budgets or b in entry.budgets]
        if budget not in known:
            raise UsageError(f"{self.name}#{row} has no budget {budget!r}; it has {', '.join(known)}")
        merged: Json = {}
        for part in (
            self.settings,
            entry.overrides,
            self.budgets.get(budget, {}),
            entry.budgets.get(budget, {}),
            overrides or {},
        ):
            merged = merge(merged, part)
        return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """`base` with the entries of `over`, table by table; a name in `over` replaces a whole table."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping):
            old = {"name": old}
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> Json:
    """Nested values by their dotted keys."""
    found: Json = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def as_toml(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={as_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return "none" if value is None else json.dumps(value)


# Settings that say where and how a run was made, not what it trained.
_CIRCUMSTANCES = {"seed", "data.root", "data.download", "train.start_from", "train.checkpoint_minutes", "train.workers"}

# Options of registered builders that training gives, not the user.
SUPPLIED = {
    "data": {"split", "root"},
    "model": {"neuron", "in_channels", "num_classes"},
    "neuron": {"channels", "features"},
}


def check_settings(values: Json, where: str, given: bool = False) -> Settings:
    """Settings from plain values, every key known and of its type.

    Args:
        values: by their keys.
        where: where they stand, for messages.
        given: data and model are made by the caller, and their names in no registry.

    Raises:
        UsageError: one line with the key, what is wrong and, for unknown ones, the nearest.
    """
    settings = _validate(Settings, values, where)
    from spikeloom.data import DATASETS, TRANSFORMS
    from spikeloom.models import MODELS
    from spikeloom.neurons import NEURONS
    from spikeloom.train.environments import PENALTIES
    from spikeloom.train.losses import LOSSES, PER_STEP
    from spikeloom.train.methods import METHODS

    if not given:
        check_options(settings.data, DATASETS, f"{where}: data", SUPPLIED["data"])
        check_options(settings.model, MODELS, f"{where}: model", SUPPLIED["model"])
    for key, neuron in (("neuron", settings.neuron), *(("train.steps", s.neuron) for s in settings.train.steps)):
        if neuron is not None:
            check_options(neuron, NEURONS, f"{where}: {key}", SUPPLIED["neuron"])
    check_options(settings.train.loss, LOSSES, f"{where}: train.loss", {"logits", "y", "class_weights"})
    check_options(settings.train.method, METHODS, f"{where}: train.method", {"model", "x", "y", "loss"})
    if settings.train.penalty is not None:
        check_options(settings.train.penalty, PENALTIES, f"{where}: train.penalty", {"shares"})
    if not settings.train.takes_whole_sequences:
        if settings.train.loss.name not in PER_STEP:
            raise UsageError(
                f"{where}: train.method {settings.train.method.name} takes one step at a time, but train.loss "
                f"{settings.train.loss.name} is of the mean over time: use train.loss=tet, or "
                "train.method=sltt train.method.mode=multi_step_detached"
            )
        if settings.train.penalty is not None:
            raise UsageError(f"{where}: train.penalty needs train.method=bptt, got {settings.train.method.name}")
    for transform in settings.train.augment:
        check_options(transform, TRANSFORMS, f"{where}: train.augment", {"mean", "std"})
    _check_schedules(settings, where)
    return settings


def _check_schedules(settings: Settings, where: str) -> None:
    t = settings.train
    staged = sum(stage.epochs for stage in t.steps)
    if staged > t.epochs:
        raise UsageError(f"{where}: train.steps has {staged} epochs, but train.epochs is {t.epochs}")
    if t.nesterov and (t.optimizer != "sgd" or t.momentum == 0):
        raise UsageError(f"{where}: train.nesterov needs train.optimizer=sgd with train.momentum above 0")


def check_data(values: Json, where: str) -> DataSettings:
    """Settings of a data set, its options checked.

    Raises:
        UsageError: an unknown data set or option, or a value of another type.
    """
    from spikeloom.data import DATASETS

    settings = _validate(DataSettings, values, f"{where}: data")
    check_options(settings, DATASETS, f"{where}: data", SUPPLIED["data"])
    return settings


def check_options(named: Named, registry: Any, where: str, supplied: set[str]) -> None:
    """Checks a name against a registry, and its options against the entry's signature, less what is `supplied`.

    Raises:
        UsageError: one line with the name or the key, what is wrong and, for unknown ones, the nearest.
    """
    try:
        builder = registry[named.name]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    # What every entry takes, such as data.root, is known beside an entry's own options.
    shared = [key for key in type(named).model_fields if key != "name"]
    _validate(options_model(builder, frozenset(supplied)), named.options, f"{where} {named.name}", shared)


@functools.lru_cache(maxsize=256)
def options_model(builder: Callable[..., Any], supplied: frozenset[str]) -> type[BaseModel]:
    from spikeloom.surrogates import Surrogate

    target = builder.__init__ if inspect.isclass(builder) else builder
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    extra: typing.Literal["forbid", "allow"] = "forbid"
    for name, parameter in inspect.signature(builder).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        if name in supplied or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint = hints.get(name, Any)  # a user's own entry need not be annotated
        if Surrogate in typing.get_args(hint):
            hint = Named
        if any(typing.get_origin(option) is tuple for option in (hint, *typing.get_args(hint))):
            hint = Annotated[hint, BeforeValidator(as_tuple)]
        fields[name] = (hint, ... if parameter.default is parameter.empty else parameter.default)
    return pydantic.create_model(
        builder.__name__,
        __config__=ConfigDict(extra=extra, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False),
        **fields,
    )


_Model = typing.TypeVar("_Model", bound=BaseModel)

# What an option without its name wants.
_NAMED = {
    "neuron.name": "add neuron=NAME, such as neuron=LIF (spikeloom list neurons)",
    "model.name": "add model=NAME (spikeloom list models)",
    "data.name": "add data=NAME (spikeloom list datasets)",
}


def _validate(model: type[_Model], values: Json, where: str, shared: Iterable[str] = ()) -> _Model:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        # An unknown key first: a misspelt one is also missing.
        errors = error.errors()
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        path = [str(part) for part in first["loc"]]
        key = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = [*_known_keys(model, path[:-1]), *shared]
            raise UsageError(f"{where}: unknown key {key!r}; {nearest(path[-1], known)}") from None
        if missing := _missing(errors):
            missing += _missing_settings(values) if model is Recipe else []
            hint = next((f"; {_NAMED[key]}" for key in missing if key in _NAMED), "")
            verb = "is" if len(missing) == 1 else "are"
            raise UsageError(f"{where}: {', '.join(missing)} {verb} missing{hint}") from None
        # Of settings that do not go together the error names them, and what helps.
        if first["type"] == "value_error" and issubclass(model, Strict):
            raise UsageError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        raise UsageError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None


def _missing(errors: Iterable[Any]) -> list[str]:
    """The dotted keys that a validation found missing."""
    return [".".join(map(str, error["loc"])) for error in errors if error["type"] == "missing"]


def _missing_settings(recipe: Json) -> list[str]:
    """The keys that the settings of an incomplete recipe lack, as its first row has them."""
    settings, rows = recipe.get("settings", {}), recipe.get("rows", {})
    if not isinstance(settings, dict) or not isinstance(rows, dict) or "measure" in settings:
        return []
    row = next(iter(rows.values()), {})
    merged = merge({"train": {}}, merge(settings, row if isinstance(row, dict) else {}))
    try:
        Settings.model_validate({key: value for key, value in merged.items() if key in Settings.model_fields})
    except pydantic.ValidationError as error:
        return [f"settings.{key}" for key in _missing(error.errors())]
    return []


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for option in (annotation, *typing.get_args(annotation)):
            if inspect.isclass(option) and issubclass(option, BaseModel):
                model = option
                break
    return list(model.model_fields)


def nearest_key(key: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown key: where a setting of that name goes, or names like it.

    Args:
        key: what the user wrote, such as "lr".
        known: the first parts of the keys that would be right, such as "train", and options such as "--out".
    """
    from spikeloom.data import DATASETS
    from spikeloom.models import MODELS
    from spikeloom.neurons import NEURONS

    known = list(known)
    names = {"train": set(TrainSettings.model_fields), "data": {"root", "test_subset"}}
    for part, registry in (("model", MODELS), ("neuron", NEURONS), ("data", DATASETS)):
        options = {name for entry in registry for name in inspect.signature(registry[entry]).parameters}
        names[part] = names.get(part, set()) | (options - SUPPLIED[part])
    places: dict[str, str] = {}
    for part in ("train", "model", "neuron", "data"):
        if part in known:
            places = {name: f"{part}.{name}" for name in sorted(names[part])} | places
    if key in places:
        return f"did you mean {places[key]}?"
    if not (close := difflib.get_close_matches(key, known, cutoff=0.5)):
        close = [places[name] for name in difflib.get_close_matches(key, places, cutoff=0.7)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return nearest(key, [name for name in known if not name.startswith("-")])


# --- where recipes are ------------------------------------------------------------------------------------------------


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """A recipe of the package by name, or a TOML file by its path.

    Raises:
        UsageError: no such recipe, not TOML, or a wrong key.
    """
    name = os.fspath(name)
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"there is no recipe file {name}")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the recipe file {name}: {error}") from None
    else:
        text = recipe_text(name)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {name} is not valid TOML: {error}") from None
    return _validate(Recipe, {"name": name, **values}, f"recipe {name}")


def load_row(name: str, otherwise: str = "") -> tuple[Recipe, str]:
    """A recipe and one of its rows, by `recipe#row`; of a recipe with one row its name is enough.

    Args:
        name: of both.
        otherwise: what else to do with a recipe of several rows, for the message.

    Raises:
        UsageError: as `load_recipe`, or no row is named where there are several.
    """
    name, _, row = name.partition("#")
    recipe = load_recipe(name)
    if not row and len(recipe.rows) > 1:
        first = shlex.quote(f"{name}#{next(iter(recipe.rows))}")
        hint = f"name one, as in {first} ({', '.join(recipe.rows)})" + (otherwise and f", {otherwise}")
        raise UsageError(f"{name} has several rows: {hint}")
    return recipe, row or next(iter(recipe.rows))


def take_budget(values: Json) -> Budget | None:
    """Takes the budget out of some settings.

    Raises:
        UsageError: an unknown one.
    """
    budget = values.pop("budget", None)
    if budget not in (None, *BUDGETS):
        raise UsageError(f"unknown budget {budget!r}; {nearest(str(budget), BUDGETS)}")
    return budget


def parse_overrides(words: list[str]) -> Json:
    """`key.path=value` words as nested values; a value is TOML, or else a string.

    Raises:
        UsageError: a word without "=".
    """
    values: Json = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"expected key=value, got {word!r}; for example data.root=/data or train.epochs=3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
    return values
