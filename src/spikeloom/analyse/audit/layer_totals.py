"""What was booked of each layer, and the layer it makes."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spikeloom.analyse.audit.layer import SPIKES, Kind, Layer, Role
from spikeloom.analyse.audit.value_types import TensorSummary, merge_summaries

_MERGED = 32  # summaries that are kept apart: merging costs as much as making one


@dataclass
class LayerTotals:
    """One layer: sums over batches, and the calls of the present batch."""

    name: str  # of the module
    weight: str  # its full name, or the module's
    kind: Kind
    encoder: bool
    seen: list[list[TensorSummary]]  # of each operand, to be merged
    why: list[str]
    operations: float = 0.0
    effective: float = 0.0
    bias: float = 0.0
    outputs: float = 0.0
    runs: int = 0  # rows of its input: images x steps x tokens
    product: tuple[int, int, int] | None = None
    calls: list[list[TensorSummary]] = field(default_factory=list)
    by_step: Tensor | None = None  # summed over images

    def close(self, images: int, steps: int) -> None:
        """Adds the calls of a batch, of so many images and steps, to the sums."""
        self.runs += sum(len(summaries[0].rows) for summaries in self.calls)
        self._add_steps(images, steps)
        for index, seen in enumerate(self.seen):
            seen += [summaries[index] for summaries in self.calls]
            if len(seen) >= _MERGED:
                seen[:] = [merge_summaries(seen)]
        self.calls = []

    def _add_steps(self, images: int, steps: int) -> None:
        rows = [summaries[0].rows for summaries in self.calls]
        if len(self.seen) > 1:
            return  # which operand drives a product is known at the end only
        if len(rows) == steps:
            means = torch.stack([mean.double().mean() for mean in rows])
        elif len(rows) == 1 and len(rows[0]) % steps == 0:
            means = rows[0].double().view(steps, -1).mean(1)
        else:
            means = torch.empty(0)
        if self.by_step is None:
            self.by_step = images * means
        elif len(means) == len(self.by_step):
            self.by_step += images * means
        else:  # batches of different lengths, or one that does not tell
            self.by_step = torch.empty(0)

    def layer(self, name: str, images: int, steps: float, folded: bool, last: bool) -> Layer:
        """The layer of this name, per image; its bias is not counted if `folded`, and the `last` may classify."""
        summaries = [merge_summaries(seen) for seen in self.seen if seen]
        operands = tuple(seen.operand() for seen in summaries)
        role: Role = "encoder" if self.encoder else "classifier" if last and self.kind == "linear" else "body"
        ran = float(steps) if self.kind == "matmul" else min(self.runs / images, float(steps))
        operations = self.operations / images
        layer = Layer(
            name,
            self.kind,
            operands,
            role,
            operations,
            0.0 if folded else self.bias / images,
            self.outputs / images,
            ran,
        )
        changes: dict[str, Any] = {"effective": self.effective / images}
        if self.product is not None:
            n, k, m = self.product
            changes["shape"] = (operations / (ran * n * k * m), n, k, m)
        if self.by_step is not None and layer.input != "real":
            changes["rates"] = tuple((self.by_step / images).tolist())
        if summaries[0].channels is not None:
            counts = summaries[0].channels
            full = summaries[0].elements // len(counts)
            changes |= {
                "channels": len(counts),
                "dead": int((counts == 0).sum()),
                "saturated": int((counts == full).sum()),
            }
        if layer.input not in SPIKES:
            pooled = role == "classifier" and layer.input == "scaled"
            changes |= {
                "why": "; ".join(dict.fromkeys(filter(None, self.why))),
                "breaks": role != "encoder" and not pooled,
            }
        return replace(layer, **changes)


def named(entries: list[LayerTotals]) -> dict[str, LayerTotals]:
    """Layers by the names of their modules; of a module with several weights, by those of the weights."""
    modules, found = Counter(entry.name for entry in entries), dict[str, LayerTotals]()
    for entry in entries:
        name = own = entry.name if modules[entry.name] == 1 else entry.weight
        for number in itertools.count(2):
            if name not in found:
                break
            name = f"{own}:{number}"
        found[name] = entry
    return found
