"""What enters the attention of every block: the figures 3 and 4 of Spikingformer (Zhou et al. 2023, appendix E)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.api import as_batches
from spikeloom.analyse.audit.cost import evaluating
from spikeloom.analyse.load import open_target
from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.layers import SpikingSelfAttention


@dataclass
class BlockInput:
    """The values that enter Q, K and V of one block, over all steps, images, channels and tokens.

    Attributes:
        name: of the attention in the model.
        counts: how often each integer occurs, from 0 up.
        others: how many values are no integers from 0 up.
    """

    name: str
    counts: list[int] = field(default_factory=list[int])
    others: int = 0

    @property
    def total(self) -> int:
        return sum(self.counts) + self.others

    @property
    def nonzero(self) -> float:
        """The part of the values that is not 0."""
        return 1 - self.counts[0] / self.total if self.total else math.nan

    @property
    def spikes(self) -> bool:
        """Whether all values are 0 and 1."""
        return len(self.counts) <= 2 and not self.others

    def add(self, x: Tensor) -> None:
        """Counts the values of a tensor."""
        values = x.detach().float().flatten()
        whole = (values >= 0) & (values == values.round())
        found = torch.bincount(values[whole].long()).tolist()
        before = self.counts + [0] * (len(found) - len(self.counts))
        self.counts = [a + b for a, b in zip(before, found + [0] * (len(before) - len(found)), strict=True)]
        self.others += int((~whole).sum())


@contextlib.contextmanager
def watching_blocks(model: nn.Module) -> Generator[list[BlockInput]]:
    """Counts what enters every `SpikingSelfAttention` while the model runs, in the order of the blocks."""
    found: list[BlockInput] = []
    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, SpikingSelfAttention):
            entry = BlockInput(name)
            found.append(entry)
            handles.append(module.register_forward_pre_hook(_adding(entry)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_inputs(model: nn.Module, batches: Tensor | Iterable[Tensor]) -> list[BlockInput]:
    """What enters every `SpikingSelfAttention` of a model, counted.

    Args:
        model: is run in eval mode, and left in the mode in which it was.
        batches: inputs of the model; one alone may be a tensor.
    """
    with watching_blocks(model) as found, evaluating(model):
        for x in as_batches(batches):
            model(x)
    return found


def _adding(entry: BlockInput) -> Any:
    return lambda _module, args: entry.add(args[0])


def draw_block_inputs(found: list[BlockInput], title: str) -> Any:
    """A plotly figure: a histogram a block, counts on a logarithmic scale, with the part that is not 0."""
    from plotly.subplots import make_subplots

    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    names = [f"block {i}: {100 * entry.nonzero:.2f} % not 0" for i, entry in enumerate(found, start=1)]
    figure: Any = make_subplots(rows, columns, subplot_titles=names, shared_yaxes=True)
    for i, entry in enumerate(found):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_bar(
            x=list(range(len(entry.counts))),
            y=entry.counts,
            name=entry.name,
            showlegend=False,
            marker_color="#3b6fb6",
            **place,
        )
    figure.update_yaxes(type="log", dtick=1, matches="y")
    figure.update_yaxes(title_text="values", col=1)
    figure.update_xaxes(dtick=1)
    figure.update_layout(title=title, template="plotly_white")
    return figure


@MEASUREMENTS.register
def attention_inputs(
    run: PathLike, data: dict[str, Any] | None = None, subset: int = 256, batch_size: int = 16
) -> Measured:
    """What enters Q, K and V of every block of a trained transformer, over its test images.

    Args:
        run: folder of a finished run.
        data: options of the run's data, such as `root`.
        subset: test images.
        batch_size: of them at a time.

    Returns:
        `nonzero_percent_block_N`, `largest`, and `spikes_only`; a table of counts; the figure `histograms`.
    """
    if not run:
        raise UsageError("give the folder of a trained transformer as measure.run=RUN")
    given = {"test_subset": subset, **(data or {})}
    target = open_target(run, {"images": subset, "batch": batch_size, "data": given})
    found = block_inputs(target.model, (x for x, _ in target.batches()))
    if not found:
        raise UsageError(f"{os.fspath(run)} trained {target.title}, which has no spiking self-attention")
    values: dict[str, float | str | bool | None] = {
        f"nonzero_percent_block_{i}": 100 * entry.nonzero for i, entry in enumerate(found, start=1)
    }
    values |= {"largest": float(max(len(e.counts) for e in found) - 1), "spikes_only": all(e.spikes for e in found)}
    table = [
        {"block": i, "value": value, "count": count}
        for i, entry in enumerate(found, start=1)
        for value, count in enumerate(entry.counts)
    ]
    title = f"What enters Q, K and V: {target.title} on {target.data}"
    return Measured(values, {title: table}, {"histograms": draw_block_inputs(found, title)})
