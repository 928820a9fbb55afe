"""Small runs on digits, and who is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikeloom.files import load_tensors
from spikeloom.train.recipe import check_settings, merge
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings

# Without norms; digits padded to the 16x16 that the network needs.
SMALL: dict[str, Any] = {
    "data": {"name": "digits", "subset": 64, "test_subset": 50, "size": 16},
    "model": {"name": "colored_mnist_net", "T": 2, "image_size": 16},
    "train": {"batch_size": 16, "epochs": 1, "optimizer": "adam", "lr": 0.003, "schedule": "constant"},
}
# With batch norm, augmentation and a learning rate that moves.
NORMED: dict[str, Any] = {
    "data": {"name": "digits", "subset": 64, "test_subset": 50},
    "model": {"name": "report_sew_resnet34", "T": 2},
    "train": {
        "batch_size": 16,
        "epochs": 2,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "warmup_epochs": 0.5,
        "augment": [{"name": "random_crop", "padding": 1}],
    },
}


class Told:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.records: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.started: list[tuple[int, int]] = []

    def start(self, run: Run, steps: int, done: int) -> None:
        self.started.append((steps, done))

    def step(self, epoch: int, loss: float, accuracy: float) -> None:
        self.steps.append((epoch, loss, accuracy))

    def epoch(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def resolved(base: dict[str, Any], **changes: Any) -> Settings:
    return check_settings(merge(base, changes), "here")


def run_of(folder: Path, base: dict[str, Any], **changes: Any) -> Run:
    return Run.plan(folder, "quickstart/digits", "main", "full", resolved(base, **changes))


def weights(run: Run) -> dict[str, Tensor]:
    return load_tensors(run.weights)[0]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
