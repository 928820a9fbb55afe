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
from spikeloom.stream import Stream
from spikeloom.surrogates import SURROGATES
from spikeloom.train.checkpoint import (
    load_tensors,
    load_weights,
    pack_optimizer,
    save_tensors,
    unpack_optimizer,
    write_json,
)
from spikeloom.train.environments import PENALTIES, Penalised, environment_order, select_epoch, train_accuracies
from spikeloom.train.losses import LOSSES
from spikeloom.train.methods import METHODS
from spikeloom.train.pretrain import Reconstructs, start_from, write_pictures
from spikeloom.train.recipe import Named, Settings, TrainSettings
from spikeloom.train.run import Run, environment, peak_memory

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
    parameters: Any = list(model.parameters())
    if not settings.decay_all:
        parameters = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
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
        "warmup_lr_init": settings.lr / 100 if settings.warmup_lr is None else settings.warmup_lr,
        "t_in_epochs": False,
    }
    if settings.schedule == "cosine":
        falling = max(total - round(settings.cooldown_epochs * steps_per_epoch), 1)
        return CosineLRScheduler(optimizer, t_initial=falling, lr_min=settings.min_lr, **common)
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


def epoch_order(length: int, seed: int, epoch: int, environments: int = 1, batch: int = 1) -> Tensor:
    """The order of the images in an epoch; each `batch` holds equal shares of several environments."""
    shuffle = functools.partial(torch.randperm, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return shuffle(length) if environments == 1 else environment_order(length, environments, batch, shuffle)


def make_accelerator(precision: str) -> Accelerator:
    """The devices, processes and precision of a run; another precision than the last run's in this process is fine."""
    AcceleratorState._reset_state()  # pyright: ignore[reportPrivateUsage]
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())


def _try_input(model: nn.Module, dataset: Any, name: str, method: str) -> None:
    # One item through the model before anything is written: a model and data that do not fit are a user's mistake.
    # So is a neuron that needs the whole sequence with a method that steps.
    x, _ = dataset.__getitems__([0])
    try:
        with torch.no_grad():
            (model.eval() if method == "bptt" else Stream(model.eval()))(dataset.encode(x))
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
    environments = getattr(train_set, "environments", 1)
    order = functools.partial(epoch_order, len(train_set), settings.seed, environments=environments, batch=t.batch_size)
    model = build_model(settings, train_set.in_channels, len(train_set.classes))
    rest = start_from(model, t.start_from) if t.start_from is not None else None
    augment = augmentation(
        [{"name": a.name, **a.options} for a in t.augment],
        getattr(train_set, "mean", ()),
        getattr(train_set, "std", ()),
    )
    _try_input(model, train_set, settings.model.name, t.method.name)
    if accelerator.is_main_process:
        run.begin()
    if rest:
        progress.warn(f"drawn anew, because {t.start_from} has no such weights: {', '.join(rest)}")
    accelerator.wait_for_everyone()
    parameters = sum(p.numel() for p in model.parameters())
    if t.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = _optimizer(t, model)
    steps_per_epoch = len(order(0)) // batch
    schedule = _schedule(t, optimizer, steps_per_epoch)
    position: Json = {"epoch": 0, "step": 0, "loss": 0.0, "correct": 0, "seen": 0, "penalty": 0.0, "seconds": 0.0}
    if run.checkpoint.is_file():
        position |= _load_checkpoint(run, model, optimizer)
    if accelerator.is_main_process:
        run.keep_metrics(position["epoch"])
    model, optimizer = accelerator.prepare(model, optimizer)
    method = functools.partial(METHODS[t.method.name], **t.method.options)
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    penalised = _penalised(t, accelerator.unwrap_model(model), loss, environments, train_set.title)
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
        if penalised is not None and t.penalty is not None:
            penalised.weight = t.penalty.weight * epoch / t.epochs
        for module in accelerator.unwrap_model(model).modules():
            if isinstance(module, Scheduled):
                module.start_epoch(epoch, t.epochs)
        loader = _loader(train_set, order(epoch), batch, position["step"], accelerator)
        for x, y in loader:
            step = epoch * steps_per_epoch + position["step"]
            seed_everything(settings.seed, step + 1, accelerator.process_index)
            schedule.step_update(step)
            optimizer.zero_grad()
            metered = meter if meter is not None and step < _RATE_STEPS else contextlib.nullcontext()
            mix = mixing(t, len(train_set.classes), epoch)
            with metered, penalised or contextlib.nullcontext():
                losses, correct = _step(model, x, y, t, method, penalised or loss, augment, mix, train_set, accelerator)
            optimizer.step()
            position["step"] += 1
            penalty = 0.0 if penalised is None else penalised.take() * len(y)
            total, correct, seen, penalty = _shared([losses * len(y), correct, len(y), penalty], accelerator)
            position["loss"] += total
            position["correct"] += int(correct)
            position["seen"] += int(seen)
            position["penalty"] += penalty
            if not np.isfinite(total):
                raise UsageError(
                    f"the loss is {total / seen} at epoch {epoch + 1}, step {position['step']}: lower train.lr; "
                    f"the last checkpoint of {run.folder} is from before"
                )
            if meter is not None and step == min(_RATE_STEPS, steps_per_epoch) - 1:
                _warn_of_rates(meter.rates(), progress)
            accuracy = _accuracy(model, position["correct"], position["seen"])
            progress.step(
                epoch + 1, position["loss"] / position["seen"], float("nan") if accuracy is None else accuracy
            )
            if any(_shared([stop()], accelerator)):
                save()
                raise Interrupted
            if time.monotonic() - last_checkpoint >= 60 * t.checkpoint_minutes:
                save()
        record = _end_of_epoch(model, train_set, test_set, t, loss, accelerator, position, optimizer)
        record["seconds"] = round(before + time.monotonic() - started, 3)
        position = {
            **dict.fromkeys(position, 0),
            "loss": 0.0,
            "penalty": 0.0,
            "epoch": epoch + 1,
            "seconds": record["seconds"],
        }
        if accelerator.is_main_process:
            run.add_metrics(record)
            _write_tensorboard(writer, record)
        save()
        progress.epoch(record)
    summary: Json = {}
    if accelerator.is_main_process:
        summary = _summarise(run, train_set, test_set, parameters)
        if summary["test_accuracy"] is None:
            write_pictures(accelerator.unwrap_model(model), test_set, run.folder / "pictures.png")
        save_tensors(run.weights, accelerator.unwrap_model(model).state_dict(), {"model": settings.model.model_dump()})
        write_json(run.folder / "summary.json", summary)
        if writer is not None:
            writer.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary


def _penalised(t: TrainSettings, model: nn.Module, loss: Any, environments: int, title: str) -> Penalised | None:
    if t.penalty is None:
        return None
    if environments == 1:
        raise UsageError(f"train.penalty {t.penalty.name} needs data with environments, not {title}: colored_mnist")
    return Penalised(model, loss, functools.partial(PENALTIES[t.penalty.name], **t.penalty.options), environments)


def _step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    t: TrainSettings,
    method: Callable[..., Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    augment: Callable[[Tensor, Tensor], Tensor],
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    dataset: Any,
    accelerator: Accelerator,
) -> tuple[float, int]:
    """Adds one step's gradients; returns the mean loss and the number of correct predictions of this process."""
    total, correct = 0.0, 0
    micro = list(zip(x.split(t.batch_size), y.split(t.batch_size), strict=True))
    for index, (x_part, y_part) in enumerate(micro):
        x_part, mixed = mix(augment(x_part, dataset.fill), y_part)
        x_part, mixed, y_part = (
            _place(x_part, t, dataset, accelerator), mixed.to(accelerator.device), y_part.to(accelerator.device),
        )  # fmt: skip
        values: list[Tensor] = []  # several of a method that gives the loss one step at a time

        def scaled(logits: Tensor, labels: Tensor, values: list[Tensor] = values) -> Tensor:
            result = loss(logits, labels)
            values.append(result.detach())
            return result / len(micro)

        last = index == len(micro) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            logits = method(model, x_part, mixed, scaled)
        total += float(torch.stack(values).mean()) / len(micro)
        correct += _correct(logits, y_part)
    return total, correct


def _correct(logits: Tensor, y: Tensor) -> int:
    """Right predictions; 0 of a model that does not classify, whose output has other axes than [T, N, classes]."""
    return int((logits.float().mean(0).argmax(1) == y).sum()) if logits.dim() == 3 else 0


def mixing(t: TrainSettings, classes: int, epoch: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How the batches of an epoch are mixed: from images and labels [N] to images and weights of classes [N, classes].

    Raises:
        UsageError: micro-batches of an odd size, of which one image has no partner.
    """
    if t.mix is None or (t.mix.until is not None and epoch >= t.mix.until):
        return lambda x, y: (x, y)
    if t.batch_size % 2:
        raise UsageError(f"train.mix needs an even train.batch_size, got {t.batch_size}")
    from timm.data.mixup import Mixup

    return Mixup(
        t.mix.mixup, t.mix.cutmix, prob=t.mix.p, switch_prob=t.mix.switch, label_smoothing=0.0, num_classes=classes
    )


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
    """Mean loss and accuracy (percent; None without classes) over a data set, every image once, by all processes."""
    model.eval()
    mine = torch.arange(accelerator.process_index, len(dataset), accelerator.num_processes)
    batches = [b.tolist() for b in mine.split(t.batch_size)]
    totals = torch.zeros(3, dtype=torch.float64)
    for x, y in DataLoader(dataset, batch_sampler=batches, collate_fn=collate):
        y = y.to(accelerator.device)
        logits = model(_place(x, t, dataset, accelerator)).float()
        totals += torch.tensor([float(loss(logits, y)) * len(y), _correct(logits, y), len(y)], dtype=torch.float64)
        tick(len(y))
    total, correct, count = _shared(totals.tolist(), accelerator)
    return {"test_loss": total / count, "test_accuracy": _accuracy(model, correct, count)}


def _accuracy(model: nn.Module, correct: float, count: float) -> float | None:
    """In percent; None of a model that does not classify."""
    return None if isinstance(getattr(model, "module", model), Reconstructs) else 100 * correct / count


def _end_of_epoch(
    model: nn.Module,
    train_set: Any,
    test_set: Any,
    t: TrainSettings,
    loss: Callable[[Tensor, Tensor], Tensor],
    accelerator: Accelerator,
    position: Json,
    optimizer: Any,
) -> Json:
    count = getattr(train_set, "environments", 1)
    parts = {f"train{n + 1}": train_set.environment(n) for n in range(count)} if count > 1 else {}
    return {
        "epoch": position["epoch"] + 1,
        "train_loss": position["loss"] / position["seen"],
        "train_accuracy": _accuracy(model, position["correct"], position["seen"]),
        **({} if t.penalty is None else {"train_penalty": position["penalty"] / position["seen"]}),
        **evaluate(model, test_set, t, loss, accelerator),
        **{
            f"{name}_accuracy": evaluate(model, part, t, loss, accelerator)["test_accuracy"]
            for name, part in parts.items()
        },
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
    classifies = records[-1]["test_accuracy"] is not None
    best = max(records, key=lambda r: r["test_accuracy"] if classifies else -r["test_loss"])
    return {
        "recipe": run.recipe, "row": run.row, "budget": run.budget, "seed": run.settings.seed,
        "model": run.settings.model.name, "parameters": parameters,
        "data": {"train": train_set.title, "test": test_set.title},
        "test_accuracy": records[-1]["test_accuracy"], "best_test_accuracy": best["test_accuracy"],
        "test_loss": records[-1]["test_loss"], "best_epoch": best["epoch"], "epochs": len(records),
        "seconds": records[-1]["seconds"], "memory_MB": peak_memory(),
        **({"last": records[-1], "selected": select_epoch(records)} if train_accuracies(records[-1]) else {}),
        "environment": environment(),
    }  # fmt: skip


def _tensorboard(run: Run, epochs_done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted run wrote beyond its checkpoint.
    return SummaryWriter(str(run.folder / "tensorboard"), purge_step=epochs_done + 1)


def _write_tensorboard(writer: Any, record: Json) -> None:
    for key, value in record.items():
        if key != "epoch" and value is not None:
            writer.add_scalar(key.replace("_", "/", 1), value, record["epoch"])
    writer.flush()
