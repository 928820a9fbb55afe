"""What a run leaves behind: its weights, its summary, its curves for TensorBoard."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from spikeloom.errors import DataFileError
from spikeloom.files import save_tensors, write_json
from spikeloom.train.environments import select_epoch, train_accuracies
from spikeloom.train.machine import environment, peak_memory
from spikeloom.train.pretrain import write_pictures
from spikeloom.train.run import Run

Json = dict[str, Any]


def finish(
    run: Run, model: nn.Module, tensors: dict[str, Tensor], train_set: Any, test_set: Any, parameters: int
) -> Json:
    """Writes the weights and the summary of a run that has trained to its end, and returns the summary.

    Args:
        run: where.
        model: draws the pictures of a masked autoencoder.
        tensors: its weights, whole.
        train_set, test_set: the data.
        parameters: trainable elements.
    """
    records = run.metrics()
    summary = summarise(run, records, train_set.title, test_set.title, parameters)
    summary["classes"] = list(train_set.classes)
    if summary["test_accuracy"] is None:
        write_pictures(model, test_set, run.folder / "pictures.png")
    if run.settings.data.validation:
        if run.best.is_file():
            os.replace(run.best, run.weights)
    else:
        save_tensors(run.weights, tensors, run.about_weights(train_set))
    write_json(run.folder / "summary.json", summary)
    return summary


def reopen(run: Run) -> None:
    """Takes back what `finish` wrote, if it did: the run goes on. The best weights so far are so still."""
    summary = run.folder / "summary.json"
    if not summary.is_file():
        return
    summary.unlink()
    if run.settings.data.validation and run.weights.is_file():
        os.replace(run.weights, run.best)
    else:
        run.weights.unlink(missing_ok=True)


def summarise(run: Run, records: list[Json], train_title: str, test_title: str, parameters: int) -> Json:
    """The summary of a run whose epochs are all recorded.

    `test_accuracy` is that of the epoch which `rule` names: the last one, or the best on the validation part.
    `best_test_accuracy` is of the epoch that is best on the test part itself, hence too high.
    """
    if not records:
        raise DataFileError(f"{run.folder} has no metrics.jsonl any more: there is nothing to summarise")
    classifies = records[-1]["test_accuracy"] is not None
    best = max(records, key=lambda r: r["test_accuracy"] if classifies else -r["test_loss"])
    chosen, rule = records[-1], "last epoch"
    if "validation_accuracy" in chosen:
        chosen, rule = max(records, key=lambda r: r["validation_accuracy"]), "best validation accuracy"
    optional = {key: chosen[key] for key in ("validation_accuracy", "test_top5") if key in chosen}
    if run.changes:
        optional["changes"] = list(run.changes)
    if train_accuracies(records[-1]):
        optional |= {"last": records[-1], "selected": select_epoch(records)}
    return {
        "recipe": run.recipe,
        "row": run.row,
        "budget": run.budget,
        "seed": run.settings.seed,
        "model": run.settings.model.name,
        "parameters": parameters,
        "data": {"train": train_title, "test": test_title},
        "rule": rule,
        "epoch": chosen["epoch"],
        "test_accuracy": chosen["test_accuracy"],
        "test_loss": chosen["test_loss"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": records[-1]["epoch"],
        "seconds": records[-1]["seconds"],
        "memory_MB": peak_memory(),
        **optional,
        "environment": environment(),
    }
