"""Where a run stands, and the file from which it continues."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from spikeloom.errors import DataFileError
from spikeloom.files import load_tensors, load_weights, save_tensors
from spikeloom.train.run import Run
from spikeloom.train.sharding import part_of, whole

Json = dict[str, Any]


@dataclass
class TrainState:
    """Where a run is, and what it has seen of the present epoch. Checkpoints hold it whole.

    Attributes:
        epoch: epochs behind it.
        step: optimiser steps of the present epoch behind it.
        loss, correct, seen, penalty, rate: sums over the epoch's images so far.
        best: the highest validation accuracy of an epoch so far, in percent.
        waited: epochs since that one.
        batch: images per optimiser step of all processes together; 0 before the first one.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    penalty: float = 0.0
    rate: float = 0.0
    best: float = -1.0
    waited: int = 0
    batch: int = 0

    def next_epoch(self) -> TrainState:
        """The state at the beginning of the next epoch."""
        return TrainState(epoch=self.epoch + 1, best=self.best, waited=self.waited, batch=self.batch)

    def in_batches_of(self, batch: int) -> TrainState:
        """The state where batches have another size from here on: as many images of the epoch are behind it."""
        return dataclasses.replace(self, step=self.step * (self.batch or batch) // batch, batch=batch)


def save_checkpoint(
    run: Run, model: nn.Module, ema: Any, optimizer: Any, state: TrainState, accelerator: Accelerator
) -> None:
    """Writes weights, averaged weights if there are any, optimiser and state to a run's checkpoint.

    All processes call it: what is shared out among them is put together, and the main one writes.
    """
    tensors, information = pack_optimizer(optimizer.state_dict())
    parts = {"model": model.state_dict(), "optimizer": tensors}
    if ema is not None:
        parts["ema"] = ema.module.state_dict()
    tensors = whole({f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()})
    if accelerator.is_main_process:
        save_tensors(run.checkpoint, tensors, {"position": dataclasses.asdict(state), "optimizer": information})


def load_checkpoint(run: Run, model: nn.Module, ema: Any) -> tuple[TrainState, Json]:
    """Gives model and averaged weights what a run's checkpoint holds, and returns its state and its optimiser's.

    Raises:
        DataFileError: the file is damaged, or of another model.
    """
    tensors, information = load_tensors(run.checkpoint)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "ema": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = tensor
    position = information.get("position")
    known = {field.name for field in dataclasses.fields(TrainState)}
    if len(parts) > 3 or not isinstance(position, dict) or not known >= position.keys():
        raise DataFileError(f"{run.checkpoint} is not the checkpoint of a run")
    load_weights(model, parts["model"], run.checkpoint, run.settings.model.name)
    if ema is not None:
        load_weights(ema.module, parts["ema"], run.checkpoint, run.settings.model.name)
    return TrainState(**position), unpack_optimizer(parts["optimizer"], information["optimizer"])


def load_optimizer(optimizer: Any, state: Json) -> None:
    """Gives an optimiser the state of `load_checkpoint`, or this process's part of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = part_of(value, parameters[index])
    # Momentum, weight decay and the like are those of the settings, which may have changed since; the learning rate is
    # the schedule's.
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def pack_optimizer(state: Json) -> tuple[dict[str, Tensor], Json]:
    """Splits an optimizer's `state_dict` into tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Json] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(tensors: dict[str, Tensor], information: Json) -> Json:
    """The inverse of `pack_optimizer`."""
    state: dict[int, Json] = {int(index): dict(values) for index, values in information["plain"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": information["groups"]}
