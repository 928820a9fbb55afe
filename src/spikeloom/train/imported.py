"""A run's folder of weights that were trained elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.files import PathLike, atomic_folder, save_tensors, write_json
from spikeloom.models.spikingjelly import read_layers
from spikeloom.models.weight_matching import WeightMatch, copy_weights
from spikeloom.train.build import build_datasets, make_accelerator, make_model, try_input
from spikeloom.train.evaluate import evaluate
from spikeloom.train.losses import LOSSES
from spikeloom.train.recipe import check_settings, merge
from spikeloom.train.run import IMPORTED, Run
from spikeloom.train.summary import summarise

Json = dict[str, Any]
# What settings must have and no run of these weights uses, and the batch of evaluations.
_TRAIN: Json = {"epochs": 1, "batch_size": 64, "lr": 0.01}


def import_weights(file: PathLike, folder: PathLike, values: Json, work: Any) -> tuple[Json, WeightMatch]:
    """Writes the folder of a run whose weights come from a file, and measures it on the test data.

    The layers of the file are matched with those of the model by order and shape (`models.copy_weights`); all must fit.

    Args:
        file: safetensors or `torch.save`, of SpikingJelly's or of any network with layers in the same order.
        folder: new or empty.
        values: settings: `model` with its name and options, `data`, and if wanted `neuron`, `seed` and `train`, of
            which evaluations use batch size, loss and precision.
        work: shows progress.

    Returns:
        The summary of the run, and which names were matched.

    Raises:
        UsageError: weights that do not fit, wrong settings, data that are not there or that the model cannot take, or a
            folder that is not empty.
        DataFileError: a file that cannot be read.
    """
    name = values["model"]["name"]
    layers, options = read_layers(file, name, "import")
    wanted = merge({"train": _TRAIN, "model": options}, values)
    settings = check_settings(wanted, os.fspath(file))
    run = Run.plan(folder, IMPORTED, "main", "full", settings)
    _, dataset = build_datasets(settings, train=False)
    model = make_model(settings, dataset.in_channels, len(dataset.classes)).eval()
    try:
        match = copy_weights(layers, model)
    except UsageError as error:
        raise UsageError(
            f"{file} does not fit {name} with {dataset.in_channels} channels and {len(dataset.classes)} classes of "
            f"{dataset.title}: {error}"
        ) from None
    if wrong := [key for key, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]:
        raise UsageError(f"{file} has NaN or infinite numbers for {', '.join(wrong[:3])} of {name}")
    try_input(model, dataset, name, "bptt")
    t = settings.train
    work.work("evaluating", len(dataset))
    loss = functools.partial(LOSSES[t.loss.name], **t.loss.options)
    accelerator = make_accelerator(t.precision)
    found = evaluate(accelerator.prepare(model), dataset, t, loss, accelerator, work.advance)
    record: Json = {"epoch": 0, "seconds": 0.0, **found}
    parameters = sum(p.numel() for p in model.parameters())
    summary = summarise(run, [record], "elsewhere", dataset.title, parameters) | {
        "rule": "imported weights",
        "memory_MB": None,
        "classes": list(dataset.classes),
        "imported_from": os.fspath(file),
    }
    with atomic_folder(run.folder) as new:
        written = dataclasses.replace(run, folder=new)
        written.begin()
        save_tensors(written.weights, accelerator.unwrap_model(model).state_dict(), run.about_weights(dataset))
        (new / "metrics.jsonl").touch()
        write_json(new / "summary.json", summary)
    return summary, match
