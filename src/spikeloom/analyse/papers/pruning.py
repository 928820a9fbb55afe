"""Natural pruning of SynA-ResNet: a shortcut that inhibition has silenced is removed, and no prediction changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.models.syna import SynAUnit

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Pruning:
    """What natural pruning found.

    Attributes:
        model: a copy without the silent shortcuts, in eval mode.
        rates: spikes per neuron and step at the end of every shortcut, by the name of its unit.
        removed: the units whose shortcut is gone.
        parameters: how many went with them.
        images: that the model was compared on.
    """

    model: nn.Module
    rates: dict[str, float]
    removed: tuple[str, ...]
    parameters: int
    images: int


@torch.no_grad()
def prune_silent_shortcuts(model: nn.Module, batches: Batches) -> Pruning:
    """Measures the shortcuts of a trained model, removes those that never spike, and proves that nothing changed.

    The proof is of these data: every logit of every step is equal bit for bit. A shortcut that the combining function
    needs, as AND and IAND do, stays.

    Args:
        model: with `SynAUnit`s; it is left as it was.
        batches: makes the batches anew, each inputs [N, ...] or [T, N, ...] and labels. Take the whole test set: a
            shortcut may wake for an image that is not among them.

    Raises:
        UsageError: the model has no shortcut that can be pruned, or there are no batches.
    """
    units = {n: m for n, m in model.named_modules() if isinstance(m, SynAUnit) and m.shortcut is not None}
    if not units:
        raise UsageError(f"{type(model).__name__} has no shortcut of a SynA unit to prune; syna_resnet18 has three")
    pruned = copy.deepcopy(model).eval()
    original = copy.deepcopy(model).eval()
    spikes, elements = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0)

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            spikes[name] += output.sum(dtype=torch.float64).item()
            elements[name] += output.numel()

        return hook

    for name in units:
        shortcut = original.get_submodule(f"{name}.shortcut")
        shortcut.register_forward_hook(count(name))
    expected = [original(x) for x, _ in batches()]
    if not expected:
        raise UsageError("natural pruning needs at least one batch to measure the shortcuts on")
    removed = tuple(name for name, unit in units.items() if spikes[name] == 0 and _passes(unit))
    for name in removed:
        unit = pruned.get_submodule(name)
        assert isinstance(unit, SynAUnit)
        unit.shortcut = None
    for (x, _), logits in zip(batches(), expected, strict=True):
        if not torch.equal(pruned(x), logits):
            raise RuntimeError(f"logits changed when the silent shortcuts of {', '.join(removed)} were removed")
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    images = sum(logits.shape[1] for logits in expected)
    return Pruning(pruned, {n: spikes[n] / elements[n] for n in units}, removed, before - after, images)


def _passes(unit: SynAUnit) -> bool:
    # g(a, 0) = a: without the shortcut's spikes the branch's remain.
    a = torch.tensor([0.0, 1.0])
    return torch.equal(unit.combine(a, torch.zeros(2)), a)


def draw_pruning(found: Pruning, title: str = "Natural pruning") -> Any:
    """The rate at the end of every shortcut; those that are removed have no bar, and say so."""
    import plotly.graph_objects as go

    texts = ["removed" if name in found.removed else f"{rate:.2%}" for name, rate in found.rates.items()]
    figure = go.Figure(go.Bar(x=list(found.rates), y=list(found.rates.values()), text=texts, textposition="outside"))
    figure.update_layout(title=title, yaxis={"title": "spikes per neuron and step", "rangemode": "tozero"})
    return figure
