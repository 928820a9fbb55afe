"""One input through a trained network, step by step, as one HTML file: `spikeloom show`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikeloom.analyse.activity import Activity, LayerActivity, record_activity
from spikeloom.analyse.input_pictures import InputPictures, input_pictures
from spikeloom.analyse.report.template import Table, fill
from spikeloom.data.own_files import own_files
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, atomic
from spikeloom.train.build import build_datasets
from spikeloom.train.evaluate import Classifier, load_classifier
from spikeloom.train.recipe import check_settings, merge

Json = dict[str, Any]
_CLASSES = 5  # of the decision that are drawn, and those besides that lead at some step or are right
_MOST_CLASSES = 8


@dataclass(frozen=True)
class Decision:
    """The softmax of the mean logits of the first t steps, for t from 1 to T.

    Attributes:
        classes: names of those that are drawn, the most likely at the end first.
        probabilities: of these after each step, [T][classes].
        leaders: name of the most likely class after each step.
        truth: name of the right class, of test data.
    """

    classes: tuple[str, ...]
    probabilities: tuple[tuple[float, ...], ...]
    leaders: tuple[str, ...]
    truth: str | None


@dataclass(frozen=True)
class Shown:
    """What `show` wrote.

    Attributes:
        page: the file.
        title: of the network.
        source: the file that was shown, or which sample of which data.
        decision: over time.
        rates: spikes per neuron and step of every layer that fires.
        left_out: what is not in the page, in words.
    """

    page: Path
    title: str
    source: str
    decision: Decision
    rates: dict[str, float]
    left_out: tuple[str, ...]


def show(
    run: PathLike,
    out: PathLike,
    file: PathLike | None = None,
    index: int = 0,
    layers: Sequence[str] = (),
    data: Json | None = None,
) -> Shown:
    """Runs one input through a trained network and writes a page that plays its spikes.

    Args:
        run: the folder of a finished run, or `weights:NAME`.
        out: the file to write.
        file: a picture, an event recording or sound, as `own_files` takes it for the run's data set; without it a
            sample of the test data.
        index: of that sample.
        layers: names of the neuron layers to show; all without, and of large ones a part.
        data: settings of the test data that replace the run's, such as `{"root": "DATA"}`.

    Raises:
        UsageError: the run is unfinished or does not classify, no such file, sample or layer, data that are not there
            or do not fit the network, or a place that cannot be written.
    """
    trained = load_classifier(run)
    dataset, index, source = (
        _sample(trained, index, data or {}) if file is None else (_own_file(trained, file), 0, os.fspath(file))
    )
    batch, labels = dataset.batch([index])
    x = dataset.encode(batch)
    try:
        activity = record_activity(trained.model, x, layers)
    except UsageError:
        raise
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{trained.run.title} cannot take {source} of shape {tuple(x.shape)}: {reason}") from None
    decision = _decision(activity.logits, dataset.classes, None if file is not None else int(labels[0]))
    seen = input_pictures(dataset, batch[0])
    left_out = _left_out(activity, seen)
    page = _render(trained, source, activity, decision, seen, left_out)
    with atomic(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return Shown(Path(out), trained.run.title, source, decision, activity.rates, left_out)


def _own_file(trained: Classifier, file: PathLike) -> Any:
    path, data = Path(file), trained.run.settings.data
    if not path.is_file():
        raise DataFileError(f"{path}: {'a folder: name one of its files' if path.is_dir() else 'no such file'}")
    return own_files(data.name, data.options, [path], trained.num_classes, trained.summary.get("classes"))


def _sample(trained: Classifier, index: int, data: Json) -> tuple[Any, int, str]:
    """The test data, the index, and what to call this sample."""
    settings = check_settings(merge(trained.run.settings.model_dump(), {"data": data}), str(trained.run.folder))
    try:
        _, dataset = build_datasets(settings, train=False)
    except UsageError as error:
        raise type(error)(f"{error}; or name a file to show") from None
    if not 0 <= index < len(dataset):
        raise UsageError(f"--index must lie from 0 to {len(dataset) - 1} in {dataset.title}, got {index}")
    return dataset, index, f"sample {index} of {dataset.title}"


def _decision(logits: Tensor, names: Sequence[str], truth: int | None) -> Decision:
    counts = torch.arange(1, len(logits) + 1).unsqueeze(1)
    found = (logits.cumsum(0) / counts).softmax(1)
    leaders: list[int] = found.argmax(1).tolist()
    order: list[int] = found[-1].argsort(descending=True, stable=True).tolist()
    wanted = [*order[:_CLASSES], *([] if truth is None else [truth]), *leaders]
    chosen = sorted(list(dict.fromkeys(wanted))[:_MOST_CLASSES], key=order.index)
    return Decision(
        tuple(names[label] for label in chosen),
        tuple(tuple(round(row[label], 5) for label in chosen) for row in found.tolist()),
        tuple(names[label] for label in leaders),
        None if truth is None else names[truth],
    )


def _left_out(activity: Activity, seen: InputPictures) -> tuple[str, ...]:
    shown = {layer.name.partition(" (call ")[0] for layer in activity.layers}
    unseen = [name for name in activity.rates if name not in shown]
    lines = [seen.left_out] if seen.left_out else []
    if unseen:
        lines.append(f"Spikes of {len(unseen)} layers that --layer does not name; their rates are in the table.")
    lines += [f"{layer.name}: here are {part}." for layer in activity.layers if (part := layer.left_out())]
    lines += [f"{layer.name}: no potentials, {layer.why}." for layer in activity.layers if layer.why]
    lines += [f"{name} ({kind}): its output is no spikes, and it is not drawn." for name, kind in activity.others]
    return tuple(lines)


# --- the page ---------------------------------------------------------------------------------------------------------


def _render(
    trained: Classifier,
    source: str,
    activity: Activity,
    decision: Decision,
    seen: InputPictures,
    left_out: Sequence[str],
) -> str:
    steps = len(activity.logits)
    rows = [(t, *(round(100 * p, 2) for p in row)) for t, row in enumerate(decision.probabilities, 1)]
    return fill(
        "show.html",
        plots=False,
        script="show.js",
        title=trained.run.title,
        model=trained.run.settings.model.name,
        source=source,
        steps=steps,
        seen=seen,
        decision=decision,
        probability=100 * max(decision.probabilities[-1]),
        decisions=Table("Probability of each class after so many steps, %", ("step", *decision.classes), rows),
        layers=activity.layers,
        rates=[(name, 100 * rate) for name, rate in activity.rates.items()],
        highest=100 * max(activity.rates.values()) or 1.0,
        left_out=left_out,
        data={
            "steps": steps,
            "frames": seen.pngs if seen.kind == "frames" else [],
            "moving": seen.kind in ("columns", "spikes"),
            "words": seen.words,
            "classes": decision.classes,
            "probabilities": decision.probabilities,
            "leaders": decision.leaders,
            "layers": [_layer(layer) for layer in activity.layers],
        },
    )


def _layer(layer: LayerActivity) -> Json:
    """A layer as the script reads it."""
    values = dataclasses.asdict(layer) | {"neurons": layer.neurons, "picture": layer.picture}
    values["rates"] = [round(rate, 6) for rate in layer.rates]
    return values
