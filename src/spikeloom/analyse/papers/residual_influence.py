"""How often a residual branch changes the spike of a vanilla block (Hu et al. 2024, MS-ResNet)."""

from __future__ import annotations

import math
from typing import Any

import torch

from spikeloom.neurons import LIF


def residual_influence(rate: float, v_threshold: float = 0.5, sigma: float = 0.5) -> float:
    """Probability that a residual branch changes the spike of a vanilla block (MS-ResNet, Sec. III).

        P = P(o = 0) P(F >= V_th) + P(o = 1) P(F < V_th - 1),   F ~ N(0, sigma^2)

    for a shortcut spike o of probability `rate` and a neuron without carried state. 15.9 % where V_th = sigma = 0.5,
    whatever the rate.
    """
    tail = 0.5 * math.erfc(v_threshold / sigma / math.sqrt(2))
    low = 0.5 * math.erfc((1 - v_threshold) / sigma / math.sqrt(2))
    return (1 - rate) * tail + rate * low


def simulate_influence(
    rate: float, v_threshold: float = 0.5, sigma: float = 0.5, samples: int = 1 << 20, seed: int = 0
) -> float:
    """`residual_influence` by drawing: how often a LIF's first spike differs from the shortcut's."""
    generator = torch.Generator().manual_seed(seed)
    shortcut = (torch.rand(1, samples, generator=generator) < rate).float()
    residual = sigma * torch.randn(1, samples, generator=generator)
    spikes = LIF(decay_input=False, v_threshold=v_threshold)(shortcut + residual)
    return (spikes != shortcut).double().mean().item()


def draw_influence(v_threshold: float = 0.5, sigma: float = 0.5, title: str = "Residual influence") -> Any:
    """The probability against the rate of the shortcut's spikes: by formula a line, by drawing points.

    Args:
        v_threshold, sigma: as `residual_influence`.
        title: of the figure.
    """
    import plotly.graph_objects as go

    rates = [n / 20 for n in range(21)]
    figure = go.Figure(
        [
            go.Scatter(x=rates, y=[residual_influence(rate, v_threshold, sigma) for rate in rates], name="formula"),
            go.Scatter(
                x=rates,
                y=[simulate_influence(rate, v_threshold, sigma, 1 << 16) for rate in rates],
                name="drawn",
                mode="markers",
            ),
        ]
    )
    figure.update_layout(title=title, yaxis={"title": "spikes that the residual branch changes", "range": [0, 1]})
    figure.update_xaxes(title="rate of the shortcut's spikes")
    return figure
