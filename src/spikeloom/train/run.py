"""A run's folder: what was asked for, how it went, and all that is needed to continue it.

settings.json            recipe, row, budget, settings, versions
metrics.jsonl            one line an epoch
tensorboard/             the same, for TensorBoard; tracker.json: who the run is at another tracker
checkpoint.safetensors   weights, optimiser and position of the last checkpoint
best.safetensors         weights of the best epoch so far, with data.validation
seconds.json             what training took until then
model.safetensors        the trained weights
summary.json             written at the end
report.html, report.json the page of `spikeloom report`, and what was measured for it
show.html                the page of `spikeloom show`
.lock                    while a process trains
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from spikeloom import plugins
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, atomic, read_json, write_json
from spikeloom.models.trained_weights import run_folder
from spikeloom.notebook import html_table
from spikeloom.train import lock
from spikeloom.train.checks_of_settings import check_beginning
from spikeloom.train.machine import environment
from spikeloom.train.recipe import Budget, check_settings, flatten, merge
from spikeloom.train.settings import Named, Settings
from spikeloom.train.stages import stage_of_epoch

Json = dict[str, Any]
GIVEN = "given"
"""The recipe of runs whose model and data were made in Python (`spikeloom.train.fit`)."""
IMPORTED = "imported"  # in place of a recipe: the weights were trained elsewhere
_RECORD = {"test_accuracy", "test_loss", "seconds"}  # what every epoch's record has
_SUMMARY: Json = {
    "test_accuracy": float | int | None,
    "best_test_accuracy": float | int | None,
    "data": dict,
    "epochs": int,
    "seconds": float | int,
    "environment": dict,
}
# What may change in a run that continues: neither the weights' shapes, nor the order of the data, nor the model.
CHANGEABLE = (
    "train.lr",
    "train.schedule",
    "train.warmup_epochs",
    "train.warmup_lr",
    "train.min_lr",
    "train.cooldown_epochs",
    "train.milestones",
    "train.gamma",
    "train.momentum",
    "train.nesterov",
    "train.weight_decay",
    "train.epochs",
    "train.steps",
    "train.loss",
    "train.method",
    "train.penalty",
    "train.rate_penalty",
    "train.class_weights",
    "train.clip_grad",
    "train.patience",
    "train.augment",
    "train.mix",
    "train.precision",
    "train.batch_size",
    "train.accumulate",
    "train.total_batch",
    "train.shard",
    "train.workers",
    "train.channels_last",
    "train.checkpoint_minutes",
    "train.tracker",
    "data.root",
)


@dataclass(frozen=True)
class Run:
    """A run: its folder, and what decides its weights.

    Attributes:
        folder: its path.
        recipe, row, budget: where the settings come from.
        settings: all that decides the weights.
        imports: modules of the user's that it was made with, by their names.
        changes: what was changed when the run was continued, each `{"after_epoch": n, "settings": {key: [old, new]}}`.
        new: whether the folder was empty when the run was planned.
    """

    folder: Path
    recipe: str
    row: str
    budget: str
    settings: Settings
    changes: tuple[Json, ...] = ()
    imports: tuple[str, ...] = ()
    new: bool = field(default=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @classmethod
    def plan(
        cls, folder: PathLike, recipe: str, row: str, budget: str, settings: Settings, asked: Json | None = None
    ) -> Run:
        """A run that has not begun: nothing is written until `begin`, so that a mistake leaves nothing behind.

        Args:
            folder, recipe, row, budget, settings: of the run.
            asked: the settings among them that the user gave beside the recipe, which must have an effect.

        Raises:
            UsageError: the folder exists with something in it, or settings that mean nothing.
        """
        where = "fit" if recipe == GIVEN else f"{recipe}#{row}"
        check_beginning(settings.train, (asked or {}).get("train", {}), where)
        run = cls(Path(folder), recipe, row, budget, settings, imports=tuple(plugins.named()), new=True)
        with run._placing():
            if run.folder.exists() and any(not _is_leftover(path) for path in run.folder.iterdir()):
                raise run._occupied()
        return run

    def _occupied(self) -> UsageError:
        message = f"{self.folder} is not empty: choose another folder with --out"
        if (self.folder / "settings.json").is_file() and not (self.folder / "summary.json").is_file():
            message += f", or continue its run with: spikeloom train --resume {shlex.quote(str(self.folder))}"
        return UsageError(message)

    @contextlib.contextmanager
    def writing(self) -> Generator[None]:
        """Begins the run, or continues it, and keeps other processes from its folder while the block runs.

        Raises:
            UsageError: the folder cannot be written, another process trains in it, or another run has begun in it since
                this one was planned.
        """
        with contextlib.ExitStack() as stack:
            with self._placing():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.locked(self.folder))
            if (
                self.new
                and (self.folder / "settings.json").exists()
                and Run.open(self.folder, self.recipe == GIVEN) != self
            ):
                raise self._occupied()
            self.begin()
            yield

    def begin(self) -> None:
        """Makes the folder and writes the settings, unless they are there; clears what a killed process left.

        Raises:
            UsageError: the folder cannot be written.
        """
        with self._placing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _is_leftover(path) and path.name != lock.NAME:
                    path.unlink(missing_ok=True)
        file = self.folder / "settings.json"
        if file.is_file() and len(read_json(file).get("changes", ())) == len(self.changes):
            return
        values: Json = {
            "recipe": self.recipe,
            "row": self.row,
            "budget": self.budget,
            "settings": self.settings.model_dump(),
            "environment": environment(),
        }
        if self.imports:
            values["imports"] = list(self.imports)
        if self.changes:
            values["changes"] = list(self.changes)
        write_json(file, values)

    def changed(self, values: Json) -> Run:
        """This run with other settings from its last checkpoint on; `begin` writes them down.

        Args:
            values: settings by their keys, of `train` those in `CHANGEABLE`, of `data` where the files are.

        Raises:
            UsageError: a setting that decides the model, the order of the data or the optimiser's state, a wrong value,
                or fewer epochs than the run has.
        """
        kept = [k for k in flatten(values) if not f"{k}.".startswith(tuple(f"{name}." for name in CHANGEABLE))]
        # A misspelt key is unknown rather than fixed. Where another model, neuron or the like is named that cannot be
        # told: its options are unknown to the one that the run has.
        by_name = any(key.partition(".")[2] in ("", "name") for key in kept if key != "seed")
        settings = (
            self.settings if by_name else check_settings(merge(self.settings.model_dump(), values), str(self.folder))
        )
        if kept:
            raise UsageError(
                f"a run that continues keeps its model, data and optimiser: {kept[0]} cannot change, only "
                f"{', '.join(CHANGEABLE)}; or start a new run with train.start_from={shlex.quote(str(self.folder))}"
            )
        if values:
            check_beginning(settings.train, values.get("train", {}), str(self.folder))
        before, after = flatten(self.settings.model_dump()), flatten(settings.model_dump())
        changes = {
            key: [before.get(key), after.get(key)] for key in before | after if before.get(key) != after.get(key)
        }
        epochs = len(self.metrics())
        if settings.train.epochs < epochs:
            raise UsageError(f"{self.folder} has {epochs} epochs already: train.epochs must be at least that")
        # Norms are measured anew where T changes between two epochs, never within one.
        for epoch in range(min(epochs + 1, settings.train.epochs)):
            if stage_of_epoch(self.settings.train, 0, epoch) != stage_of_epoch(settings.train, 0, epoch):
                raise UsageError(f"{self.folder} is in epoch {epochs + 1}: train.steps may change later epochs alone")
        if not changes:
            return self
        record: Json = {"after_epoch": epochs, "settings": changes}
        return dataclasses.replace(self, settings=settings, changes=(*self.changes, record))

    @contextlib.contextmanager
    def _placing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder {self.folder}: {error.strerror or error}; choose another place "
                "(--out of train, --runs of reproduce)"
            ) from None

    @classmethod
    def open(cls, folder: PathLike, given: bool = False) -> Run:
        """An existing run, or by `weights:NAME` the run of a trained network that comes with the package.

        Args:
            folder: of the run.
            given: a run whose model and data were made in Python is wanted too: the caller has them.

        Raises:
            DataFileError: the folder is no run.
            UsageError: it was made with modules of the user's that are not imported.
        """
        folder = run_folder(folder)
        if not (folder / "settings.json").is_file():
            raise DataFileError(f"{folder} is not a run: it has no settings.json")
        path = folder / "settings.json"
        saved = read_json(path)
        try:
            recipe, row, budget = saved["recipe"], saved["row"], saved["budget"]
            if not (isinstance(recipe, str) and isinstance(row, str) and budget in get_args(Budget)):
                raise TypeError
            imports = plugins.saved_names(saved.get("imports", ()))
            plugins.require(imports, str(folder))
            if recipe == GIVEN and not given:
                raise UsageError(
                    f"{folder} is a run of spikeloom.train.fit, whose model and data are yours alone: continue it by "
                    "calling fit again, which also loads its weights"
                )
            settings = check_settings(saved["settings"], str(path), given)
            return cls(folder, recipe, row, budget, settings, _read_changes(saved), imports)
        except (KeyError, TypeError, AttributeError):
            raise DataFileError(f"{path} is not the settings of a run") from None

    @property
    def title(self) -> str:
        """`report/table2#s0t2b`, or without the row where there is only one."""
        return self.recipe if self.row == "main" else f"{self.recipe}#{self.row}"

    def _repr_html_(self) -> str:
        """What was asked for and what came out, for notebooks."""
        settings, state = self.settings, "unfinished"
        summary: Json = {}
        try:
            if found := self.summary():
                summary, state = found, "finished"
        except DataFileError as error:
            state = str(error)
        accuracy, neuron = summary.get("test_accuracy"), settings.neuron
        rows = [
            ("folder", self.folder),
            ("state", f"{state}, {len(self.metrics())} of {settings.train.epochs} epochs"),
            ("budget", self.budget),
            ("model", " ".join(f"{key}={value}" for key, value in _named(settings.model).items())),
            ("neuron", "the model's own" if neuron is None else neuron.name),
            ("data", summary.get("data", {}).get("test", settings.data.name)),
            ("seed", settings.seed),
            *([] if accuracy is None else [("test accuracy", f"{accuracy:.2f} %")]),
            *(("changed", change) for change in self.changes_in_words()),
        ]
        return html_table(self.title, rows)

    def changes_in_words(self) -> list[str]:
        """Each change of the settings, as "after epoch 3: train.lr 0.01 instead of 0.1"."""
        return [
            f"after epoch {change['after_epoch']}: "
            + ", ".join(f"{key} {new} instead of {old}" for key, (old, new) in change["settings"].items())
            for change in self.changes
        ]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the best epoch on the validation part, while the run goes on."""
        return self.folder / "best.safetensors"

    def about_weights(self, dataset: Any) -> Json:
        """What a file of the run's weights says of them: the model, and for what data it was made."""
        about: Json = {
            "model": _named(self.settings.model),
            "made_for": {"in_channels": dataset.in_channels, "num_classes": len(dataset.classes)},
        }
        if self.settings.neuron is not None:
            about["neuron"] = _named(self.settings.neuron)
        return about

    def summary(self) -> Json | None:
        """What the finished run measured, or None while it is unfinished.

        Raises:
            DataFileError: the file is damaged.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        summary = read_json(path)
        if not isinstance(summary, dict) or not all(isinstance(summary.get(k), t) for k, t in _SUMMARY.items()):
            raise DataFileError(f"{path} is not the summary of a run: delete it, and continue the run to have it again")
        return summary

    def seconds(self) -> float:
        """What training took until the last checkpoint, as far as it is known."""
        path = self.folder / "seconds.json"
        with contextlib.suppress(DataFileError, TypeError, ValueError):
            return float(read_json(path))
        records = self.metrics()
        return float(records[-1].get("seconds") or 0.0) if records else 0.0

    def write_seconds(self, seconds: float) -> None:
        """Writes what training took until now: apart from the checkpoint, of which equal runs write equal bytes."""
        write_json(self.folder / "seconds.json", seconds)

    def metrics(self) -> list[Json]:
        """The records of the epochs so far; a last line cut short by a crash is left out."""
        records: list[Json] = []
        for record in read_metrics(self.folder):
            if record is None:
                break
            records.append(record)
        return records

    def keep_metrics(self, epochs: int) -> int:
        """Drops the records of epochs that a resumed run will do again.

        Returns:
            How many epochs have no record because the file was deleted.

        Raises:
            DataFileError: a record of an epoch that is done is damaged or missing.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return epochs
        records = list(itertools.takewhile(lambda record: record["epoch"] <= epochs, self.metrics()))
        first = records[0] if records else {"epoch": 1}
        whole = [record["epoch"] for record in records] == list(range(first["epoch"], epochs + 1)) and all(
            record.keys() >= _RECORD and _shape(record) == _shape(first) for record in records
        )
        if not whole:
            raise DataFileError(
                f"{path} is damaged: the records of the {epochs} epochs that are done are not whole; restore it from a "
                "copy, or delete it to continue without them"
            )
        with atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
        return first["epoch"] - 1

    def add_metrics(self, record: Json) -> None:
        """Appends one record."""
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(
                f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror or error}; "
                f"free some space and continue with: spikeloom train --resume {shlex.quote(str(self.folder))}"
            ) from None


def _named(settings: Named) -> Json:
    return {"name": settings.name, **settings.options}


def _read_changes(saved: Json) -> tuple[Json, ...]:
    found: list[Json] = []
    for change in saved.get("changes", ()):
        pairs = {key: [pair[0], pair[1]] for key, pair in change["settings"].items()}
        found.append({"after_epoch": change["after_epoch"], "settings": pairs})
    return tuple(found)


def read_metrics(folder: PathLike) -> list[Json | None]:
    """The records of a run's epochs, one a line; None for a line that is none."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [_record(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from None


def _record(line: bytes) -> Json | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("epoch"), int):
        return None
    return record if all(value is None or type(value) in (int, float) for value in record.values()) else None


def _shape(record: Json) -> dict[str, bool]:
    """What a record holds, and of which it has no value: the same for all epochs of a run."""
    return {key: value is None for key, value in record.items()}


def _is_leftover(path: Path) -> bool:
    """Whether a killed process may have left this file: its lock, or one that it had not written to the end."""
    return path.name == lock.NAME or (path.name.startswith(".") and path.suffix == ".tmp")
