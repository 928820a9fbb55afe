"""The batches of a run: loaded, augmented and mixed, beside the training step where that takes long."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spikeloom.data.transforms import Pipeline
from spikeloom.errors import UsageError
from spikeloom.train.build import seed_everything
from spikeloom.train.settings import TrainSettings


def check_workers(t: TrainSettings) -> None:
    """Refuses more processes than help on this machine: thousands would take its memory.

    Raises:
        UsageError: more than 16, and than 4 for each core.
    """
    most = max(16, 4 * (os.cpu_count() or 1))
    if t.workers is not None and t.workers > most:
        raise UsageError(f"train.workers={t.workers} is too many for this machine: at most {most}, or leave it out")


class MicroBatch(NamedTuple):
    """What one forward pass takes.

    Attributes:
        x: inputs [N, ...], augmented.
        target: labels [N], or weights of classes [N, classes] of mixed images.
        y: labels [N].
    """

    x: Tensor
    target: Tensor
    y: Tensor


class Prepared(NamedTuple):
    """One optimiser step's part of one process.

    Attributes:
        parts: its micro-batches.
        seconds: how long preparing them took.
    """

    parts: list[MicroBatch]
    seconds: float


@dataclass
class Batches(Dataset[Prepared]):
    """The batches of a whole run: item n is the n-th optimiser step's part of one process.

    Everything random is seeded by (seed, step, process), whoever prepares a batch and when.

    Attributes:
        dataset: the training part.
        order: the order of its images in an epoch.
        settings: how to train.
        augment: the augmentation.
        seed: of the run.
        steps_per_epoch: optimiser steps.
        micro_batches: of each process per optimiser step.
        process, processes: which of how many.
    """

    dataset: Any
    order: Callable[[int], Tensor]
    settings: TrainSettings
    augment: Pipeline
    seed: int
    steps_per_epoch: int
    micro_batches: int = 1
    process: int = 0
    processes: int = 1
    _shuffled: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Prepared:
        started = time.perf_counter()
        t = self.settings
        epoch, number = divmod(step, self.steps_per_epoch)
        size = t.batch_size * self.micro_batches
        start = (number * self.processes + self.process) * size
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, self.order(epoch))
        indices = self._shuffled[1][start : start + size]
        seed_everything(self.seed, step + 1, self.process, 1)
        mix = mixing(t, len(self.dataset.classes), epoch)
        x, y = self.dataset.batch(indices.tolist())
        parts: list[MicroBatch] = []
        for i, x_part, y_part in zip(
            indices.split(t.batch_size), x.split(t.batch_size), y.split(t.batch_size), strict=True
        ):
            x_part, target = mix(self.augment.at(i, epoch)(x_part, self.dataset.fill), y_part)
            parts.append(MicroBatch(x_part, target, y_part))
        return Prepared(parts, time.perf_counter() - started)

    def loader(self, first: int) -> Iterator[Prepared]:
        """The batches from the `first` step on, prepared by `train.workers` processes."""
        workers = self.settings.workers
        if workers is None:
            reads_files = not hasattr(self.dataset, "images") and not hasattr(self.dataset, "spikes")
            # A forked process has the data without copying them; a spawned one would take as long as it saves.
            workers = int((self.augment.by_image or reads_files) and multiprocessing.get_start_method() == "fork")
        if workers == 0:
            return map(self.__getitem__, range(first, len(self)))
        return iter(
            DataLoader(self, batch_size=None, sampler=range(first, len(self)), num_workers=workers, prefetch_factor=2)
        )


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
