"""What a run is made of, built once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spikeloom.data import augmentation
from spikeloom.data.given import StreamedDataset
from spikeloom.data.subset import hold_out
from spikeloom.errors import UsageError
from spikeloom.layers import sync_norms
from spikeloom.train.batches import Batches, check_workers
from spikeloom.train.build import build_datasets, build_model, epoch_order, make_accelerator, try_input
from spikeloom.train.checkpoint import TrainState, load_checkpoint, load_optimizer
from spikeloom.train.environments import PENALTIES, Penalised
from spikeloom.train.evaluate import shared
from spikeloom.train.losses import LOSSES, class_weights
from spikeloom.train.methods import METHODS, check_method
from spikeloom.train.optim import Schedule, build_optimizer, build_schedule
from spikeloom.train.pretrain import start_from
from spikeloom.train.rate_penalty import RatePenalty
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings, TrainSettings
from spikeloom.train.sharding import shard
from spikeloom.train.stages import NeuronPlaces, Stage, check_stages
from spikeloom.train.tracking import check_tracker
from spikeloom.train.whiten import check_images, first_convolution

Json = dict[str, Any]


class Progress(Protocol):
    """Who is told how a run goes; `spikeloom.cli` shows it."""

    def start(self, run: Run, steps: int, done: int) -> None: ...
    def step(self, epoch: int, loss: float, accuracy: float) -> None: ...
    def epoch(self, record: Json) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


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
        method, loss: how gradients are taken, and of what, without weights of classes.
        weighted: the loss with weights of classes, if any.
        rated: that one with its penalty on firing rates, if any.
        penalised: the same with its penalty on environments, if any.
        T: of evaluation; None of a model that repeats nothing.
        places: of neurons in the model, and in its average.
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
    weighted: Callable[[Tensor, Tensor], Tensor]
    rated: RatePenalty | None
    penalised: Penalised | None
    T: int | None
    places: list[tuple[nn.Module, NeuronPlaces]]
    parameters: int

    @property
    def objective(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss with all its penalties."""
        return self.penalised or self.rated or self.weighted

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

    def show(self, stage: Stage) -> None:
        """Sets the number of steps for which the model repeats an image, and what stands in for its neurons."""
        for model, places in self.places:
            model.T = stage.T  # pyright: ignore[reportArgumentType]
            places.put(stage.neuron)


@dataclass
class Made:
    """The data of a run, and its model where the caller made it."""

    train_set: Any
    validation_set: Any
    test_set: Any
    model: nn.Module | None = None


def set_up(
    run: Run, progress: Progress, held: contextlib.ExitStack, made: Made | None = None
) -> tuple[Setup, TrainState]:
    """Builds what a run needs, and takes up its last checkpoint if it has one.

    Args:
        run: where and what.
        progress: is told what a user should know.
        held: keeps the run's folder for this process until it is closed.
        made: data and model, where the settings do not name them.

    Raises:
        UsageError: settings that cannot be met, such as a batch larger than the data.
    """
    settings, t = run.settings, run.settings.train
    _check_machine(t)
    accelerator = make_accelerator(t.precision)
    made = made or _parts(run)
    train_set = made.train_set
    micro_batches, batch = _batch(t, accelerator.num_processes, train_set)
    environments = getattr(train_set, "environments", 1)
    order = _order(run, train_set, environments)
    model = made.model or build_model(settings, train_set.in_channels, len(train_set.classes))
    model = sync_norms(model) if t.sync_norm else model
    rest = start_from(model, t.start_from) if t.start_from is not None else None
    augment = _augmentation(t, train_set)
    _check_model(settings, model, train_set)
    weights = class_weights(t, train_set)
    _begin(run, held, accelerator)
    if rest:
        progress.warn(f"drawn anew, because {t.start_from} has no such weights: {', '.join(rest)}")
    accelerator.wait_for_everyone()
    model = _laid_out(model, t, held)
    ema = None if t.ema is None else _averaged(model, t.ema)
    steps_per_epoch = len(order(0)) // batch
    state, moments = _continued(run, model, ema, batch, accelerator, progress)
    model = shard(model, accelerator) if t.shard else accelerator.prepare_model(model)
    optimizer = build_optimizer(t, accelerator.unwrap_model(model))
    schedule = build_schedule(t, optimizer, steps_per_epoch)
    if moments is not None:
        load_optimizer(optimizer, moments)
    optimizer = accelerator.prepare_optimizer(optimizer)
    if ema is not None:
        ema.to(accelerator.device)
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    weighted = loss if weights is None else functools.partial(loss, class_weights=weights.to(accelerator.device))
    bare = accelerator.unwrap_model(model)
    rated = None if t.rate_penalty is None else RatePenalty(bare, weighted, **t.rate_penalty.model_dump())
    setup = Setup(
        run=run,
        accelerator=accelerator,
        train_set=train_set,
        validation_set=made.validation_set,
        test_set=made.test_set,
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
            micro_batches,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        method=functools.partial(METHODS[t.method.name], **t.method.options),
        loss=loss,
        rated=rated,
        weighted=weighted,
        penalised=_penalised(t, bare, rated or weighted, environments, train_set.title),
        T=getattr(bare, "T", None),
        places=[(m, NeuronPlaces(m)) for m in (bare, *([] if ema is None else [ema.module]))],
        parameters=sum(p.numel() for p in bare.parameters()),
    )
    return setup, state


def _check_machine(t: TrainSettings) -> None:
    """Refuses what this installation and machine cannot do."""
    check_tracker(t.tracker)
    check_workers(t)


def _check_model(settings: Settings, model: nn.Module, train_set: Any) -> None:
    """Refuses a model that cannot take the data as it is to be trained on them."""
    try_input(model, train_set, settings.model.name, settings.train.method.name)
    _check_stand_ins(settings)
    check_stages(settings.train, model, train_set)
    check_method(settings.train, model, train_set)
    if settings.train.whiten:
        check_images(first_convolution(model), train_set.encode(train_set.batch([0])[0]))


def _check_stand_ins(settings: Settings) -> None:
    """Refuses what looks at the network's own neurons where others stand in for them."""
    t = settings.train
    asked = {
        "train.rate_penalty": t.rate_penalty,
        "train.penalty": t.penalty,
        "data.validation": settings.data.validation,
    }
    if any(stage.neuron is not None for stage in t.steps):
        for key, value in asked.items():
            if value:
                raise UsageError(f"{key} is of the network's own neurons: leave it out, or the neurons of train.steps")


def _augmentation(t: TrainSettings, train_set: Any) -> Any:
    named = [{"name": a.name, **a.options} for a in t.augment]
    return augmentation(named, getattr(train_set, "mean", ()), getattr(train_set, "std", ()))


def _continued(
    run: Run, model: nn.Module, ema: Any, batch: int, accelerator: Accelerator, progress: Progress
) -> tuple[TrainState, Json | None]:
    """Takes up the weights of a run's checkpoint, if it has one: where it is, and the state of its optimiser."""
    state, moments = TrainState(), None
    if run.checkpoint.is_file():
        state, moments = load_checkpoint(run, model, ema)
    elif run.metrics():
        progress.warn(f"{run.folder} has records but no {run.checkpoint.name}: the run begins again")
    if state.batch not in (0, batch):
        kept = f"train.batch_size x train.accumulate x processes, or train.total_batch={state.batch}, keeps them"
        progress.warn(f"batches were of {state.batch} images, and are of {batch} from here on: {kept}")
    state = state.in_batches_of(batch)
    if accelerator.is_main_process:
        _keep_records(run, state, progress)
    return state, moments


def _order(run: Run, train_set: Any, environments: int) -> Callable[[int], Tensor]:
    """The order of samples in an epoch: a stream's own, or a shuffle."""
    if isinstance(train_set, StreamedDataset):
        return train_set.order
    settings = run.settings
    return functools.partial(
        epoch_order, len(train_set), settings.seed, environments=environments, batch=settings.train.batch_size
    )


def _keep_records(run: Run, state: TrainState, progress: Progress) -> None:
    if missing := run.keep_metrics(state.epoch):
        progress.warn(f"{run.folder} has no records of its first {missing} epochs: its summary is of the others")


def _batch(t: TrainSettings, processes: int, train_set: Any) -> tuple[int, int]:
    """Micro-batches of each process, and images of all processes together, per optimiser step."""
    micro_batches = t.micro_batches(processes)
    batch = t.batch_size * micro_batches * processes
    if batch > len(train_set):
        sizes = "train.total_batch" if t.total_batch else "train.batch_size x train.accumulate x processes"
        raise UsageError(
            f"a batch of {batch} images ({sizes}) is larger than the {len(train_set)} training images of "
            f"{train_set.title}: lower {'train.total_batch' if t.total_batch else 'train.batch_size'}"
        )
    return micro_batches, batch


def _parts(run: Run) -> Made:
    """The data to train on, to choose the epoch by (None without `data.validation`) and to test on."""
    train_set, test_set = build_datasets(run.settings)
    if not run.settings.data.validation:
        return Made(train_set, None, test_set)
    return Made(*hold_out(train_set, run.settings.data.validation), test_set)


def _laid_out(model: nn.Module, t: TrainSettings, held: contextlib.ExitStack) -> nn.Module:
    """The model in the wished memory order; first filters that are set by data do not learn until `held` ends."""
    if t.channels_last and not t.shard:  # `fully_shard` wants parameters in C order
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if t.whiten:
        filters = first_convolution(model).weight
        held.callback(filters.requires_grad_, filters.requires_grad)
        filters.requires_grad_(False)
    return model


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
