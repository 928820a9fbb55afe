"""What is to be measured: a finished run or a model by name, with data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.calibrate import calibrated
from spikeloom.data import batches as whole_batches
from spikeloom.encode import Frames
from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.models import MODELS
from spikeloom.models.trained_weights import run_folder
from spikeloom.registry import nearest
from spikeloom.train.build import build_datasets, build_model
from spikeloom.train.evaluate import load_run
from spikeloom.train.recipe import check_settings, merge
from spikeloom.train.run import Run

Json = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A network and the data to run through it.

    Attributes:
        title: of the network.
        trained: whether it is a run's.
        data: what the data are.
        classes: their names, in the order of the labels.
        model: with its weights.
        batches: makes the batches anew, each inputs and labels.
        images: how many they hold.
        sequence: whether the inputs are [T, N, ...]; otherwise they are [N, ...].
        input_shape: of one image, or of one step of a sequence, as `count_cost` takes it.
        labelled: whether the labels mean something; those of random inputs are all 0.
    """

    title: str
    trained: bool
    data: str
    classes: tuple[str, ...]
    model: nn.Module
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    images: int
    sequence: bool
    input_shape: tuple[int, ...]
    labelled: bool = True

    def ready(self, x: Tensor) -> nn.Module:
        """The network in eval mode; norms that were never trained take the statistics of x."""
        return self.model.eval() if self.trained else calibrated(self.model, x)


def open_target(name: PathLike, values: Json) -> Target:
    """A run by its folder, or a model by its name, with test data.

    Args:
        name: a run's folder, `weights:NAME` for a trained network of the package, or a name in `MODELS`.
        values: `images` (of the test data, 1000) and `batch` (32); `data.*`; for a model also `model.*`, `neuron`,
            `seed`, and `input`, the shape of one random input such as 3x32x32 (of a network for events: of a frame), if
            no `data` is named.

    Raises:
        UsageError: no such run or model, a wrong key or value, or data that are not there.
    """
    name = os.fspath(name)
    folder = run_folder(name)
    is_run = folder.is_dir() or "/" in name
    known = ("data", "images", "batch") if is_run else ("data", "images", "batch", "model", "neuron", "seed", "input")
    for key in values:
        if is_run and key == "input":
            raise UsageError(f"{name} is a run, whose inputs have the shape of its data: leave the input's shape out")
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
    images, batch = _count(values, "images", 1000), _count(values, "batch", 32)
    if is_run:
        run = Run.open(folder)
        settings = check_settings(merge(run.settings.model_dump(), {"data": values.get("data", {})}), name)
        _, dataset = build_datasets(settings, train=False)
        model = load_run(run, dataset.in_channels, len(dataset.classes))
        return _on_data(f"{run.title} ({run.budget})", True, model, dataset, images, batch)
    if name not in MODELS:
        raise UsageError(f"{name!r} is neither a run's folder nor a model; {nearest(name, MODELS)}")
    model_values = values.get("model", {})
    if not isinstance(model_values, dict):
        raise UsageError(f"the model is {name}: give its options as model.KEY=VALUE, got model={model_values!r}")
    parts: Json = {
        "seed": values.get("seed", 1),
        "data": values.get("data", "digits"),
        "neuron": values.get("neuron"),
        "model": {**model_values, "name": name},
        "train": {"epochs": 1, "batch_size": 1, "lr": 1.0},
    }
    settings = check_settings(parts, name)
    if "data" in values:
        if "input" in values:
            raise UsageError("input= is the shape of random inputs: leave it out, or leave out data=")
        _, dataset = build_datasets(settings, train=False)
        model = build_model(settings, dataset.in_channels, len(dataset.classes))
        return _on_data(f"{name}, untrained", False, model, dataset, images, batch)
    shape = _shape(values.get("input", "3x32x32"))
    classes = settings.model.options.get("num_classes")
    if classes is None:  # as many as its paper's data have
        classes = inspect.signature(MODELS[name]).parameters["num_classes"].default
    model = build_model(settings, shape[0], classes)
    count = min(images, 64) if "images" not in values else images
    generator = torch.Generator().manual_seed(settings.seed)
    # A network for sequences is given as many frames as its paper has.
    steps = (int(model.T),) if isinstance(model.T, Frames) else ()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, batch):
            size = min(batch, count - start)
            yield torch.rand(*steps, size, *shape, generator=generator), torch.zeros(size, dtype=torch.int64)

    names = tuple(map(str, range(classes)))
    data = f"random inputs {'x'.join(map(str, (*steps, *shape)))}"
    return Target(f"{name}, untrained", False, data, names, model, batches, count, bool(steps), shape, labelled=False)


def open_targets(
    names: Iterable[str], data: Json | None, images: int, model: Json | None = None, batch: int | None = None
) -> Iterator[Target]:
    """Several networks on the same data, one after the other.

    Args:
        names: as of `open_target`.
        data: a data set with its options; None for a run's own.
        images: of the test data.
        model: options of all named models.
        batch: images at a time; all at once without it.
    """
    for name in names:
        values: Json = {"images": images, "batch": batch or images}
        values |= {key: part for key, part in (("data", data), ("model", model)) if part is not None}
        yield open_target(name, values)


def _on_data(title: str, trained: bool, model: nn.Module, dataset: Any, images: int, batch: int) -> Target:
    count = min(images, len(dataset))
    order = [indices.tolist() for indices in torch.arange(count).split(batch)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in whole_batches(dataset, order):
            yield dataset.encode(x), y

    return Target(
        title,
        trained,
        f"{count} of {dataset.title}",
        tuple(dataset.classes),
        model,
        batches,
        count,
        dataset.is_sequence,
        tuple(dataset.input_shape),
    )


def _count(values: Json, key: str, default: int) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{key} must be a whole number from 1, got {value!r}")
    return value


def _shape(text: Any) -> tuple[int, ...]:
    parts = str(text).split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"input must be a shape such as 3x32x32, got {text!r}")
    return tuple(map(int, parts))
