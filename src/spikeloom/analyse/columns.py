"""What rows of published tables print beside accuracy and size, measured of a trained run."""

from __future__ import annotations

import re
from typing import Any

import torch

from spikeloom.analyse.audit.api import audit
from spikeloom.analyse.audit.attention_products import attention_maps
from spikeloom.analyse.audit.energy import paper_rule
from spikeloom.analyse.load import open_target
from spikeloom.models.syna import SynAUnit
from spikeloom.record import RateMeter
from spikeloom.train.evaluate import evaluate_run
from spikeloom.train.loop import Progress
from spikeloom.train.recipe import check_settings, merge
from spikeloom.train.run import Run

Json = dict[str, Any]
_IMAGES = 64  # from which energy, operations and rates are counted


def published_columns(recipe: str, published: Json, run: Run, summary: Json, progress: Progress) -> Json:
    """The columns of a row that a run can fill.

    Args:
        recipe: name of the table; its document decides the rule of energy.
        published: what the row prints, by column.
        run: trained.
        summary: of the run.
        progress: is told of evaluations.

    Returns:
        Of the published columns, in their order:

        - `sec_per_epoch`, `hours`, `memory_GB`: of the training.
        - `acc5`: top-5 accuracy.
        - `acc_N`: accuracy on pictures of N x N, cut from a shorter side that is as much longer as in training. Left
          out where training had pictures of less than half that side.
        - `energy_uJ`, `energy_mJ`, `ops_G`: of an image, by the paper's rule.
        - `attention_ops_M`, `attention_energy_uJ`: of the product of Q and K in a layer, as `attention_maps`.
        - `rate`: spikes per neuron and step.
        - `spikes_per_neuron`: spikes per neuron and sample.
        - `shortcut_rates`: the same at the end of each shortcut of a SynA-ResNet, in their order.

        Of a run that was trained with a penalty on its rates also `rate`, and where steps have a length
        `spikes_per_ms`, of a sample.
    """
    found: Json = {
        "sec_per_epoch": summary["seconds"] / summary["epochs"],
        "hours": summary["seconds"] / 3600,
        "memory_GB": None if (memory := summary.get("memory_MB")) is None else memory / 1e3,
        "acc5": summary.get("test_top5"),
        **_energy(recipe, published, run),
        **_larger(published, run, progress),
    }
    penalised = run.settings.train.rate_penalty is not None
    if penalised or not {"rate", "spikes_per_neuron", "shortcut_rates"}.isdisjoint(published):
        found |= _firing(run)
    wanted = [*published, *(["rate", "spikes_per_ms"] if penalised else [])]
    return {name: found[name] for name in wanted if found.get(name) is not None}


def _energy(recipe: str, published: Json, run: Run) -> Json:
    if {"energy_uJ", "energy_mJ", "ops_G", "attention_ops_M", "attention_energy_uJ"}.isdisjoint(published):
        return {}
    target = open_target(run.folder, {"images": _IMAGES, "data": {"root": run.settings.data.root}})
    audited = audit(target.model, target.batches())
    energy = audited.energy(paper_rule(recipe, run.settings.model.name))
    found: Json = {
        "energy_uJ": energy.pj / 1e6,
        "energy_mJ": energy.pj / 1e9,
        "ops_G": (energy.macs + energy.acs) / 1e9,
    }
    if maps := attention_maps(audited.rows, audited.costs):
        found["attention_ops_M"] = sum(each.operations for each in maps) / len(maps) / 1e6
        found["attention_energy_uJ"] = sum(each.energy_pj for each in maps) / len(maps) / 1e6
    return found


def _larger(published: Json, run: Run, progress: Progress) -> Json:
    """Accuracies on larger pictures than those of the training."""
    found: Json = {}
    options = run.settings.data.options
    size, resize = options.get("size"), options.get("resize")
    for side in [int(match[1]) for key in published if (match := re.fullmatch(r"acc_(\d+)", key))]:
        if size is None or not size <= side <= 2 * size:
            continue
        larger: Json = {"size": side} | ({} if resize is None else {"resize": side + resize - size})
        settings = check_settings(merge(run.settings.model_dump(), {"data": larger}), str(run.folder))
        found[f"acc_{side}"] = evaluate_run(run, settings, progress)["test_accuracy"]
    return found


@torch.no_grad()
def _firing(run: Run) -> Json:
    """Rates on test images, and the spikes of a sample in a millisecond, where steps have a length."""
    target = open_target(run.folder, {"images": _IMAGES, "data": {"root": run.settings.data.root}})
    samples, steps = 0, 0
    with RateMeter(target.model.eval()) as meter:
        for x, _ in target.batches():
            logits = target.model(x)
            samples += logits.shape[1]
            steps += logits.shape[1] * len(logits)
    milliseconds = steps * 1e3 * run.settings.model.options.get("time_step", 0.0)
    spikes, rates = sum(meter.spikes().values()), meter.rates()
    ends = [
        rates[f"{name}.shortcut.{len(list(unit.shortcut.children())) - 1}"]
        for name, unit in target.model.named_modules()
        if isinstance(unit, SynAUnit) and unit.shortcut is not None
    ]
    return {
        "rate": meter.mean(),
        "spikes_per_neuron": meter.mean() * steps / samples,
        "spikes_per_ms": spikes / milliseconds if milliseconds else None,
        "shortcut_rates": " ".join(f"{round(rate, 4):g}" for rate in ends) or None,
    }
