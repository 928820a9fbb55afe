"""The training loop.

Everything random in a step is seeded by (seed, step, process), and the order of an epoch's images by (seed, epoch).
So a run that was killed continues from its last checkpoint bit for bit as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from spikeloom.documentation import page
from spikeloom.errors import UsageError
from spikeloom.files import save_tensors
from spikeloom.ops import _dispatch
from spikeloom.train.batches import Prepared
from spikeloom.train.build import seed_everything
from spikeloom.train.checkpoint import TrainState, save_checkpoint
from spikeloom.train.evaluate import accuracy, check_labels, evaluate, place, right, shared
from spikeloom.train.firing_rates import describe_rates, goes_nowhere, set_first_rates
from spikeloom.train.run import Run
from spikeloom.train.setup import Made, Progress, Setup, set_up
from spikeloom.train.sharding import held_whole, whole
from spikeloom.train.stages import NORM_BATCHES, Stage, measure_norms, stage_of_epoch
from spikeloom.train.summary import finish, reopen
from spikeloom.train.tracking import open_tracker
from spikeloom.train.whiten import first_convolution, whiten

Json = dict[str, Any]


@runtime_checkable
class Scheduled(Protocol):
    """A module that changes with the epochs, such as the mask of `MaskedPSN`."""

    def start_epoch(self, epoch: int, epochs: int) -> None: ...


class Interrupted(Exception):
    """The user stopped the run; its checkpoint is written."""


def train(
    run: Run,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    made: Made | None = None,
    callbacks: Sequence[Callable[[Json], object]] = (),
) -> Json:
    """Trains a run from its beginning or its last checkpoint, and writes its summary.

    Args:
        run: where and what.
        progress: is told how it goes.
        stop: asked after every step; True writes a checkpoint and ends.
        made: data and model, where the run's settings do not name them.
        callbacks: called with the record of each epoch; True ends the run after it.

    Returns:
        The summary: accuracies in percent on the test part, times, and where the run lies.

    Raises:
        UsageError: settings that cannot be met, such as a batch larger than the data.
        Interrupted: `stop` said so.
    """
    with contextlib.ExitStack() as held:
        s, state = set_up(run, progress, held, made)
        if s.T is not None:  # a caller's model is its own again, wherever training ended
            held.callback(s.show, Stage(s.T))
        if s.accelerator.is_main_process:
            reopen(run)
        return _train(s, state, progress, stop, callbacks)


def _train(
    s: Setup,
    state: TrainState,
    progress: Progress,
    stop: Callable[[], bool],
    callbacks: Sequence[Callable[[Json], object]],
) -> Json:
    run = s.run
    t, steps_per_epoch = s.t, s.batches.steps_per_epoch
    done = state.epoch * steps_per_epoch + state.step
    progress.start(run, t.epochs * steps_per_epoch, done)
    if _dispatch.native is None and s.accelerator.device.type == "cpu" and s.accelerator.is_main_process:
        progress.warn(
            "this installation has no native kernels and trains on plain PyTorch, several times slower: install a C++ "
            "compiler, then Spikeloom again"
        )
    if done == 0 and (t.whiten or t.initial_rate is not None):
        _start_from_data(s, progress)
    tracker = open_tracker(run, s.accelerator, state.epoch) if s.accelerator.is_main_process else None
    clock = _Clock(run.seconds() if done else 0.0)
    loader = s.batches.loader(done)
    ended = False
    while state.epoch < t.epochs and not ended and not _lost_patience(s, state):
        _start_epoch(s, state)
        _train_epoch(s, state, loader, clock, progress, stop)
        record = _end_epoch(s, state, clock, progress)
        state = state.next_epoch()
        if tracker is not None:
            run.add_metrics(record)
            tracker.write(record)
        _save(s, state, clock)
        progress.epoch(record)
        # All are called, and all processes end together.
        ended = any(shared([[callback(dict(record)) for callback in callbacks].count(True)], s.accelerator))
    if _lost_patience(s, state) and state.epoch < t.epochs:
        progress.note(f"ended after epoch {state.epoch} of {t.epochs}: {state.waited} epochs without a better one")
    summary: Json = {}
    trained = s.accelerator.unwrap_model(s.trained)
    tensors = whole(trained.state_dict())
    with held_whole(trained):
        if s.accelerator.is_main_process:
            summary = finish(run, trained, tensors, s.train_set, s.test_set, s.parameters)
    if tracker is not None:
        tracker.close()
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


def _inputs(s: Setup, first: int, count: int) -> Iterator[Tensor]:
    """The inputs of some batches of the run, from the `first` step on, the same ones in all processes."""
    batches = replace(s.batches, process=0)
    for step in range(first, min(first + count, len(batches))):
        for part in batches[step].parts:
            yield place(part.x, s.t, s.train_set, s.accelerator)


def _start_from_data(s: Setup, progress: Progress) -> None:
    """What the first batch says about the weights to start from: first filters, and first rates behind them."""
    if s.T is not None:
        s.show(stage_of_epoch(s.t, s.T, 0))
    x = next(_inputs(s, 0, 1))
    if s.t.whiten:
        whiten(first_convolution(s.bare), x)
    if s.t.initial_rate is not None:
        seed_everything(s.run.settings.seed, 0, 0, 2)
        with s.accelerator.autocast():
            rates = set_first_rates(s.bare, x, s.t.initial_rate)
        for found in rates:
            progress.note(f"first rate of {found.name}: {100 * found.before:.2f} %, set to {100 * found.after:.2f} %")
    if s.ema is not None:
        s.ema.set(s.bare)


def _start_epoch(s: Setup, state: TrainState) -> None:
    """What changes with the epoch: lambda, masks, and T and neurons with the norms' statistics."""
    t, epoch = s.t, state.epoch
    if s.penalised is not None and t.penalty is not None:
        s.penalised.weight = t.penalty.weight * epoch / t.epochs
    for module in s.bare.modules():
        if isinstance(module, Scheduled):
            module.start_epoch(epoch, t.epochs)
    if s.T is None:
        return
    stage = stage_of_epoch(t, s.T, epoch)
    s.show(stage)
    if epoch > 0 and state.step == 0 and stage_of_epoch(t, s.T, epoch - 1) != stage:
        for model in (s.bare, *([] if s.ema is None else [s.ema.module])):
            with s.accelerator.autocast():
                measure_norms(model, _inputs(s, epoch * s.batches.steps_per_epoch, NORM_BATCHES))


def _lost_patience(s: Setup, state: TrainState) -> bool:
    return s.t.patience is not None and state.waited >= s.t.patience


def _save(s: Setup, state: TrainState, clock: _Clock) -> None:
    save_checkpoint(s.run, s.bare, s.ema, s.optimizer, state, s.accelerator)
    if s.accelerator.is_main_process:
        s.run.write_seconds(clock.seconds())
    clock.saved()


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
        with s.penalised or contextlib.nullcontext(), s.rated or contextlib.nullcontext():
            loss, correct = _forward_backward(s, batch)
        if s.t.clip_grad is not None:
            s.accelerator.clip_grad_norm_(s.model.parameters(), s.t.clip_grad)
        s.optimizer.step()
        if s.ema is not None:
            s.ema.update(s.bare, step=step)
        count = sum(len(part.y) for part in batch.parts)
        means = [0.0 if each is None else each.take() * count for each in (s.penalised, s.rated)]
        total, correct, seen, penalty, rate = shared([loss * count, correct, count, *means], s.accelerator)
        state.step += 1
        state.loss += total
        state.correct += int(correct)
        state.seen += int(seen)
        state.penalty += penalty
        state.rate += rate
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
        f"spikeloom train --resume {shlex.quote(str(run.folder))} train.lr={run.settings.train.lr / 10:g} "
        f"(see {page('faq', 'the-loss-is-nan-what-now')})"
    )


def _forward_backward(s: Setup, batch: Prepared) -> tuple[float, int]:
    """Adds one step's gradients; returns the mean loss and the number of correct predictions of this process."""
    total, correct, count = 0.0, 0, len(batch.parts)
    for index, part in enumerate(batch.parts):
        check_labels(part.y, s.train_set)
        x = place(part.x, s.t, s.train_set, s.accelerator)
        target, y = part.target.to(s.accelerator.device), part.y.to(s.accelerator.device)
        values: list[Tensor] = []  # several of a method that gives the loss one step at a time

        def scaled(logits: Tensor, labels: Tensor, values: list[Tensor] = values) -> Tensor:
            result = s.objective(logits, labels)
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
        **({} if s.T is None else {"T": stage_of_epoch(t, s.T, state.epoch).T}),
        "train_loss": state.loss / seen,
        "train_accuracy": accuracy(s.model, state.correct, seen),
    }
    if t.penalty is not None:
        record["train_penalty"] = state.penalty / seen
    if t.rate_penalty is not None:
        record["train_rate"] = state.rate / seen
    with held_whole(s.bare), s.accelerator.autocast():
        if s.validation_set is not None:
            record |= evaluate(s.trained, s.validation_set, t, s.loss, s.accelerator, part="validation")
        record |= evaluate(s.trained, s.test_set, t, s.loss, s.accelerator)
        for n in range(environments if (environments := getattr(s.train_set, "environments", 1)) > 1 else 0):
            part = evaluate(s.trained, s.train_set.environment(n), t, s.loss, s.accelerator)
            record[f"train{n + 1}_accuracy"] = part["test_accuracy"]
    record["lr"] = s.optimizer.param_groups[0]["lr"]
    record |= {**clock.speeds(), "seconds": clock.seconds()}
    if s.validation_set is not None:
        state.waited += 1
        if record["validation_accuracy"] > state.best:
            state.best, state.waited = record["validation_accuracy"], 0
            best = whole(s.accelerator.unwrap_model(s.trained).state_dict())
            if s.accelerator.is_main_process:
                save_tensors(s.run.best, best, s.run.about_weights(s.train_set))
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
