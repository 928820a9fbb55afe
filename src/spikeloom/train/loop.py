"""The training loop.

Everything random in a step is seeded by (seed, step, process), and the order of an epoch's images by (seed, epoch).
So a run that was killed continues from its last checkpoint bit for bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spikeloom.data import augmentation
from spikeloom.data.subset import hold_out
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import load_tensors, load_weights, save_tensors
from spikeloom.layers import sync_norms
from spikeloom.train.batches import Batches, Prepared
from spikeloom.train.build import (
    build_datasets,
    build_model,
    epoch_order,
    make_accelerator,
    seed_everything,
    try_input,
)
from spikeloom.train.checkpoint import pack_optimizer, unpack_optimizer
from spikeloom.train.environments import PENALTIES, Penalised
from spikeloom.train.evaluate import accuracy, evaluate, place, right, shared
from spikeloom.train.firing_rates import (
    NORM_BATCHES,
    check_steps,
    describe_rates,
    goes_nowhere,
    measure_norms,
    set_first_rates,
    steps_of_epoch,
)
from spikeloom.train.losses import LOSSES
from spikeloom.train.methods import METHODS
from spikeloom.train.optim import Schedule, build_optimizer, build_schedule
from spikeloom.train.pretrain import start_from
from spikeloom.train.recipe import TrainSettings
from spikeloom.train.run import Run
from spikeloom.train.summary import finish, open_tensorboard, write_tensorboard

Json = dict[str, Any]


class Progress(Protocol):
    """Who is told how a run goes; `spikeloom.cli` shows it."""

    def start(self, run: Run, steps: int, done: int) -> None: ...
    def step(self, epoch: int, loss: float, accuracy: float) -> None: ...
    def epoch(self, record: Json) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


@runtime_checkable
class Scheduled(Protocol):
    """A module that changes with the epochs, such as the mask of `MaskedPSN`."""

    def start_epoch(self, epoch: int, epochs: int) -> None: ...


class Interrupted(Exception):
    """The user stopped the run; its checkpoint is written."""


@dataclass
class TrainState:
    """Where a run is, and what it has seen of the present epoch. Checkpoints hold it whole.

    Attributes:
        epoch: epochs behind it.
        step: optimiser steps of the present epoch behind it.
        loss, correct, seen, penalty: sums over the epoch's images so far.
        best: the highest validation accuracy of an epoch so far, in percent.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    penalty: float = 0.0
    best: float = -1.0

    def next_epoch(self) -> TrainState:
        """The state at the beginning of the next epoch."""
        return TrainState(epoch=self.epoch + 1, best=self.best)


@dataclass
class Setup:
    """What a run is made of, built once.

    Attributes:
        run: where and what.
        accelerator: devices, processes, precision.
        train_set, validation_set, test_set: the data; without `data.validation` there is no second.
        model: as the accelerator wraps it.
        ema: the averaged weights, if wanted.
        optimizer, schedule: of the weights.
        batches: of the whole run.
        method, loss: how gradients are taken, and of what.
        penalised: the loss with its penalty, if any.
        T: of evaluation; None of a model that repeats nothing.
        parameters: trainable elements.
        seconds: of earlier sessions of the run, and the clock at the start of this one.
    """

    run: Run
    accelerator: Accelerator
    train_set: Any
    validation_set: Any
    test_set: Any
    model: Any
    ema: Any
    optimizer: Any
    schedule: Schedule
    batches: Batches
    method: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    penalised: Penalised | None
    T: int | None
    parameters: int

    @property
    def t(self) -> TrainSettings:
        return self.run.settings.train

    @property
    def bare(self) -> nn.Module:
        """The model without the accelerator's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def trained(self) -> nn.Module:
        """The network that is evaluated and saved: the averaged one, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def show(self, T: int) -> None:
        """Sets the number of steps for which the model repeats an image."""
        for model in (self.bare, *([] if self.ema is None else [self.ema.module])):
            model.T = T  # pyright: ignore[reportArgumentType]


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
    with contextlib.ExitStack() as held:
        return _train(*_set_up(run, progress, held), progress, stop)


def _train(s: Setup, state: TrainState, progress: Progress, stop: Callable[[], bool]) -> Json:
    run = s.run
    t, steps_per_epoch = s.t, s.batches.steps_per_epoch
    done = state.epoch * steps_per_epoch + state.step
    progress.start(run, t.epochs * steps_per_epoch, done)
    if done == 0 and t.initial_rate is not None:
        _set_first_rates(s, t.initial_rate, progress)
    writer = open_tensorboard(run, state.epoch) if s.accelerator.is_main_process else None
    clock = _Clock(run.seconds() if done else 0.0)
    loader = s.batches.loader(done)
    while state.epoch < t.epochs:
        _start_epoch(s, state)
        _train_epoch(s, state, loader, clock, progress, stop)
        record = _end_epoch(s, state, clock, progress)
        state = state.next_epoch()
        if s.accelerator.is_main_process:
            run.add_metrics(record)
            write_tensorboard(writer, record)
        _save(s, state, clock)
        progress.epoch(record)
    summary: Json = {}
    if s.accelerator.is_main_process:
        summary = finish(run, s.accelerator.unwrap_model(s.trained), s.train_set, s.test_set, s.parameters)
        if writer is not None:
            writer.close()
    s.accelerator.wait_for_everyone()
    s.accelerator.end_training()
    return summary


class _Clock:
    """Times, which differ from run to run and so are no part of the state.

    Args:
        before: seconds of the run's earlier sessions.
    """

    def __init__(self, before: float):
        self._before = before
        self._started = self._saved = time.monotonic()
        self._images, self._preparing, self._stepping = 0, 0.0, 0.0

    def step(self, images: int, preparing: float, stepping: float) -> None:
        """Counts a step of this process: its images, and the seconds that preparing them and training took."""
        self._images += images
        self._preparing += preparing
        self._stepping += stepping

    def speeds(self) -> Json:
        """Images a second of preparing batches and of training, since this was asked for last."""
        found = {
            "input_images_per_s": round(self._images / max(self._preparing, 1e-9), 1),
            "step_images_per_s": round(self._images / max(self._stepping, 1e-9), 1),
        }
        self._images, self._preparing, self._stepping = 0, 0.0, 0.0
        return found

    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._started, 3)

    def due(self, minutes: float) -> bool:
        return time.monotonic() - self._saved >= 60 * minutes

    def saved(self) -> None:
        self._saved = time.monotonic()


def _set_up(run: Run, progress: Progress, held: contextlib.ExitStack) -> tuple[Setup, TrainState]:
    settings, t = run.settings, run.settings.train
    accelerator = make_accelerator(t.precision)
    train_set, test_set = build_datasets(settings)
    validation_set = None
    if settings.data.validation:
        train_set, validation_set = hold_out(train_set, settings.data.validation)
    batch = t.batch_size * t.accumulate * accelerator.num_processes
    if batch > len(train_set):
        raise UsageError(
            f"a batch of {batch} images (train.batch_size x train.accumulate x processes) is larger than "
            f"the {len(train_set)} training images of {train_set.title}: lower train.batch_size"
        )
    environments = getattr(train_set, "environments", 1)
    order = functools.partial(epoch_order, len(train_set), settings.seed, environments=environments, batch=t.batch_size)
    model = build_model(settings, train_set.in_channels, len(train_set.classes))
    if t.sync_norm:
        model = sync_norms(model)
    T = getattr(model, "T", None)
    rest = start_from(model, t.start_from) if t.start_from is not None else None
    augment = augmentation(
        [{"name": a.name, **a.options} for a in t.augment],
        getattr(train_set, "mean", ()),
        getattr(train_set, "std", ()),
    )
    try_input(model, train_set, settings.model.name, t.method.name)
    check_steps(t, model, train_set)
    _begin(run, held, accelerator)
    if rest:
        progress.warn(f"drawn anew, because {t.start_from} has no such weights: {', '.join(rest)}")
    accelerator.wait_for_everyone()
    parameters = sum(p.numel() for p in model.parameters())
    if t.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ema = None if t.ema is None else _averaged(model, t.ema)
    optimizer = build_optimizer(t, model)
    steps_per_epoch = len(order(0)) // batch
    schedule = build_schedule(t, optimizer, steps_per_epoch)
    state = TrainState()
    if run.checkpoint.is_file():
        state = _load_checkpoint(run, model, ema, optimizer)
    if accelerator.is_main_process and (missing := run.keep_metrics(state.epoch)):
        progress.warn(f"{run.folder} has no records of its first {missing} epochs: its summary is of the others")
    model, optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        ema.to(accelerator.device)
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    setup = Setup(
        run=run,
        accelerator=accelerator,
        train_set=train_set,
        validation_set=validation_set,
        test_set=test_set,
        model=model,
        ema=ema,
        optimizer=optimizer,
        schedule=schedule,
        batches=Batches(
            train_set,
            order,
            t,
            augment,
            settings.seed,
            steps_per_epoch,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        method=functools.partial(METHODS[t.method.name], **t.method.options),
        loss=loss,
        penalised=_penalised(t, accelerator.unwrap_model(model), loss, environments, train_set.title),
        T=T,
        parameters=parameters,
    )
    return setup, state


def _averaged(model: nn.Module, decay: float) -> Any:
    """timm's averaged weights; the decay rises to its value, so that early averages follow the weights."""
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(model, decay=decay, use_warmup=True)


def _begin(run: Run, held: contextlib.ExitStack, accelerator: Accelerator) -> None:
    """Lets the main process begin the run and hold its folder; all processes end where it cannot."""
    error: UsageError | None = None
    if accelerator.is_main_process:
        try:
            held.enter_context(run.writing())
        except UsageError as refused:
            error = refused
    if any(shared([error is not None], accelerator)):
        raise error or UsageError(f"the main process cannot write {run.folder}")


def _penalised(t: TrainSettings, model: nn.Module, loss: Any, environments: int, title: str) -> Penalised | None:
    if t.penalty is None:
        return None
    if environments == 1:
        raise UsageError(f"train.penalty {t.penalty.name} needs data with environments, not {title}: colored_mnist")
    return Penalised(model, loss, functools.partial(PENALTIES[t.penalty.name], **t.penalty.options), environments)


def _inputs(s: Setup, first: int, count: int) -> Iterator[Tensor]:
    """The inputs of some batches of the run, from the `first` step on."""
    for step in range(first, min(first + count, len(s.batches))):
        for part in s.batches[step].parts:
            yield place(part.x, s.t, s.train_set, s.accelerator)


def _set_first_rates(s: Setup, rate: float, progress: Progress) -> None:
    if s.T is not None:
        s.show(steps_of_epoch(s.t, s.T, 0))
    x = next(_inputs(s, 0, 1))
    seed_everything(s.run.settings.seed, 0, 0, 2)
    with s.accelerator.autocast():
        rates = set_first_rates(s.bare, x, rate)
    if s.ema is not None:
        s.ema.set(s.bare)
    for found in rates:
        progress.note(f"first rate of {found.name}: {100 * found.before:.2f} %, set to {100 * found.after:.2f} %")


def _start_epoch(s: Setup, state: TrainState) -> None:
    """What changes with the epoch: lambda, masks, and T with the norms' statistics."""
    t, epoch = s.t, state.epoch
    if s.penalised is not None and t.penalty is not None:
        s.penalised.weight = t.penalty.weight * epoch / t.epochs
    for module in s.bare.modules():
        if isinstance(module, Scheduled):
            module.start_epoch(epoch, t.epochs)
    if s.T is None:
        return
    T = steps_of_epoch(t, s.T, epoch)
    s.show(T)
    if epoch > 0 and state.step == 0 and steps_of_epoch(t, s.T, epoch - 1) != T:
        for model in (s.bare, *([] if s.ema is None else [s.ema.module])):
            with s.accelerator.autocast():
                measure_norms(model, _inputs(s, epoch * s.batches.steps_per_epoch, NORM_BATCHES))


def _train_epoch(
    s: Setup, state: TrainState, loader: Iterator[Prepared], clock: _Clock, progress: Progress, stop: Callable[[], bool]
) -> None:
    s.model.train()
    for batch in itertools.islice(loader, s.batches.steps_per_epoch - state.step):
        started = time.perf_counter()
        step = state.epoch * s.batches.steps_per_epoch + state.step
        seed_everything(s.run.settings.seed, step + 1, s.accelerator.process_index)
        s.schedule.step_update(step)
        s.optimizer.zero_grad()
        with s.penalised or contextlib.nullcontext():
            loss, correct = _forward_backward(s, batch)
        s.optimizer.step()
        if s.ema is not None:
            s.ema.update(s.bare, step=step)
        count = sum(len(part.y) for part in batch.parts)
        penalty = 0.0 if s.penalised is None else s.penalised.take() * count
        total, correct, seen, penalty = shared([loss * count, correct, count, penalty], s.accelerator)
        state.step += 1
        state.loss += total
        state.correct += int(correct)
        state.seen += int(seen)
        state.penalty += penalty
        clock.step(count, batch.seconds, time.perf_counter() - started)
        if not np.isfinite(total):
            raise UsageError(_divergence(s.run, total / seen, state))
        found = accuracy(s.model, state.correct, state.seen)
        progress.step(state.epoch + 1, state.loss / state.seen, float("nan") if found is None else found)
        if any(shared([stop()], s.accelerator)):
            _save(s, state, clock)
            raise Interrupted
        if clock.due(s.t.checkpoint_minutes):
            _save(s, state, clock)


def _divergence(run: Run, loss: float, state: TrainState) -> str:
    begun = "its last checkpoint" if run.checkpoint.is_file() else "its beginning, as it has no checkpoint yet,"
    return (
        f"the loss is {loss} at epoch {state.epoch + 1}, step {state.step}: continue from {begun} with a lower rate: "
        f"spikeloom train --resume {shlex.quote(str(run.folder))} train.lr={run.settings.train.lr / 10:g}"
    )


def _forward_backward(s: Setup, batch: Prepared) -> tuple[float, int]:
    """Adds one step's gradients; returns the mean loss and the number of correct predictions of this process."""
    total, correct, count = 0.0, 0, len(batch.parts)
    for index, part in enumerate(batch.parts):
        x = place(part.x, s.t, s.train_set, s.accelerator)
        target, y = part.target.to(s.accelerator.device), part.y.to(s.accelerator.device)
        values: list[Tensor] = []  # several of a method that gives the loss one step at a time

        def scaled(logits: Tensor, labels: Tensor, values: list[Tensor] = values) -> Tensor:
            result = (s.penalised or s.loss)(logits, labels)
            values.append(result.detach())
            return result / count

        last = index == count - 1
        with contextlib.nullcontext() if last else s.accelerator.no_sync(s.model):
            logits = s.method(s.model, x, target, scaled)
        total += float(torch.stack(values).mean()) / count
        correct += right(logits, y)
    return total, correct


def _end_epoch(s: Setup, state: TrainState, clock: _Clock, progress: Progress) -> Json:
    """Evaluates the epoch, keeps its weights if they are the best on the validation part, and warns after the first."""
    t, seen = s.t, state.seen
    record: Json = {
        "epoch": state.epoch + 1,
        **({} if s.T is None else {"T": steps_of_epoch(t, s.T, state.epoch)}),
        "train_loss": state.loss / seen,
        "train_accuracy": accuracy(s.model, state.correct, seen),
    }
    if t.penalty is not None:
        record["train_penalty"] = state.penalty / seen
    with s.accelerator.autocast():
        if s.validation_set is not None:
            record |= evaluate(s.trained, s.validation_set, t, s.loss, s.accelerator, part="validation")
        record |= evaluate(s.trained, s.test_set, t, s.loss, s.accelerator)
        for n in range(environments if (environments := getattr(s.train_set, "environments", 1)) > 1 else 0):
            part = evaluate(s.trained, s.train_set.environment(n), t, s.loss, s.accelerator)
            record[f"train{n + 1}_accuracy"] = part["test_accuracy"]
    record["lr"] = s.optimizer.param_groups[0]["lr"]
    record |= {**clock.speeds(), "seconds": clock.seconds()}
    if s.validation_set is not None and record["validation_accuracy"] > state.best:
        state.best = record["validation_accuracy"]
        if s.accelerator.is_main_process:
            best = s.accelerator.unwrap_model(s.trained)
            save_tensors(s.run.best, best.state_dict(), s.run.about_weights(s.train_set))
    if state.epoch == 0:
        _warn_after_the_first_epoch(s, record, seen, progress)
    return record


def _warn_after_the_first_epoch(s: Setup, record: Json, seen: int, progress: Progress) -> None:
    x = next(_inputs(s, 0, 1))
    with s.accelerator.autocast():
        lines = describe_rates(s.bare, x)
    found, classes = record["train_accuracy"], len(s.train_set.classes)
    if found is not None and goes_nowhere(found, classes, seen):
        progress.warn(
            f"after the first epoch the training accuracy is {found:.2f} %, no better than guessing among {classes} "
            f"classes: try another train.lr, train.warmup_epochs, or train.initial_rate=0.2"
        )
    for line in lines:
        progress.warn(line)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _save(s: Setup, state: TrainState, clock: _Clock) -> None:
    if s.accelerator.is_main_process:
        tensors, information = pack_optimizer(s.optimizer.state_dict())
        parts = {"model": s.bare.state_dict(), "optimizer": tensors}
        if s.ema is not None:
            parts["ema"] = s.ema.module.state_dict()
        save_tensors(
            s.run.checkpoint,
            {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()},
            {"position": dataclasses.asdict(state), "optimizer": information},
        )
        s.run.write_seconds(clock.seconds())
    clock.saved()


def _load_checkpoint(run: Run, model: nn.Module, ema: Any, optimizer: Any) -> TrainState:
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
    # Momentum, weight decay and the like are those of the settings, which may have changed since; the learning rate is
    # the schedule's.
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(unpack_optimizer(parts["optimizer"], information["optimizer"]))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
    return TrainState(**position)
