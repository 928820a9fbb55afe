"""Evaluating a finished run."""

from __future__ import annotations

import functools
from typing import Any

import torch

from spikeloom.errors import DataFileError
from spikeloom.record import RateMeter
from spikeloom.train.checkpoint import load_tensors, load_weights
from spikeloom.train.loop import build_datasets, build_model, evaluate, make_accelerator
from spikeloom.train.losses import LOSSES
from spikeloom.train.recipe import Settings
from spikeloom.train.run import Run

Json = dict[str, Any]


def load_run(run: Run, in_channels: int, num_classes: int) -> torch.nn.Module:
    """The model of a finished run with its trained weights.

    Raises:
        DataFileError: the run is unfinished, or its weights are damaged or of another model.
    """
    if not run.weights.is_file():
        raise DataFileError(f"{run.folder} is not finished; continue it with 'spikeloom train resume={run.folder}'")
    model = build_model(run.settings, in_channels, num_classes)
    tensors, _ = load_tensors(run.weights)
    load_weights(model, tensors, run.weights, run.settings.model.name)
    return model


def evaluate_run(run: Run, settings: Settings, progress: Any) -> Json:
    """Accuracy (percent), loss and firing rates of a run on the test part that `settings` name."""
    _, dataset = build_datasets(settings, train=False)
    model = load_run(run, dataset.in_channels, len(dataset.classes))
    t = settings.train
    accelerator = make_accelerator(t.precision)
    if t.channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = accelerator.prepare(model)
    progress.work("evaluating", len(dataset))
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    with RateMeter(accelerator.unwrap_model(model)) as meter:
        result = evaluate(model, dataset, t, loss, accelerator, progress.advance)
    return {"run": str(run.folder), "data": dataset.title, **result, "rates": meter.rates()}
