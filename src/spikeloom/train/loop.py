"""The training loop.

Everything random in a step is seeded by (seed, step, process), and the order of an epoch's images by (seed, epoch).
So a run that was killed continues from its last checkpoint bit for bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikeloom.data import augmentation, collate, create_dataset
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.neurons import NEURONS, make_neuron
from spikeloom.record import RateMeter
from spikeloom.surrogates import SURROGATES
from spikeloom.train.checkpoint import (
    load_tensors,
    load_weights,
    pack_optimizer,
    save_tensors,
    unpack_optimizer,
    write_json,
)
from spikeloom.train.losses import LOSSES
from spikeloom.train.methods import METHODS
from spikeloom.train.recipe import Named, Settings, TrainSettings
from spikeloom.train.run import Run, environment

Json = dict[str, Any]
_RATE_STEPS = 5  # steps after which silent and saturated layers are named
SILENT, SATURATED = 0.001, 0.95  # spikes per neuron and step


class Progress(Protocol):
    """Who is told how a run goes; `spikeloom.cli` shows it."""

    def start(self, run: Run, steps: int, done: int) -> None: ...
    def step(self, epoch: int, loss: float, accuracy: float) -> None: ...
    def epoch(self, record: Json) -> None: ...
    def warn(self, message: str) -> None: ...


@runtime_checkable
class Scheduled(Protocol):
    """A module that changes with the epochs, such as the mask of `MaskedPSN`."""

    def start_epoch(self, epoch: int, epochs: int) -> None: ...


class Interrupted(Exception):
    """The user stopped the run; its checkpoint is written."""


# --- what settings name -----------------------------------------------------------------------------------------------


def build_model(settings: Settings, in_channels: int, num_classes: int) -> nn.Module:
    """The model of some settings, its weights drawn from the settings' seed."""
    options = {**settings.model.options, "in_channels": in_channels, "num_classes": num_classes}
    if settings.neuron is not None:
        options["neuron"] = neuron_factory(settings.neuron)
    seed_everything(settings.seed)
    try:
        return create_model(settings.model.name, **options)
    except ValueError as error:
        raise UsageError(f"model {settings.model.name}: {error}") from None


def neuron_factory(named: Named) -> Callable[[], nn.Module]:
    """Makes the neurons that a recipe names; a wrong constant is an error now, not in the middle of a model."""
    options = named.options
    if "surrogate" in options:
        surrogate = Named.model_validate(options["surrogate"])
        try:
            options["surrogate"] = SURROGATES[surrogate.name](**surrogate.options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"neuron {named.name}: surrogate {surrogate.name}: {error}") from None
    factory = functools.partial(NEURONS[named.name], **options)
    try:
        make_neuron(factory, 1)
    except ValueError as error:
        raise UsageError(f"neuron {named.name}: {error}") from None
    return factory


def build_datasets(settings: Settings, train: bool = True) -> tuple[Any, Any]:
    """The training part (None if not wanted) and the test part."""
    data, options = settings.data, settings.data.options
    test_options: Json = {**options, "subset": data.test_subset}
    return (
        create_dataset(data.name, data.root, "train", **options) if train else None,
        create_dataset(data.name, data.root, "test", **test_options),
    )


def _optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, settings.lr, weight_decay=settings.weight_decay)


def _schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """A timm scheduler: the learning rate as a function of the step alone, so there is no state to save."""
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.multistep_lr import MultiStepLRScheduler

    total = settings.epochs * steps_per_epoch
    common: Json = {
        "warmup_t": min(round(settings.warmup_epochs * steps_per_epoch), total - 1),
        "warmup_lr_init": settings.lr / 100,
        "t_in_epochs": False,
    }
    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=total, **common)
    milestones = settings.milestones if settings.schedule == "step" else []
    # Without milestones the rate is constant: one lies behind the end.
    # timm counts the step that is about to end, hence the 1.
    decay = [round(m * steps_per_epoch) + 1 for m in milestones] or [total + 2]
    return MultiStepLRScheduler(optimizer, decay_t=decay, decay_rate=settings.gamma, **common)


def seed_everything(seed: int, step: int = 0, process: int = 0) -> None:
    """Seeds torch, numpy and random from a run's seed, a step and a process."""
    mixed = int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator)


def make_accelerator(precision: str) -> Accelerator:
    """The devices, processes and precision of a run; another precision than the last run's in this process is fine."""
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())


def _try_input(model: nn.Module, dataset: Any, name: str) -> None:
    # One item through the model before anything is written: a model and data that do not fit are a user's mistake.
    x, _ = dataset.__getitems__([0])
    try:
        with torch.no_grad():
            model.eval()(dataset.encode(x))
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model {name} cannot take {dataset.title} of shape {tuple(x.shape[1:])}: {reason}") from None


def _shared(values: list[float], accelerator: Accelerator) -> list[float]:
    """The sums of some numbers over all processes."""
    if accelerator.num_processes == 1:
        return values
    summed: Any = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return summed.tolist()


# --- training ---------------------------------------------------------------------------------------------------------


def train(run: Run, progress: Progress, stop: Callable[[], bool] = lambda: False) -> Json:
    """Trains a run from its beginning or its last checkpoint, and writes its summary.

    Args:
        run: where and what.
        progress: is told how it goes.
        stop: asked after every step; True writes a checkpoint and ends.

    Returns:
        The summary: accuracies in percent on the test part, times, and where the run lies.

    Raises:
        UsageError: settings that cannot be met, such as a batch larger than the data.
        Interrupted: `stop` said so.
    """
    settings, t = run.settings, run.settings.train
    accelerator = make_accelerator(t.precision)
    train_set, test_set = build_datasets(settings)
    batch = t.batch_size * t.accumulate * accelerator.num_processes
    if batch > len(train_set):
        raise UsageError(
            f"a batch of {batch} images (train.batch_size x train.accumulate x processes) is larger than "
            f"the {len(train_set)} training images of {train_set.title}: lower train.batch_size"
        )
    model = build_model(settings, train_set.in_channels, len(train_set.classes))
    augment = augmentation([{"name": a.name, **a.options} for a in t.augment])
    _try_input(model, train_set, settings.model.name)
    if accelerator.is_main_process:
        run.begin()
    accelerator.wait_for_everyone()
    parameters = sum(p.numel() for p in model.parameters())
    if t.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = _optimizer(t, model)
    steps_per_epoch = len(train_set) // batch
    schedule = _schedule(t, optimizer, steps_per_epoch)
    position: Json = {"epoch": 0, "step": 0, "loss": 0.0, "correct": 0, "seen": 0, "seconds": 0.0}
    if run.checkpoint.is_file():
        position = _load_checkpoint(run, model, optimizer)
    if accelerator.is_main_process:
        run.keep_metrics(position["epoch"])
    model, optimizer = accelerator.prepare(model, optimizer)
    method = functools.partial(METHODS[t.method.name], **t.method.options)
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    done = position["epoch"] * steps_per_epoch + position["step"]
    progress.start(run, t.epochs * steps_per_epoch, done)
    writer = _tensorboard(run, position["epoch"]) if accelerator.is_main_process else None
    # A run that continues within the first steps watches them too: a watched layer does not run as one fused op.
    meter = RateMeter(accelerator.unwrap_model(model)) if done < _RATE_STEPS else None
    last_checkpoint = started = time.monotonic()
    before = position["seconds"]

    def save() -> None:
        nonlocal last_checkpoint
        position["seconds"] = before + time.monotonic() - started
        if accelerator.is_main_process:
            _save_checkpoint(run, accelerator.unwrap_model(model), optimizer, position)
        last_checkpoint = time.monotonic()

    while position["epoch"] < t.epochs:
        model.train()
        epoch = position["epoch"]
        for module in accelerator.unwrap_model(model).modules():
            if isinstance(module, Scheduled):
                module.start_epoch(epoch, t.epochs)
        order = epoch_order(len(train_set), settings.seed, epoch)
        loader = _loader(train_set, order, batch, position["step"], accelerator)
        for x, y in loader:
            step = epoch * steps_per_epoch + position["step"]
            seed_everything(settings.seed, step + 1, accelerator.process_index)
            schedule.step_update(step)
            optimizer.zero_grad()
            with meter if meter is not None and step < _RATE_STEPS else contextlib.nullcontext():
                losses, correct = _step(model, x, y, t, method, loss, augment, train_set, accelerator)
            optimizer.step()
            position["step"] += 1
            total, correct, seen = _shared([losses * len(y), correct, len(y)], accelerator)
            position["loss"] += total
            position["correct"] += int(correct)
            position["seen"] += int(seen)
            if not np.isfinite(total):
                raise UsageError(
                    f"the loss is {total / seen} at epoch {epoch + 1}, step {position['step']}: lower train.lr; "
                    f"the last checkpoint of {run.folder} is from before"
                )
            if meter is not None and step == min(_RATE_STEPS, steps_per_epoch) - 1:
                _warn_of_rates(meter.rates(), progress)
            progress.step(epoch + 1, position["loss"] / position["seen"], 100 * position["correct"] / position["seen"])
            if any(_shared([stop()], accelerator)):
                save()
                raise Interrupted
            if time.monotonic() - last_checkpoint >= 60 * t.checkpoint_minutes:
                save()
        record = _end_of_epoch(model, test_set, t, loss, accelerator, position, optimizer)
        record["seconds"] = round(before + time.monotonic() - started, 3)
        position = {**dict.fromkeys(position, 0), "loss": 0.0, "epoch": epoch + 1, "seconds": record["seconds"]}
        if accelerator.is_main_process:
            run.add_metrics(record)
            _write_tensorboard(writer, record)
        save()
        progress.epoch(record)
    summary: Json = {}
    if accelerator.is_main_process:
        summary = _summarise(run, train_set, test_set, parameters)
        save_tensors(run.weights, accelerator.unwrap_model(model).state_dict(), {"model": settings.model.model_dump()})
        write_json(run.folder / "summary.json", summary)
        if writer is not None:
            writer.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    t: TrainSettings,
    method: Callable[..., Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    augment: Callable[[Tensor, Tensor], Tensor],
    dataset: Any,
    accelerator: Accelerator,
) -> tuple[float, int]:
    """Adds one step's gradients; returns the mean loss and the number of correct predictions of this process."""
    total, correct = 0.0, 0
    micro = list(zip(x.split(t.batch_size), y.split(t.batch_size), strict=True))
    for index, (x_part, y_part) in enumerate(micro):
        x_part, y_part = _place(augment(x_part, dataset.fill), t, dataset, accelerator), y_part.to(accelerator.device)
        value = 0.0

        def scaled(logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal value
            result = loss(logits, labels)
            value = result.detach()
            return result / len(micro)

        last = index == len(micro) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            logits = method(model, x_part, y_part, scaled)
        total += float(value) / len(micro)
        correct += int((logits.float().mean(0).argmax(1) == y_part).sum())
    return total, correct


def _place(x: Tensor, t: TrainSettings, dataset: Any, accelerator: Accelerator) -> Tensor:
    x = dataset.encode(x.to(accelerator.device))
    images = x.dim() == 4 and not dataset.is_sequence
    return x.contiguous(memory_format=torch.channels_last) if t.channels_last and images else x


def _loader(dataset: Any, order: Tensor, batch: int, skip: int, accelerator: Accelerator) -> DataLoader[Any]:
    """This process's part of every whole batch from the `skip`-th on."""
    part = batch // accelerator.num_processes
    batches = [
        order[start + accelerator.process_index * part :][:part].tolist()
        for start in range(skip * batch, len(order) - batch + 1, batch)
    ]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    t: TrainSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    tick: Callable[[int], None] = lambda _: None,
) -> Json:
    """Mean loss and accuracy (percent) over a data set, every image once, shared by all processes."""
    model.eval()
    mine = torch.arange(accelerator.process_index, len(dataset), accelerator.num_processes)
    batches = [b.tolist() for b in mine.split(t.batch_size)]
    totals = torch.zeros(3, dtype=torch.float64)
    for x, y in DataLoader(dataset, batch_sampler=batches, collate_fn=collate):
        y = y.to(accelerator.device)
        logits = model(_place(x, t, dataset, accelerator)).float()
        correct = (logits.mean(0).argmax(1) == y).sum()
        totals += torch.tensor([float(loss(logits, y)) * len(y), float(correct), len(y)], dtype=torch.float64)
        tick(len(y))
    total, correct, count = _shared(totals.tolist(), accelerator)
    return {"test_loss": total / count, "test_accuracy": 100 * correct / count}


def _end_of_epoch(
    model: nn.Module,
    test_set: Any,
    t: TrainSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    position: Json,
    optimizer: Any,
) -> Json:
    return {
        "epoch": position["epoch"] + 1,
        "train_loss": position["loss"] / position["seen"],
        "train_accuracy": 100 * position["correct"] / position["seen"],
        **evaluate(model, test_set, t, loss, accelerator),
        "lr": optimizer.param_groups[0]["lr"],
    }


def _warn_of_rates(rates: dict[str, float], progress: Progress) -> None:
    for name, rate in rates.items():
        if rate < SILENT:
            state, remedy = "nearly silent", "raise the weight of its norm or lower v_threshold"
        elif rate > SATURATED:
            state, remedy = "saturated", "lower the weight of its norm or raise v_threshold"
        else:
            continue
        progress.warn(f"layer {name} is {state} after the first batches, rate {100 * rate:.2f} %: {remedy}")


# --- on disk ----------------------------------------------------------------------------------------------------------


def _save_checkpoint(run: Run, model: nn.Module, optimizer: Any, position: Json) -> None:
    tensors, information = pack_optimizer(optimizer.state_dict())
    save_tensors(
        run.checkpoint,
        {f"model.{k}": v for k, v in model.state_dict().items()} | {f"optimizer.{k}": v for k, v in tensors.items()},
        {"position": position, "optimizer": information},
    )


def _load_checkpoint(run: Run, model: nn.Module, optimizer: Any) -> Json:
    tensors, information = load_tensors(run.checkpoint)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    load_weights(model, parts["model"], run.checkpoint, run.settings.model.name)
    optimizer.load_state_dict(unpack_optimizer(parts["optimizer"], information["optimizer"]))
    return information["position"]


def _summarise(run: Run, train_set: Any, test_set: Any, parameters: int) -> Json:
    records = run.metrics()
    best = max(records, key=lambda r: r["test_accuracy"])
    return {
        "recipe": run.recipe, "row": run.row, "budget": run.budget, "seed": run.settings.seed,
        "model": run.settings.model.name, "parameters": parameters,
        "data": {"train": train_set.title, "test": test_set.title},
        "test_accuracy": records[-1]["test_accuracy"], "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"], "epochs": len(records), "seconds": records[-1]["seconds"],
        "environment": environment(),
    }  # fmt: skip


def _tensorboard(run: Run, epochs_done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote beyond its checkpoint.
    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=epochs_done + 1)


def _write_tensorboard(writer: Any, record: Json) -> None:
    for key, value in record.items():
        if key != "epoch":
            writer.add_scalar(key.replace("_", "/", 1), value, record["epoch"])
    writer.flush()
