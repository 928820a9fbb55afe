"""The loop of `spikeloom train` from Python: a recipe, or a model and data sets that were made there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from spikeloom.data.given import given
from spikeloom.data.subset import hold_out
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, load_tensors, load_weights
from spikeloom.memory import keep_memory
from spikeloom.train.loop import train
from spikeloom.train.recipe import check_settings, load_row, parse_overrides, take_budget
from spikeloom.train.run import GIVEN, Run
from spikeloom.train.settings import Settings
from spikeloom.train.setup import Made

Json = dict[str, Any]


class Lines:
    """A `Progress` that prints a line for each epoch, and what there is to say."""

    def start(self, run: Run, steps: int, done: int) -> None:
        pass

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        pass

    def epoch(self, record: Json) -> None:
        """Prints losses and accuracies."""
        found = [
            f"{part} loss {record[f'{part}_loss']:.4f}"
            + ("" if record[f"{part}_accuracy"] is None else f" accuracy {record[f'{part}_accuracy']:.2f} %")
            for part in ("train", "validation", "test")
            if f"{part}_loss" in record
        ]
        print(f"epoch {record['epoch']}: {', '.join(found)}, {record['seconds']:.0f} s", flush=True)

    def note(self, message: str) -> None:
        """Prints it."""
        print(message, flush=True)

    warn = note


def train_recipe(name: str, *words: str, out: PathLike, progress: Any = None) -> Json:
    """Trains a row of a recipe as `spikeloom train` does, and leaves a run folder.

        train_recipe("quickstart/digits", "train.epochs=4", "model.T=2", out="runs/digits")

    Called again with the same arguments, a run that was stopped goes on from its last checkpoint, and of a finished one
    the summary is given back.

    Args:
        name: of the recipe, `recipe#row` of one with several rows, or the path of a TOML file.
        words: settings as on the command line, `key=value` each; `budget=smoke` is one.
        out: the run's folder, which `spikeloom.load` and every command take.
        progress: as `fit`.

    Returns:
        The summary, as in summary.json.

    Raises:
        UsageError: no such recipe, row or setting, data that are not there, or a folder that holds another run.
    """
    recipe, row = load_row(name, "and train it alone")
    values = parse_overrides(list(words))
    budget = take_budget(values) or recipe.budget
    run = _run(Path(out), recipe.name, row, budget, recipe.resolve(row, budget, values), values)
    keep_memory()
    return run.summary() or train(run, progress or Lines())


def fit(
    model: nn.Module,
    train_set: Dataset[Any],
    test_set: Dataset[Any],
    *,
    out: PathLike,
    seed: int = 1,
    validation: float = 0.0,
    sequences: bool = False,
    classes: Sequence[str] | int | None = None,
    epoch_samples: int | None = None,
    callbacks: Iterable[Callable[[Json], object]] = (),
    progress: Any = None,
    **settings: Any,
) -> Json:
    """Trains a model by the loop of `spikeloom train`, and leaves a run folder and the trained weights in the model.

        fit(model, train_set, test_set, out="runs/mine", epochs=10, batch_size=64, optimizer="adam", lr=1e-3)

    Called again with the same arguments, a run that was stopped goes on from its last checkpoint, bit for bit; of a
    finished run its weights and summary are given back.

    Args:
        model: gives logits [T, N, classes].
        train_set: map-style or iterable, of pairs (x, y): x float, an image [C, H, W] or a sequence [T, ...], y the
            index of a class; or a data set of `spikeloom.data`.
        test_set: the same; an iterable one is read once and kept in memory.
        out: the run's folder.
        seed: of the order of samples, augmentation and dropout. The model's weights are as they come.
        validation: share of the training part held out, whose best epoch gives the weights.
        sequences: samples are sequences, which the model takes as [T, N, ...].
        classes: their names, or how many; without them the data set's own.
        epoch_samples: how many samples of an iterable train set make an epoch.
        callbacks: called with the record of each epoch; True ends the run after it.
        progress: is told how it goes, a `spikeloom.train.setup.Progress`; None prints a line an epoch.
        settings: keys of `train.` in a recipe, such as epochs, batch_size, optimizer, lr, loss.

    Returns:
        The summary, as in summary.json.

    Raises:
        UsageError: settings or data that cannot be used, or a folder that holds another run.
    """
    named: Json = {"name": GIVEN, "class": f"{type(model).__module__}.{type(model).__qualname__}"}
    values: Json = {"seed": seed, "data": {"name": GIVEN, "validation": validation}, "model": named, "train": settings}
    checked = check_settings(values, "fit", given=True)
    made = _made(model, train_set, test_set, sequences, classes, epoch_samples, validation)
    run = _run(Path(out), GIVEN, "main", "full", checked, values)
    keep_memory()
    summary = run.summary()
    if summary is None:
        summary = train(run, progress or Lines(), made=made, callbacks=tuple(callbacks))
    tensors, _ = load_tensors(run.weights)
    load_weights(model, tensors, run.weights, type(model).__name__)
    return summary


def _made(
    model: nn.Module,
    train_set: Any,
    test_set: Any,
    sequences: bool,
    classes: Sequence[str] | int | None,
    samples: int | None,
    validation: float,
) -> Made:
    part = given(train_set, "train", sequences, classes, samples)
    test = given(test_set, "test", sequences, list(part.classes))
    if part.input_shape != test.input_shape and not sequences:
        raise UsageError(f"the train set has inputs of shape {part.input_shape}, the test set {test.input_shape}")
    held = None
    if validation:
        part, held = hold_out(part, validation)
    return Made(part, held, test, model)


def _run(folder: Path, recipe: str, row: str, budget: str, settings: Settings, asked: Json) -> Run:
    """The run in a folder, or a new one."""
    if not (folder / "settings.json").is_file():
        return Run.plan(folder, recipe, row, budget, settings, asked)
    run = Run.open(folder, given=recipe == GIVEN)
    if (run.recipe, run.row, run.settings) != (recipe, row, settings):
        raise UsageError(f"{folder} holds a run with other settings: choose another folder with out=")
    return run
