"""The report of one or more runs: one HTML file that needs no network (templates in `page/`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikeloom.analyse.audit.api import Audit
from spikeloom.analyse.audit.energy import paper_rule
from spikeloom.analyse.confusion import Confusion, draw_confusion
from spikeloom.analyse.papers.rates import draw_layer_rates
from spikeloom.analyse.report.data import RunData, Work, changes, gather_run, is_number
from spikeloom.analyse.report.plain_figure import plain_figure
from spikeloom.analyse.report.raster import Raster
from spikeloom.analyse.report.template import Plot, Table, fill, shown
from spikeloom.analyse.spike_plots import draw_raster
from spikeloom.analyse.training_curves import metric_curves
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, atomic
from spikeloom.train.environments import train_accuracies

Json = dict[str, Any]
_CLASSES = 200  # of a confusion matrix that is drawn; of a larger one only the mistakes are listed
# What does not decide the result, or is where the data happen to lie.
_ELSEWHERE = ("data.root=", "data.download=", "train.checkpoint_minutes=")


def write_report(
    folders: PathLike | Sequence[PathLike], values: Json, work: Work, out: PathLike | None = None
) -> tuple[Path, list[str]]:
    """Writes the report of some runs, side by side.

    Args:
        folders: of a run or of several, unfinished and damaged ones too.
        values: `data.*` and `images`: what to measure anew; empty to keep what was measured before.
        work: is told how it goes.
        out: the file to write; in the first folder `report.html`, or `compared.html` of several runs, if None.

    Returns:
        The file, and what is missing or broken in the runs.

    Raises:
        UsageError: a folder that is no run, the same one twice, or a place that cannot be written.
    """
    folders = [Path(folder) for folder in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a run is named twice: name each run once")
    out = Path(out) if out else folders[0] / ("report.html" if len(folders) == 1 else "compared.html")
    runs = [gather_run(folder, values, work) for folder in folders]
    page = render(runs)
    with atomic(out) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))
    return out, [f"{run.folder}: {problem}" for run in runs for problem in run.problems]


def render(runs: Sequence[RunData]) -> str:
    """The page."""
    names, several = _names(runs), len(runs) > 1
    return fill(
        "report.html",
        plots=True,
        title=f"{len(runs)} runs compared" if several else runs[0].title,
        several=several,
        runs=[_run(run, name, several) for run, name in zip(runs, names, strict=True)],
        overview=_overview(runs, names),
        different=_different(runs, names) if several else None,
        published=_published(runs, names),
        curves=_curves(runs, names),
        rates=_rates(runs, names),
        energies=_energies(runs, names),
        spent=_spent(runs, names),
        environment=_environment(runs, names),
    )


def _names(runs: Sequence[RunData]) -> list[str]:
    """A short name for each run: its title, or its folder where all have one title, or both where some have."""
    titles = [run.title for run in runs]
    if len(runs) > 1 and len(set(titles)) == 1:
        return [str(run.folder) for run in runs]
    return [
        title if titles.count(title) == 1 else f"{title} ({run.folder})"
        for run, title in zip(runs, titles, strict=True)
    ]


# --- one run ----------------------------------------------------------------------------------------------------------


def _run(run: RunData, name: str, several: bool) -> Json:
    measured, matrix, audit = run.measured, run.measured.confusion, run.measured.audit
    settings = None if run.run is None else run.run.settings.model_dump()
    return {
        "name": name,
        "folder": str(run.folder),
        "problems": run.problems,
        "command": run.command,
        "settings": settings and json.dumps(settings, indent=2),
        "changes": run.run.changes_in_words() if run.run is not None else [],
        "differs": _against_full(run),
        "row": run.row,
        "budget": run.budget,
        "confusion": _confusion(matrix, name if several else "Classes and predictions") if matrix else None,
        "mistakes": _mistakes(matrix) if matrix else None,
        "audit": _layers(audit) if audit else None,
        "verdict": audit.verdict() if audit else [],
        "data": measured.data,
        "audited": measured.audited,
        "rasters": [_raster(raster) for raster in measured.rasters],
    }


def _against_full(run: RunData) -> Table | None:
    """The settings in which a run differs from the published row's full budget."""
    if run.full is None or run.run is None:
        return None
    full, own = run.full.model_dump(), run.run.settings.model_dump()
    before, after = _flat(own, full), _flat(full, own)
    rows = [
        (key, before.get(key, "-"), after.get(key, "-"))
        for key in dict.fromkeys([*before, *after])
        if f"{key}=" not in _ELSEWHERE
    ]
    return Table("Settings that differ from the full budget", ("setting", "full budget", "this run"), rows)


def _flat(base: Json, target: Json) -> dict[str, str]:
    """What `changes` says, by key; a name alone and a name with options have one key."""
    words = [word.partition("=") for word in changes(base, target)]
    return {key.removesuffix(".name"): "-" if value == "none" else value for key, _, value in words}


def _confusion(found: Confusion, name: str) -> Plot | None:
    count = len(found.classes)
    if count > _CLASSES:
        return None
    words = f"Confusion matrix of {count} classes: {found.accuracy:.2f} % of the images are on its diagonal."
    if count <= 20:
        rows = [(label, *row) for label, row in zip(found.classes, found.counts, strict=True)]
        table = Table("Images by class (rows) and predicted class (columns)", ("class", *found.classes), rows)
    else:
        rows = [(label, round(each, 2)) for label, each in zip(found.classes, found.per_class, strict=True)]
        table = Table("Accuracy of each class", ("class", "accuracy, %"), rows, sortable=True)
    return Plot(name, words, plain_figure(draw_confusion(found)), table, square=True)


def _mistakes(found: Confusion) -> Table:
    return Table("The most frequent mistakes", ("class", "taken for", "images"), found.mistakes(10))


def _layers(found: Audit) -> Table:
    head = ("layer", "energy, nJ", "input", "max", "rate, %", "MACs", "ACs", "dead channels", "breaks it because")
    rows = [
        (
            row.name,
            row.energy_pj / 1e3,
            row.input,
            float(row.max),
            100 * row.rate,
            round(row.macs),
            round(row.acs),
            f"{row.dead} of {row.channels}" if row.channels else "-",
            row.why if row.breaks else "",
        )
        for row in found.rows
    ]
    caption = f"What enters each layer and what it costs, for one image of {found.steps:g} steps"
    return Table(caption, head, rows, sortable=True)


def _raster(raster: Raster) -> Json:
    spikes = raster.tensor()
    each = spikes.sum(1).int().tolist()
    says = "" if raster.label is None else f"class {raster.label}, predicted {raster.predicted}"
    some = "all" if raster.shown == raster.neurons else f"{raster.shown} of {raster.neurons:,}"
    words = f"{int(spikes.sum())} spikes of {some} neurons of {raster.layer} in {raster.steps} steps."
    table = Table("Spikes of these neurons at each step", ("step", "spikes"), list(enumerate(each)))
    title = f"Test image: {says}" if says else "Test image"
    plot = Plot(title, words, plain_figure(draw_raster(spikes)), table) if raster.spikes else None
    return {
        "png": raster.png,
        "alt": f"Test image, {says}" if says else "Test image",
        "plot": plot,
        "title": title,
        "words": words,
    }


# --- runs side by side ------------------------------------------------------------------------------------------------


def _rows(runs: Sequence[RunData], values: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A row a quantity, from functions of a run; a row that no run has is left out."""
    rows: list[tuple[Any, ...]] = []
    for name, value in values.items():
        cells = [value(run) for run in runs]
        if any(cell is not None for cell in cells):
            rows.append((name, *cells))
    return rows


def _overview(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    def setting(*path: str) -> Any:
        def get(run: RunData) -> Any:
            value: Any = None if run.run is None else run.run.settings.model_dump()
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            return value

        return get

    rows = _rows(
        runs,
        {
            "about": lambda r: r.about or None,
            "folder": lambda r: str(r.folder),
            "state": lambda r: "finished" if r.summary else "not finished",
            "recipe": lambda r: r.run and r.run.recipe,
            "row": lambda r: r.run and r.run.row,
            "published system": lambda r: r.row and r.row.system,
            "budget": lambda r: r.budget or None,
            "seed": setting("seed"),
            "model": setting("model", "name"),
            "neuron": setting("neuron", "name"),
            "steps T": lambda r: (a := r.measured.audit) and a.steps,
            "parameters": lambda r: _number(r.summary.get("parameters")),
            "training data": lambda r: _data(r, "train"),
            "test data": lambda r: _data(r, "test"),
            "epochs": lambda r: len(r.records) or None,
            "test accuracy, %": lambda r: _number(r.summary.get("test_accuracy")),
            "best test accuracy, %": lambda r: _number(r.summary.get("best_test_accuracy")),
            "test loss": lambda r: _number(r.summary.get("test_loss")),
            "energy of one image, uJ": lambda r: (a := r.measured.audit) and a.energy_pj / 1e6,
            "spike-driven": lambda r: (a := r.measured.audit) and _said(a.spike_driven),
        },
    )
    return Table("What was run, and what came out", ("", *names), rows)


def _said(spike_driven: bool | None) -> bool | str:
    return "cannot tell" if spike_driven is None else spike_driven


def _number(value: Any) -> float | int | None:
    return value if is_number(value) else None


def _data(run: RunData, part: str) -> str | None:
    data = run.summary.get("data")
    return str(data[part]) if isinstance(data, dict) and part in data else None


def _different(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    flat = [_flat({}, run.run.settings.model_dump()) if run.run else {} for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [(key, *(each.get(key) for each in flat)) for key in keys if len({each.get(key) for each in flat}) > 1]
    return Table("Settings in which the runs differ", ("setting", *names), rows)


_PUBLISHED = {
    "acc": "test accuracy, %",
    "params_M": "parameters, millions",
    "flops_M": "FLOPs, millions",
    "macs_M": "MACs, millions",
    "energy_uJ": "energy of one image, uJ",
    "energy_mJ": "energy of one image, mJ",
    "hours": "training, hours",
    "sec_per_epoch": "training, seconds an epoch",
    "memory_GB": "peak memory, GB",
}


def _found(run: RunData) -> Json:
    """What a run measured, by the names under which recipes publish."""
    seconds, memory = _number(run.summary.get("seconds")), _number(run.summary.get("memory_MB"))
    found: Json = {"acc": _number(run.summary.get("test_accuracy")), **run.measured.cost}
    if run.measured.audit is not None and run.run is not None:
        rule = paper_rule(run.run.recipe, run.run.settings.model.name)  # of what stands beside it
        pj = run.measured.audit.energy(rule).pj
        found |= {"energy_uJ": pj / 1e6, "energy_mJ": pj / 1e9}
    if seconds is not None and run.records:
        found |= {"hours": seconds / 3600, "sec_per_epoch": seconds / len(run.records)}
    if memory is not None:
        found["memory_GB"] = memory / 1e3
    selected = run.summary.get("selected")
    if isinstance(selected, dict):
        found |= {f"acc_train{n}": each for n, each in enumerate(train_accuracies(selected), 1)}
        found["acc_test"] = selected.get("test_accuracy")
    return found


def _published(runs: Sequence[RunData], names: Sequence[str]) -> Table | None:
    keys = dict.fromkeys(key for run in runs if run.row for key in run.row.published)
    if not keys:
        return None
    found = [_found(run) for run in runs]
    head = [part for name in names for part in (f"{name}, published", f"{name}, measured")]
    rows = [
        (
            _PUBLISHED.get(key, key),
            *(
                value
                for run, own in zip(runs, found, strict=True)
                for value in (run.row and run.row.published.get(key), own.get(key))
            ),
        )
        for key in keys
    ]
    return Table(
        "Published beside measured", ("quantity", *(head if len(runs) > 1 else ("published", "measured"))), rows
    )


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> list[Plot]:
    records = {name: run.records for name, run in zip(names, runs, strict=True) if run.records}
    plots: list[Plot] = []
    for what, axis in (("accuracy", "accuracy, %"), ("loss", "loss"), ("penalty", "penalty, without its weight")):
        figure = metric_curves(records, what, axis)
        if not figure.data:
            continue
        ends = "; ".join(f"{trace.name} ends at {trace.y[-1]:.4g}" for trace in figure.data)
        columns = [dict(zip(trace.x, trace.y, strict=True)) for trace in figure.data]
        epochs = sorted({epoch for column in columns for epoch in column})
        rows = [(epoch, *(column.get(epoch) for column in columns)) for epoch in epochs]
        table = Table(f"{what.capitalize()} by epoch", ("epoch", *(trace.name for trace in figure.data)), rows)
        plots.append(
            Plot(what.capitalize(), f"{what.capitalize()} over the epochs: {ends}.", plain_figure(figure), table)
        )
    return plots


def _rates(runs: Sequence[RunData], names: Sequence[str]) -> Plot | None:
    found = {name: r.measured.rates for name, r in zip(names, runs, strict=True) if r.measured.rates}
    if not found:
        return None
    ends = "; ".join(
        f"{name}: from {100 * min(rates.values()):.2f} % to {100 * max(rates.values()):.2f} % in {len(rates)} layers"
        for name, rates in found.items()
    )
    layers = dict.fromkeys(layer for rates in found.values() for layer in rates)
    rows = [(layer, *(100 * rates[layer] if layer in rates else None for rates in found.values())) for layer in layers]
    table = Table("Spikes per neuron and step, %", ("layer", *found), rows, sortable=True)
    return Plot(
        "Firing rate of every layer", f"Firing rates, {ends}.", plain_figure(draw_layer_rates(found, "")), table
    )


def _energies(runs: Sequence[RunData], names: Sequence[str]) -> Table | None:
    audits = {name: r.measured.audit for name, r in zip(names, runs, strict=True) if r.measured.audit}
    if not audits:
        return None
    energies = [audit.energies() for audit in audits.values()]
    rows = [(rule, *(each[rule].pj / 1e6 for each in energies)) for rule in energies[0]]
    head = list(audits) if len(audits) > 1 else ["energy, uJ"]
    return Table("Energy of one image by each published rule, uJ", ("rule", *head), rows, sortable=True)


def _spent(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    def seconds(run: RunData) -> float | None:
        return _number(run.summary.get("seconds", run.records[-1].get("seconds") if run.records else None))

    rows = _rows(
        runs,
        {
            "training, s": seconds,
            "an epoch with its evaluation, s": lambda r: (s := seconds(r)) and r.records and s / len(r.records),
            "peak memory of the training process, MB": lambda r: _number(r.summary.get("memory_MB")),
            "measuring for this report, s": lambda r: r.measured.seconds or None,
        },
    )
    return Table("Time and memory", ("", *names), rows)


def _environment(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    rows = [(str(key), *(shown(run.environment.get(key)) for run in runs)) for key in keys]
    return Table("Where it ran", ("", *names), rows)
