"""What a run's settings name, built: data, network, devices; and where its random numbers come from."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from spikeloom.data import create_dataset
from spikeloom.data.options import OptionError
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.neurons import make_factory
from spikeloom.stream import Stream
from spikeloom.train.environments import environment_order
from spikeloom.train.settings import Settings

Json = dict[str, Any]


def build_model(settings: Settings, in_channels: int, num_classes: int) -> nn.Module:
    """The model of some settings, its weights drawn from the settings' seed."""
    seed_everything(settings.seed)
    return make_model(settings, in_channels, num_classes)


def make_model(settings: Settings, in_channels: int, num_classes: int) -> nn.Module:
    """The model of some settings, with weights that are to be replaced."""
    options: Json = {**settings.model.options, "in_channels": in_channels, "num_classes": num_classes}
    if settings.neuron is not None:
        options["neuron"] = make_factory(settings.neuron.name, settings.neuron.options)
    try:
        return create_model(settings.model.name, **options)
    except ValueError as error:
        name = f"model {settings.model.name}: "
        raise UsageError(f"{name}{str(error).removeprefix(name)}") from None


def build_datasets(settings: Settings, train: bool = True) -> tuple[Any, Any]:
    """The training part (None if not wanted) and the test part.

    Raises:
        UsageError: as `create_dataset`.
    """
    data = settings.data

    def part(split: str, key: str, options: Json) -> Any:
        try:
            return create_dataset(data.name, data.root, split, **options)
        except OptionError as error:
            if error.name != "subset":
                raise
            # It is the user's, or a budget's without the user's knowledge.
            limit = f"{error.limit} (yours, or the budget's): give another data.{key}"
            raise OptionError(f"data.{key}", limit) from None

    return (
        part("train", "subset", data.options) if train else None,
        part("test", "test_subset", {**data.options, "subset": data.test_subset}),
    )


def seed_everything(seed: int, step: int = 0, process: int = 0, purpose: int = 0) -> None:
    """Seeds torch, numpy and random from a run's seed, a step, a process, and what the numbers are for."""
    mixed = int(np.random.SeedSequence((seed, step, process, purpose)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def epoch_order(length: int, seed: int, epoch: int, environments: int = 1, batch: int = 1) -> Tensor:
    """The order of the images in an epoch; each `batch` holds equal shares of several environments."""
    shuffle = functools.partial(torch.randperm, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return shuffle(length) if environments == 1 else environment_order(length, environments, batch, shuffle)


def make_accelerator(precision: str) -> Accelerator:
    """The devices, processes and precision of a run; another precision than the last run's in this process is fine."""
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())


def try_input(model: nn.Module, dataset: Any, name: str, method: str) -> None:
    """Runs one sample through a model, so that what does not fit is an error before anything is written.

    Raises:
        UsageError: the model cannot take the data, or has neurons that cannot step with a method that steps.
    """
    x, _ = dataset.batch([0])
    try:
        with torch.no_grad():
            (model.eval() if method == "bptt" else Stream(model.eval()))(dataset.encode(x))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model {name} cannot take {dataset.title} of shape {tuple(x.shape[1:])}: {reason}") from None
