"""Evaluating a model on a data set, and a finished run."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from spikeloom.checks import all_finite
from spikeloom.data import batches
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, load_tensors, load_weights
from spikeloom.record import RateMeter
from spikeloom.train.build import build_datasets, build_model, make_accelerator, make_model
from spikeloom.train.losses import LOSSES
from spikeloom.train.pretrain import Reconstructs
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings, TrainSettings

Json = dict[str, Any]
MANY_CLASSES = 100  # from which on the five likeliest classes are counted as well


def right(logits: Tensor, y: Tensor) -> int:
    """Right predictions; 0 of a model that does not classify, whose output has other axes than [T, N, classes]."""
    return int((logits.float().mean(0).argmax(1) == y).sum()) if logits.dim() == 3 else 0


def among_five(logits: Tensor, y: Tensor) -> int:
    """Labels among the five classes with the highest means over time; 0 as `right`."""
    return int((logits.float().mean(0).topk(5).indices == y[:, None]).sum()) if logits.dim() == 3 else 0


def accuracy(model: torch.nn.Module, correct: float, count: float) -> float | None:
    """In percent; None of a model that does not classify."""
    return None if isinstance(getattr(model, "module", model), Reconstructs) else 100 * correct / count


def place(x: Tensor, t: TrainSettings, dataset: Any, accelerator: Accelerator) -> Tensor:
    """A batch as the model takes it, on the device, images in channels-last memory.

    Raises:
        UsageError: it holds NaN or infinite numbers, at which no neuron fires and no loss grows.
    """
    x = dataset.encode(x.to(accelerator.device))
    if x.is_cpu and not all_finite(x):
        raise UsageError(f"{dataset.title}: inputs of a batch hold NaN or infinite numbers")
    images = x.dim() == 4 and not dataset.is_sequence
    return x.contiguous(memory_format=torch.channels_last) if t.channels_last and images else x


def check_labels(y: Tensor, dataset: Any) -> None:
    """Refuses labels beyond the classes, of which a loss would say an index alone.

    Raises:
        UsageError: there is one.
    """
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= len(dataset.classes):
        wrong, last = (low if low < 0 else high), len(dataset.classes) - 1
        raise UsageError(f"{dataset.title}: a sample has the label {wrong}, its classes are 0 to {last}")


def shared(values: list[float], accelerator: Accelerator) -> list[float]:
    """The sums of some numbers over all processes."""
    if accelerator.num_processes == 1:
        return values
    summed: Any = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return summed.tolist()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    dataset: Any,
    t: TrainSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    tick: Callable[[int], None] = lambda _: None,
    part: str = "test",
    flips: bool = False,
    meter: RateMeter | None = None,
) -> Json:
    """Mean loss and accuracy (percent; None without classes) over a data set, every image once, by all processes.

    Args:
        model: is left in eval mode.
        dataset: labelled samples.
        t: batch size and memory format.
        loss: of logits and labels.
        accelerator: devices and processes.
        tick: is told how many samples are done.
        part: what the keys begin with.
        flips: also the accuracy of the mean logits of each image and its mirror image, as `<part>_accuracy_flips`.
        meter: counts the spikes of each batch as it is, not those of mirror images.

    Returns:
        `<part>_loss`, `<part>_accuracy`, and `<part>_top5` of 100 classes or more.
    """
    model.eval()
    mine = torch.arange(accelerator.process_index, len(dataset), accelerator.num_processes)
    parts = [part.tolist() for part in mine.split(t.batch_size)]
    totals = torch.zeros(5, dtype=torch.float64)
    many = len(dataset.classes) >= MANY_CLASSES
    for x, y in batches(dataset, parts):
        check_labels(y, dataset)
        y = y.to(accelerator.device)
        with meter or contextlib.nullcontext():
            logits = model(place(x, t, dataset, accelerator)).float()
        sums = [float(loss(logits, y)) * len(y), right(logits, y), among_five(logits, y) if many else 0, 0, len(y)]
        if flips:
            sums[3] = right(logits + model(place(x.flip(-1), t, dataset, accelerator)).float(), y)
        totals += torch.tensor(sums, dtype=torch.float64)
        tick(len(y))
    total, correct, five, both, count = shared(totals.tolist(), accelerator)
    found: Json = {f"{part}_loss": total / count, f"{part}_accuracy": accuracy(model, correct, count)}
    if many:
        found[f"{part}_top5"] = accuracy(model, five, count)
    if flips:
        found[f"{part}_accuracy_flips"] = accuracy(model, both, count)
    return found


def load_run(run: Run, in_channels: int, num_classes: int) -> torch.nn.Module:
    """The model of a finished run with its trained weights.

    Raises:
        DataFileError: the run is unfinished, or its weights are damaged or of another model.
    """
    tensors, _ = _trained(run)
    model = build_model(run.settings, in_channels, num_classes)
    load_weights(model, tensors, run.weights, run.settings.model.name)
    return model


def load(folder: str | os.PathLike[str]) -> torch.nn.Module:
    """The trained model of a finished run, in eval mode and on the CPU. Its data are not needed.

        model = spikeloom.load("runs/quickstart-digits-20250101-120000")
        logits = model(x)  # [T, N, classes]

    Args:
        folder: of the run; or `weights:NAME`, a trained network that comes with the package.

    Raises:
        DataFileError: the folder is no run, the run is unfinished, or its weights are damaged or of another model.
        UsageError: an older run, whose data decide the model's size, and they are not there.
    """
    path = Path(folder)
    if path.is_file():
        raise DataFileError(f"{path} is a file: give a run's folder; an engine's file is read by spikeloom.deploy.load")
    return load_trained(Run.open(path))[0]


def load_trained(run: Run) -> tuple[torch.nn.Module, int]:
    """The trained model of a finished run as `load` gives it, and how many classes it tells apart.

    Raises:
        DataFileError, UsageError: as `load`.
    """
    tensors, information = _trained(run)
    made = information.get("made_for")
    if made is None:
        _, dataset = build_datasets(run.settings, train=False)
        made = {"in_channels": dataset.in_channels, "num_classes": len(dataset.classes)}
    with torch.random.fork_rng(devices=[]):  # the weights are replaced: the caller's random numbers stay as they are
        model = make_model(run.settings, **made)
    load_weights(model, tensors, run.weights, run.settings.model.name)
    return model.eval(), int(made["num_classes"])


@dataclass(frozen=True)
class Classifier:
    """A finished run of a network that classifies.

    Attributes:
        run: itself.
        summary: of the run.
        model: with its trained weights, in eval mode.
        num_classes: how many it tells apart.
    """

    run: Run
    summary: Json
    model: torch.nn.Module
    num_classes: int


def load_classifier(run: PathLike) -> Classifier:
    """A finished run of a network that classifies, by its folder or as `weights:NAME`.

    Raises:
        UsageError: the run is unfinished, damaged, or does not classify.
    """
    opened = Run.open(run)
    summary = opened.summary()
    if summary is None or summary["test_accuracy"] is None:
        raise UsageError(f"{run} is not a finished run of a network that classifies")
    return Classifier(opened, summary, *load_trained(opened))


def _trained(run: Run) -> tuple[dict[str, Tensor], Json]:
    """The weights of a finished run, and what is known of them."""
    if not run.weights.is_file():
        raise DataFileError(
            f"{run.folder} is not finished; continue it with: spikeloom train --resume {shlex.quote(str(run.folder))}"
        )
    return load_tensors(run.weights)


def evaluate_run(run: Run, settings: Settings, progress: Any, flips: bool = False) -> Json:
    """Accuracy (percent), loss and firing rates of a run on the test part that `settings` name.

    Raises:
        UsageError: `flips` of data that are no images.
    """
    _, dataset = build_datasets(settings, train=False)
    if flips and dataset.is_sequence:
        raise UsageError(f"only images can be mirrored, and {dataset.title} are sequences: leave out --flips")
    model = load_run(run, dataset.in_channels, len(dataset.classes))
    t = settings.train
    accelerator = make_accelerator(t.precision)
    if t.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = accelerator.prepare(model)
    progress.work("evaluating", len(dataset))
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    meter = RateMeter(accelerator.unwrap_model(model))
    result = evaluate(model, dataset, t, loss, accelerator, progress.advance, flips=flips, meter=meter)
    return {"run": str(run.folder), "data": dataset.title, **result, "rates": meter.rates()}
