"""Training in stages: T of the epochs, neurons that stand in for the network's, norms measured again between them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers.norm import measuring
from spikeloom.neurons import Neuron, make_factory
from spikeloom.train.settings import Named, TrainSettings

NORM_BATCHES = 20
"""Batches on which norms are measured again after a stage."""


class Stage(NamedTuple):
    """What the network is in an epoch.

    Attributes:
        T: how often it repeats an image.
        neuron: what stands in for its neurons; None leaves them.
    """

    T: int
    neuron: Named | None = None


def stage_of_epoch(settings: TrainSettings, T: int, epoch: int) -> Stage:
    """The stage in `train.steps` of an epoch, counted from 0; behind them the model's own T and neurons."""
    for stage in settings.steps:
        if epoch < stage.epochs:
            return Stage(stage.T, stage.neuron)
        epoch -= stage.epochs
    return Stage(T)


class NeuronPlaces:
    """The places of a model's neurons that fire, in which others can stand in for them.

    A neuron of several levels says at T = 1 what spikes need several steps for, and a network's weights serve both
    (SpikeYOLO, Luo et al. 2024, trains with integers for its spikes).
    """

    def __init__(self, model: nn.Module):
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, Neuron) and child.fires
        ]

    def put(self, neuron: Named | None) -> None:
        """Puts new neurons in these places, or the model's own back.

        Raises:
            UsageError: these or the model's have weights, which a change would lose.
        """
        own = [each for _, _, each in self._places]
        others = own
        if neuron is not None:
            make = make_factory(neuron.name, neuron.options)
            others = [make() for _ in own]
            for one in (*own, *others):
                if any(True for _ in one.parameters()):
                    raise UsageError(
                        f"train.steps: neurons of a stage and those they stand in for may have no weights, and "
                        f"{type(one).__name__} has"
                    )
        for (parent, name, _), other in zip(self._places, others, strict=True):
            setattr(parent, name, other.train(parent.training))


def check_stages(settings: TrainSettings, model: nn.Module, dataset: Any) -> None:
    """Refuses `train.steps` where there is no static image to show for T steps.

    Raises:
        UsageError: the data are sequences, the model's layers are made for one T, or its neurons cannot be replaced.
    """
    if not settings.steps:
        return
    if dataset.is_sequence or not hasattr(model, "T"):
        raise UsageError(f"train.steps needs images that the model repeats: {dataset.title} are sequences")
    T, last = model.T, settings.steps[-1]
    if sum(stage.epochs for stage in settings.steps) == settings.epochs:
        if last.T != T:
            raise UsageError(f"train.steps ends at T = {last.T}, but model.T, at which the run is evaluated, is {T}")
        if last.neuron is not None:
            raise UsageError(
                f"train.steps ends with {last.neuron.name}, which stands in for the network's own neurons: leave them "
                "the last epochs"
            )
    places = NeuronPlaces(model)
    for stage in settings.steps:
        places.put(stage.neuron)
        with showing(model, stage.T):
            try:
                with torch.no_grad():
                    model.eval()(dataset.encode(dataset.batch([0])[0]))
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UsageError(f"train.steps: this network is made for T = {T} alone: {reason}") from None
            finally:
                places.put(None)


@contextmanager
def showing(model: nn.Module, T: int) -> Generator[None]:
    """Inside the block the model repeats an image T times."""
    shown: Any = model
    before, shown.T = shown.T, T
    try:
        yield
    finally:
        shown.T = before


@torch.no_grad()
def measure_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of norms by their means over some batches; nothing else trains.

    Args:
        model: left in eval mode.
        batches: inputs as the model takes them.
    """
    model.eval()
    with measuring(model):
        for x in batches:
            model(x)
