"""Firing rates by depth: of the branch and of the output of every residual block (SEW ResNet, figures 4, 5 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.papers.gradients import keeps_shape, residual_blocks
from spikeloom.analyse.training_curves import COLORS


@dataclass(frozen=True)
class BlockRates:
    """Of one block, means over all steps, images, channels and positions.

    Attributes:
        block: its name.
        branch: of the spikes A of its last neuron; of vanilla blocks these are the output.
        output: of its output O, which counts spikes in SEW blocks with ADD; of membrane blocks their spikes.
        same_shape: whether the shortcut is the identity.
    """

    block: str
    branch: float
    output: float
    same_shape: bool


@torch.no_grad()
def block_rates(model: nn.Module, x: Tensor) -> list[BlockRates]:
    """The rates of all residual blocks on one batch.

    Args:
        model: a residual network, in the mode it shall run in.
        x: [N, C, H, W] or [T, N, C, H, W].
    """
    blocks = residual_blocks(model)
    branch: list[float] = []
    output: list[float] = []

    def after(into: list[float]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
            into.append((out[0] if isinstance(out, tuple) else out).double().mean().item())

        return hook

    handles = [block.register_forward_hook(after(output)) for block in blocks.values()]
    handles += [block.spike.neuron.register_forward_hook(after(branch)) for block in blocks.values()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [
        BlockRates(name, a, o, keeps_shape(block))
        for (name, block), a, o in zip(blocks.items(), branch, output, strict=True)
    ]


def draw_rates(networks: Mapping[str, list[BlockRates]], title: str) -> Any:
    """Two panels, the rates of the branches and of the outputs against the block, one line a network."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, shared_xaxes=True, subplot_titles=("branch A", "output O"))
    for row, what in enumerate(("branch", "output"), start=1):
        for index, (name, rates) in enumerate(networks.items()):
            figure.add_scatter(
                x=list(range(len(rates))),
                y=[getattr(rate, what) for rate in rates],
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                mode="lines+markers",
                line_color=COLORS[index % len(COLORS)],
                marker_symbol=["circle" if rate.same_shape else "diamond-open" for rate in rates],
                text=[rate.block for rate in rates],
                row=row,
                col=1,
            )
    figure.update_layout(title=title)
    figure.update_xaxes(title="block (open diamonds change the shape)", row=2, col=1)
    return figure


def draw_layer_rates(networks: Mapping[str, Mapping[str, float]], title: str) -> Any:
    """The firing rate of every layer of neurons against its depth, one line a network.

    Args:
        networks: rates by layer, in the order in which the layers run (`RateMeter.rates`), by the name of the network.
        title: of the figure.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, rates) in enumerate(networks.items()):
        figure.add_scatter(
            x=list(range(1, len(rates) + 1)),
            y=[100 * rate for rate in rates.values()],
            text=list(rates),
            name=name,
            mode="lines+markers",
            line_color=COLORS[index % len(COLORS)],
            hovertemplate="%{text}<br>%{y:.2f} %<extra></extra>",
        )
    figure.update_layout(title=title, showlegend=len(networks) > 1)
    figure.update_xaxes(title="layer of neurons", dtick=1 if max(map(len, networks.values())) <= 10 else None)
    figure.update_yaxes(title="firing rate, %", rangemode="tozero")
    return figure
