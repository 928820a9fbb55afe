"""Block dynamical isometry: how residual blocks pass gradients (Hu et al. 2024, MS-ResNet)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.calibrate import calibrated
from spikeloom.analyse.papers.similarity import listed_blocks
from spikeloom.errors import UsageError
from spikeloom.layers import MembraneBlock, NormSpike


@dataclass(frozen=True)
class Isometry:
    """phi(J J^T) of a block and its standard error over the probes; 1 is an isometry."""

    block: str
    phi: float
    error: float


def block_isometry(model: nn.Module, x: Tensor, probes: int = 64, seed: int = 0) -> list[Isometry]:
    """Block dynamical isometry `phi(J J^T) = E |J^T v|^2 / dim`, v ~ N(0, I) (MS-ResNet; Hutchinson's estimator).

    J is the Jacobian of a block: of membrane blocks from U to U', the neuron at its entrance included; of others from
    spikes to spikes, through the surrogates.

    Args:
        model: a residual network; in training mode, a copy whose norms have the statistics of x is measured.
        x: [N, C, H, W] or [T, N, C, H, W].
        probes: at least 2; 64 give phi to a few percent.
        seed: of the probes.
    """
    if probes < 2:
        raise UsageError(f"probes must be at least 2, got {probes}")
    if model.training:
        model = calibrated(model, x)
    blocks = listed_blocks(model)
    inputs: dict[str, Tensor] = {}

    def tap(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[-1].detach()  # U of a membrane block, S of others

        return hook

    handles = [block.register_forward_pre_hook(tap(name)) for name, block in blocks.items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(seed)
    found: list[Isometry] = []
    entrance = getattr(model, "stem_spike", None)
    for name, block in blocks.items():
        start = inputs[name].clone().requires_grad_()
        if isinstance(block, MembraneBlock):
            assert isinstance(entrance, NormSpike)
            end = block(entrance.neuron(start), start)[1]
            entrance = block.spike
        else:
            end = block(start)
        norms: list[float] = []
        for _ in range(probes):
            probe = torch.randn(end.shape, generator=generator)
            (back,) = torch.autograd.grad(end, start, probe, retain_graph=True)
            norms.append(back.double().square().sum().item() / end.numel())
        values = torch.tensor(norms)
        found.append(Isometry(name, values.mean().item(), values.std().item() / math.sqrt(probes)))
    return found


def draw_isometry(networks: dict[str, list[Isometry]]) -> Any:
    """phi against depth, one line a network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, rows in networks.items():
        figure.add_scatter(
            x=[row.block for row in rows],
            y=[row.phi for row in rows],
            name=name,
            error_y={"array": [row.error for row in rows]},
        )
    figure.add_hline(1.0, line_dash="dot")
    figure.update_layout(title="Block dynamical isometry", yaxis={"title": "phi(J J^T)", "type": "log"})
    return figure
