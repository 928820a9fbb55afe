"""Figures and tables of the papers that are computed, as measurements that recipes name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spikeloom.analyse.audit.api import audit
from spikeloom.analyse.audit.cost import count_cost
from spikeloom.analyse.audit.energy import report_readings
from spikeloom.analyse.confusion import confusion, draw_confusion
from spikeloom.analyse.load import Target, open_target, open_targets
from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.analyse.papers.isometry import Isometry, block_isometry, draw_isometry
from spikeloom.analyse.papers.landscape import draw_landscape, loss_landscape
from spikeloom.analyse.papers.pruning import draw_pruning, prune_silent_shortcuts
from spikeloom.analyse.papers.residual_influence import draw_influence, residual_influence, simulate_influence
from spikeloom.analyse.papers.similarity import block_similarity, draw_similarity
from spikeloom.analyse.spike_plots import (
    draw_raster,
    draw_responses,
    draw_spike_maps,
    probe_current,
    responses,
    spike_train,
)
from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.models import MODELS
from spikeloom.neurons import NEURONS
from spikeloom.train.losses import sdt

Json = dict[str, Any]


def _title(target: Target) -> str:
    return target.title.removesuffix(", untrained")


def _compared(
    networks: list[str], data: Json | None, images: int, model: Json | None, shortcuts: list[str] | None
) -> Iterator[tuple[str, Target]]:
    """Networks by their titles: named models with the options and with each shortcut, runs as they were trained."""
    for name in networks:
        named = name in MODELS and not Path(name).is_dir()
        for shortcut in (shortcuts or [None]) if named else [None]:
            options = (model or {}) | ({} if shortcut is None else {"shortcut": shortcut})
            [target] = open_targets([name], data, images, options if named else None)
            yield _title(target) if shortcut is None else f"{_title(target)}, {shortcut}", target


@MEASUREMENTS.register
def energy(network: str, images: int = 1000, data: dict[str, Any] | None = None) -> Measured:
    """What enters every layer of a network, and its energy by every rule; the course report's readings beside them.

    Args:
        network: a run's folder or a model's name.
        images: of the test data.
        data: a data set with its options, instead of the run's.
    """
    target = open_target(network, {"images": images} | ({"data": data} if data else {}))
    x, _ = next(target.batches())
    found = audit(target.ready(x), target.batches())
    energies = {f"energy_uJ_{name}": value.pj / 1e6 for name, value in found.energies().items()}
    values: dict[str, float | str | bool | None] = {
        "spike_driven": found.spike_driven,
        "images": found.images,
        "parameters": found.parameters,
        **energies,
    }
    if x.dim() == 4:
        cost = count_cost(target.model, tuple(x.shape[1:]), round(found.steps))
        readings = report_readings(found.rows, found.steps, found.costs, cost.flops_s0)
        values |= {f"energy_uJ: {name}": pj / 1e6 for name, pj in readings.items()}
        values["flops_M"] = cost.flops_s0 / 1e6
    rows = [
        {
            "layer": r.name,
            "input": r.input,
            "max": r.max,
            "rate": r.rate,
            "macs": r.macs,
            "acs": r.acs,
            "energy_pj": r.energy_pj,
            "why": r.why,
        }
        for r in found.rows
    ]
    return Measured(values, {f"what enters each layer of {target.title}": rows})


@MEASUREMENTS.register
def spike_maps(networks: list[str], data: dict[str, Any] | None = None, image: int = 0, channels: int = 16) -> Measured:
    """Spikes behind the first neuron of each network on one image (course report, figure 11).

    Args:
        networks: folders of runs or names of models; a name alone is an untrained network.
        data: the data set with its options.
        image: which test image.
        channels: how many are drawn.
    """
    maps: dict[str, Tensor] = {}
    values: dict[str, float | str | bool | None] = {}
    for target in open_targets(networks, data, image + 1):
        x, _ = next(target.batches())
        # Steps first or not, the batch axis has the length that was asked for.
        one = x[image : image + 1] if x.dim() == 4 else x[:, image : image + 1]
        layer, spikes = spike_train(target.ready(x), one)
        maps[_title(target)] = spikes[:, 0]
        values[f"rate of {layer} in {_title(target)}"] = spikes.mean().item()
    figures = {"maps": draw_spike_maps(maps, channels)}
    for index, (title, spikes) in enumerate(maps.items()):
        figures[f"raster{index}"] = draw_raster(spikes, title)
    return Measured(values, {}, figures)


@MEASUREMENTS.register
def natural_pruning(network: str, images: int = 1000, data: dict[str, Any] | None = None) -> Measured:
    """Which shortcuts of a SynA-ResNet are silent, and what goes with them; no logit changes (SynA-ResNet, Sec. V-B3).

    Args:
        network: a run's folder, or a model's name for an untrained network.
        images: of the test data.
        data: a data set with its options, instead of the run's.
    """
    [target] = open_targets([network], data, images, batch=min(images, 32))
    x, _ = next(target.batches())
    found = prune_silent_shortcuts(target.ready(x), target.batches)
    values: dict[str, float | str | bool | None] = {
        "shortcuts": len(found.rates),
        "removed": len(found.removed),
        "removed_parameters": found.parameters,
        "images": found.images,
        "logits_changed": False,
    }
    rows = [{"unit": name, "rate": rate, "removed": name in found.removed} for name, rate in found.rates.items()]
    return Measured(values, {f"shortcuts of {target.title}": rows}, {"shortcuts": draw_pruning(found)})


@MEASUREMENTS.register
def neuron_responses(neurons: list[str], steps: int = 120) -> Measured:
    """Single neurons on a test current (ParaLIF, figure of the responses).

    Args:
        neurons: names in the registry, or `ParaLIF:gs` for a firing function.
        steps: T.
    """
    current = probe_current(steps)
    layers: dict[str, nn.Module] = {}
    for name in neurons:
        kind, _, firing = name.partition(":")
        layers[name] = NEURONS[kind](firing=firing) if firing else NEURONS[kind]()
    found = responses(layers, current)
    values: dict[str, float | str | bool | None] = {f"spikes of {name}": s.sum().item() for name, s in found.items()}
    values |= {f"spikes of {name} at rest": s[: steps // 4].sum().item() for name, s in found.items()}
    return Measured(values, {}, {"responses": draw_responses(current, found)})


@MEASUREMENTS.register
def residual_influence_probability(rate: float = 0.2, v_threshold: float = 0.5, sigma: float = 0.5) -> Measured:
    """How often a residual branch changes a vanilla block's spike: by formula and by drawing (MS-ResNet, Sec. III).

    Args:
        rate: of the shortcut's spikes.
        v_threshold, sigma: of the neuron and of the branch.
    """
    values: dict[str, float | str | bool | None] = {
        "probability": residual_influence(rate, v_threshold, sigma),
        "simulated": simulate_influence(rate, v_threshold, sigma),
    }
    return Measured(values, {}, {"influence": draw_influence(v_threshold, sigma)})


@MEASUREMENTS.register
def similarity(
    networks: list[str],
    data: dict[str, Any] | None = None,
    images: int = 64,
    model: dict[str, Any] | None = None,
    shortcuts: list[str] | None = None,
) -> Measured:
    """SSIM of the firing rates of consecutive blocks, as a radar plot (MS-ResNet).

    Args:
        networks: folders of runs or names of models; a name alone is an untrained network.
        data: the data set with its options.
        images: of the test part, one batch.
        model: options of all named models.
        shortcuts: that named models are built with, one after the other; their own without them.
    """
    found: Json = {}
    for title, target in _compared(networks, data, images, model, shortcuts):
        x, _ = next(target.batches())
        found[title] = block_similarity(target.ready(x), x)
    values: dict[str, float | str | bool | None] = {
        f"blocks of {n} at exactly 1": sum(r.equal for r in v) for n, v in found.items()
    }
    tables = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    return Measured(values, tables, {"radar": draw_similarity(found)})


@MEASUREMENTS.register
def isometry(
    networks: list[str],
    data: dict[str, Any] | None = None,
    images: int = 4,
    probes: int = 64,
    model: dict[str, Any] | None = None,
    shortcuts: list[str] | None = None,
) -> Measured:
    """Block dynamical isometry phi(J J^T) by Hutchinson probes (MS-ResNet).

    Args:
        networks, data, images, model, shortcuts: as `similarity`.
        probes: per block.
    """
    found: dict[str, list[Isometry]] = {}
    for title, target in _compared(networks, data, images, model, shortcuts):
        x, _ = next(target.batches())
        found[title] = block_isometry(target.ready(x), x, probes)
    values: dict[str, float | str | bool | None] = {
        f"mean phi of {name}": sum(row.phi for row in rows) / len(rows) for name, rows in found.items()
    }
    tables = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    return Measured(values, tables, {"phi": draw_isometry(found)})


@MEASUREMENTS.register
def landscape(
    networks: list[str],
    data: dict[str, Any] | None = None,
    images: int = 128,
    points: int = 21,
    model: dict[str, Any] | None = None,
    shortcuts: list[str] | None = None,
) -> Measured:
    """The loss around the weights on a plane of two filter-normalised directions (MS-ResNet).

    Args:
        networks, data, images, model, shortcuts: as `similarity`.
        points: of the grid on each axis.
    """
    measured = Measured()
    for index, (title, target) in enumerate(_compared(networks, data, images, model, shortcuts)):
        batches = list(target.batches())
        found = loss_landscape(target.ready(batches[0][0]), sdt, batches, points)
        measured.values[f"roughness of {title}"] = found.roughness
        measured.tables[title] = [
            {"b": b, "losses": list(row)} for b, row in zip(found.steps, found.losses, strict=True)
        ]
        measured.figures[f"surface{index}"] = draw_landscape(found, title)
    return measured


@MEASUREMENTS.register
def confusions(runs: list[PathLike], images: int = 1 << 30, data: dict[str, Any] | None = None) -> Measured:
    """Confusion matrices of trained runs, the classes in which the last is better than the first.

    Args:
        runs: folders of finished runs on one data set, the base first.
        images: of the test data; all by default.
        data: options of the runs' data, such as `root`.
    """
    if not runs:
        raise UsageError("""name the runs to compare: 'measure.runs=["runs/BASE", "runs/OTHER"]'""")
    measured, found = Measured(), []
    for index, folder in enumerate([os.fspath(run) for run in runs]):
        target = open_target(folder, {"images": images, "data": data or {}})
        found.append(confusion(target.model, target.batches(), target.classes))
        measured.values[f"accuracy of {folder}"] = found[-1].accuracy
        measured.tables[folder] = [
            {
                "class": name,
                "accuracy": None if math.isnan(each) else each,
                **dict(zip(target.classes, row, strict=True)),
            }
            for name, each, row in zip(target.classes, found[-1].per_class, found[-1].counts, strict=True)
        ]
        measured.figures[f"matrix{index}"] = draw_confusion(found[-1], folder)
    measured.values["classes improved"] = f"{len(found[-1].improved(found[0]))} of {len(found[0].classes)}"
    return measured
