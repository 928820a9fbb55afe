"""Which classes a network takes for which (a figure of the paper on DS-ResNet with TET and SLTT)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.cost import evaluating
from spikeloom.errors import UsageError


@dataclass(frozen=True)
class Confusion:
    """Counts of images by their class (rows) and the class predicted (columns)."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def per_class(self) -> tuple[float, ...]:
        """Accuracy of each class in percent; nan for one without images."""
        return tuple(100 * row[index] / sum(row) if sum(row) else float("nan") for index, row in enumerate(self.counts))

    @property
    def accuracy(self) -> float:
        """Percent of all images."""
        right = sum(row[index] for index, row in enumerate(self.counts))
        return 100 * right / max(sum(map(sum, self.counts)), 1)

    def mistakes(self, most: int = 20) -> list[tuple[str, str, int]]:
        """The most frequent ones: the class, what it was taken for, how often."""
        found = [
            (self.classes[truth], self.classes[other], count)
            for truth, row in enumerate(self.counts)
            for other, count in enumerate(row)
            if count and other != truth
        ]
        return sorted(found, key=lambda one: -one[2])[:most]

    def improved(self, before: Confusion) -> tuple[str, ...]:
        """The classes whose accuracy is higher than in another matrix."""
        pairs = zip(self.classes, before.per_class, self.per_class, strict=True)
        return tuple(name for name, old, new in pairs if new > old)


def confusion(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str]) -> Confusion:
    """Counts what a network predicts, the argmax of its logits' mean over time, on inputs and labels.

    Args:
        model: from a batch to logits [T, N, classes] or [N, classes]; runs in eval mode.
        batches: inputs and labels.
        classes: names in the order of the labels.
    """
    from sklearn.metrics import confusion_matrix

    truth: list[int] = []
    predicted: list[int] = []
    with evaluating(model), torch.no_grad():
        for x, y in batches:
            logits = model(x)
            truth += y.tolist()
            predicted += (logits.mean(0) if logits.dim() == 3 else logits).argmax(1).tolist()
    if not truth:
        raise UsageError("a confusion matrix needs at least one batch, got none")
    matrix = confusion_matrix(truth, predicted, labels=list(range(len(classes))))
    return Confusion(tuple(classes), tuple(tuple(map(int, row)) for row in matrix))


def draw_confusion(found: Confusion, title: str = "Confusion matrix") -> Any:
    """The matrix as shares of each class; the counts stand in the cells of up to 20 classes."""
    import plotly.graph_objects as go

    shares = [[count / max(sum(row), 1) for count in row] for row in found.counts]
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=found.classes,
            y=found.classes,
            text=found.counts,
            colorscale="Blues",
            zmin=0,
            zmax=1,
            texttemplate="%{text}" if len(found.classes) <= 20 else None,
            hovertemplate="%{y}, predicted %{x}: %{text}<extra></extra>",
        )
    )
    figure.update_layout(title=f"{title}: {found.accuracy:.2f} %", xaxis_title="predicted", yaxis_title="class")
    # Names such as "0" are names, not places on an axis.
    few = 1 if len(found.classes) <= 20 else None
    figure.update_xaxes(type="category", dtick=few).update_yaxes(type="category", dtick=few, autorange="reversed")
    return figure
