"""The loss around a solution, on a plane through it (Li et al. 2018, Visualizing the Loss Landscape)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError


@dataclass(frozen=True)
class Landscape:
    """Losses `L(theta + a d1 + b d2)`.

    Attributes:
        steps: the values of a and of b.
        losses: [len(steps), len(steps)], by b and a.
    """

    steps: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    @property
    def roughness(self) -> float:
        """Mean absolute second difference over the mean loss: 0 for a plane."""
        grid = torch.tensor(self.losses, dtype=torch.float64)
        bends = [grid.diff(n=2, dim=axis).abs().mean() for axis in (0, 1)]
        return ((bends[0] + bends[1]) / 2 / grid.mean().clamp_min(1e-12)).item()


def directions(model: nn.Module, seed: int) -> list[Tensor]:
    """A random direction for each parameter, each filter as long as the weight's; 0 for biases and norms."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.dim() < 2:
            found.append(torch.zeros_like(parameter))
            continue
        d = torch.randn(parameter.shape, generator=generator)
        scale = parameter.detach().flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)
        found.append(d * scale.view(-1, *(1,) * (d.dim() - 1)))
    return found


def loss_landscape(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    points: int = 21,
    span: float = 1.0,
    seed: int = 0,
    workers: int | None = None,
) -> Landscape:
    """The mean loss on a grid around the model's weights, in two filter-normalised directions, norms frozen.

    Args:
        model: any; copies of it run, in eval mode.
        loss: from logits and labels.
        batches: inputs and labels.
        points: of the grid on each axis, odd so that the weights themselves are one of them.
        span: a and b go from -span to span.
        seed: of the directions.
        workers: threads, each with a copy of the model and one core; all cores if None.
    """
    if points < 3 or points % 2 == 0:
        raise UsageError(f"points must be odd and at least 3, got {points}")
    steps = torch.linspace(-span, span, points).tolist()
    first, second = directions(model, seed), directions(model, seed + 1)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    count = workers or os.cpu_count() or 1
    copies = [copy.deepcopy(model).eval() for _ in range(count)]
    threads = torch.get_num_threads()

    def row(index: int) -> list[tuple[float, ...]]:
        torch.set_num_threads(1)  # of this worker; the grid is what is parallel
        mine, found = copies[index], []
        for b in steps[index::count]:
            losses: list[float] = []
            for a in steps:
                with torch.no_grad():
                    for parameter, theta, d, e in zip(mine.parameters(), start, first, second, strict=True):
                        parameter.copy_(theta + a * d + b * e)
                    total = sum(float(loss(mine(x), y)) * len(y) for x, y in batches)
                losses.append(total / sum(len(y) for _, y in batches))
            found.append(tuple(losses))
        return found

    try:
        with ThreadPoolExecutor(count) as pool:
            parts = list(pool.map(row, range(count)))
    finally:
        torch.set_num_threads(threads)
    grid = [parts[index % count][index // count] for index in range(points)]
    return Landscape(tuple(steps), tuple(grid))


def draw_landscape(found: Landscape, title: str = "Loss") -> Any:
    """The losses as a surface."""
    import plotly.graph_objects as go

    figure = go.Figure(go.Surface(x=found.steps, y=found.steps, z=found.losses))
    figure.update_layout(title=title, scene={"xaxis_title": "a", "yaxis_title": "b", "zaxis_title": "loss"})
    return figure
