"""Rates and gradients of very deep networks before training (SEW ResNet, figures 5 to 8), as recipes measure them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.analyse.papers.gradients import BlockGradient, block_gradients, draw_gradients, growth, verdict
from spikeloom.analyse.papers.rates import BlockRates, block_rates, draw_rates
from spikeloom.data import create_dataset
from spikeloom.models import create_model
from spikeloom.neurons import IF
from spikeloom.surrogates import ATan
from spikeloom.train.losses import sdt

Layout = Literal["cifar", "imagenet"]
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "Spiking": ("spiking", {}),
    "ADD": ("sew", {"combine": "add"}),
    "AND": ("sew", {"combine": "and"}),
    "IAND": ("sew", {"combine": "iand"}),
}
FIGURES = {"fig 6": (1.0, 2.0), "fig 7": (0.5, 2.0), "fig 8": (1.0, 3.0)}
"""V_th and the alpha of the ArcTan surrogate."""


def _batch(data: dict[str, Any] | None, images: int, size: int | None) -> tuple[Tensor, Tensor, int, str]:
    options: dict[str, Any] = {"split": "train", "subset": images, **(data or {"name": "digits", "size": 32})}
    dataset = create_dataset(**options)
    x, y = dataset.batch(range(images))
    if size is not None:
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    return x, y, len(dataset.classes), dataset.title


def _networks(
    layout: Layout, n: int, x: Tensor, classes: int, v_threshold: float, alpha: float
) -> Iterator[tuple[str, nn.Module]]:
    """The four forms, with and without zero-init, all with the same random weights."""
    neuron = functools.partial(IF, v_threshold=v_threshold, surrogate=ATan(alpha))
    seed = torch.initial_seed()
    for form, (kind, options) in FORMS.items():
        for zero_init in (True, False):
            shape: dict[str, Any] = {"n": n} if layout == "cifar" else {}
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = create_model(
                    f"{kind}_resnet_cifar" if layout == "cifar" else f"{kind}_resnet152",
                    in_channels=x.shape[1],
                    num_classes=classes,
                    neuron=neuron,
                    zero_init=zero_init,
                    **options,
                    **shape,
                )
            yield f"{form}, {'zero-init' if zero_init else 'no zero-init'}", model.train()


@MEASUREMENTS.register
def gradients_by_depth(
    layout: Layout = "cifar",
    n: int = 25,
    images: int = 8,
    size: int | None = None,
    data: dict[str, Any] | None = None,
) -> Measured:
    """What gradients do inside identity regions of untrained networks, in the settings of figures 6, 7 and 8.

    Args:
        layout: "cifar" for 6n + 2 layers, "imagenet" for the 152 layers of the paper.
        n: blocks of a stage of the former.
        images: of the batch.
        size: to which they are enlarged.
        data: the data set with its options; the digits without it.

    Returns:
        For every figure and network a verdict and the growth of log |dL/dS| per block; for figure 8 without zero-init
        whether that is above figure 6's.
    """
    x, y, classes, title = _batch(data, images, size)
    measured, growths = Measured({"data": title}), {}
    for figure, (v_threshold, alpha) in FIGURES.items():
        found: dict[str, list[BlockGradient]] = {}
        for name, model in _networks(layout, n, x, classes, v_threshold, alpha):
            found[name] = block_gradients(model, x, y, sdt)
            growths[figure, name] = growth(found[name])
            said = verdict(found[name])
            if figure == "fig 8" and "no zero-init" in name and not name.startswith("Spiking"):
                more = growths[figure, name] > growths["fig 6", name]
                said = f"{said}, {'larger' if more else 'not larger'} than in fig 6"
            measured.values[f"{figure}: {name}"] = said
        measured.tables[figure] = [
            {"network": name, "growth": f"{growths[figure, name]:.4f}", "norms": [row.norm for row in rows]}
            for name, rows in found.items()
        ]
        measured.figures[figure.replace(" ", "")] = draw_gradients(
            found, f"{figure}: |dL/dS| at V_th = {v_threshold:g}, alpha = {alpha:g}"
        )
    return measured


def _slope(rates: list[BlockRates]) -> float:
    """Of the outputs from block to block where shapes stay."""
    steps = [b.output - a.output for a, b in itertools.pairwise(rates) if b.same_shape]
    return sum(steps) / max(len(steps), 1)


@MEASUREMENTS.register
def rates_by_depth(
    layout: Layout = "cifar",
    n: int = 25,
    images: int = 8,
    size: int | None = None,
    data: dict[str, Any] | None = None,
) -> Measured:
    """Rates of A and O of every block of untrained networks (figure 5). Arguments as `gradients_by_depth`."""
    x, _, classes, title = _batch(data, images, size)
    found = {name: block_rates(model, x) for name, model in _networks(layout, n, x, classes, 1.0, 2.0)}
    outputs = {name: [row.output for row in rows] for name, rows in found.items()}
    first, *others = (outputs[f"{form}, zero-init"] for form in FORMS)
    still = [
        after.output == before.output
        for form in FORMS
        for before, after in itertools.pairwise(found[f"{form}, zero-init"])
        if after.same_shape
    ]
    values: dict[str, float | str | bool | None] = {
        "data": title,
        "zero-init: O of all four is one curve": all(other == first for other in others),
        "zero-init: O is constant where shapes stay": all(still),
    }
    for form in FORMS:
        rows = found[f"{form}, no zero-init"]
        slope = _slope(rows)
        trend = "silent" if rows[-1].output == 0 else "grows" if slope > 1e-4 else "decays" if slope < -1e-4 else "flat"
        values[f"no zero-init: O of {form}"] = trend
        values[f"no zero-init: largest rate of A of {form}"] = max(row.branch for row in rows)
    tables = {f"rates of {name}": [asdict(row) for row in rows] for name, rows in found.items()}
    return Measured(values, tables, {"rates": draw_rates(found, "Firing rates before training")})
