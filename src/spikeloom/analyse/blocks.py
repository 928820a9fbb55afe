"""Residual blocks: how alike their outputs are, and how they pass gradients (Hu et al. 2024, MS-ResNet)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, MembraneBlock, NormSpike
from spikeloom.neurons import LIF

_C1, _C2 = 0.01**2, 0.03**2  # of SSIM, for rates from 0 to 1


@dataclass(frozen=True)
class Similarity:
    """How alike the firing rates of two consecutive blocks are.

    Attributes:
        block: the later one.
        ssim: mean over images; 1 only for equal maps.
        equal: whether all maps are equal: the block did nothing.
        resized: whether the maps differ in shape, and channel means at the smaller size were compared.
    """

    block: str
    ssim: float
    equal: bool
    resized: bool


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name: what its list `blocks` holds.

    Raises:
        UsageError: it has none.
    """
    found = getattr(model, "blocks", None)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UsageError(f"{type(model).__name__} has no list `blocks`: name a residual network")
    return {f"blocks.{index}": block for index, block in enumerate(found)}


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose norms have the statistics of x, as at the first training step.

    A norm that runs more than once, in a loop over time, takes the mean of its statistics.
    """
    model = copy.deepcopy(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    before = [norm.momentum for norm in norms]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for norm in norms:
            norm.momentum = 1.0
            if not isinstance(norm, BatchNorm):  # ours takes the whole sequence
                stack.callback(norm.register_forward_pre_hook(_averaging()).remove)
        model(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def _averaging() -> Callable[..., None]:
    """A hook whose norm averages the statistics of all its calls."""
    calls = itertools.count(1)

    def hook(norm: Any, args: Any) -> None:
        norm.momentum = 1 / next(calls)

    return hook


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of maps, [N, ...] and [N, ...] -> [N], statistics over all but the first axis.

    SSIM = (2 mu_x mu_y + c1)(2 cov + c2) / ((mu_x^2 + mu_y^2 + c1)(var_x + var_y + c2)), c1 = 0.01^2, c2 = 0.03^2.
    """
    x, y = x.flatten(1).double(), y.flatten(1).double()
    mu_x, mu_y = x.mean(1), y.mean(1)
    cov = (x * y).mean(1) - mu_x * mu_y
    var = x.var(1, correction=0) + y.var(1, correction=0)
    return (2 * mu_x * mu_y + _C1) * (2 * cov + _C2) / ((mu_x**2 + mu_y**2 + _C1) * (var + _C2))


@torch.no_grad()
def block_similarity(model: nn.Module, x: Tensor) -> list[Similarity]:
    """SSIM of the firing-rate maps of consecutive blocks (MS-ResNet, radar plot).

    Args:
        model: a residual network, in the mode it shall run in.
        x: [N, C, H, W] or [T, N, C, H, W].
    """
    seen: dict[str, Tensor] = {}

    def tap(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spikes: Tensor = output[0] if isinstance(output, tuple) else output
            seen[name] = spikes.float().mean(0)

        return hook

    handles = [block.register_forward_hook(tap(name)) for name, block in blocks_of(model).items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    found: list[Similarity] = []
    for (_, before), (name, after) in zip(list(seen.items()), list(seen.items())[1:], strict=False):
        resized = before.shape != after.shape
        if resized:
            before, after = before.mean(1), after.mean(1)
            side = (min(before.shape[1], after.shape[1]), min(before.shape[2], after.shape[2]))
            before, after = F.adaptive_avg_pool2d(before, side), F.adaptive_avg_pool2d(after, side)
        found.append(Similarity(name, ssim(before, after).mean().item(), torch.equal(before, after), resized))
    return found


def draw_similarity(networks: dict[str, list[Similarity]]) -> Any:
    """A radar plot, one line a network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, rows in networks.items():
        closed = [*rows, *rows[:1]]
        figure.add_scatterpolar(r=[row.ssim for row in closed], theta=[row.block for row in closed], name=name)
    figure.update_layout(title="SSIM of the firing rates of consecutive blocks", polar_radialaxis_range=[-1, 1])
    return figure


@dataclass(frozen=True)
class Isometry:
    """phi(J J^T) of a block and its standard error over the probes; 1 is an isometry."""

    block: str
    phi: float
    error: float


def block_isometry(model: nn.Module, x: Tensor, probes: int = 64, seed: int = 0) -> list[Isometry]:
    """Block dynamical isometry `phi(J J^T) = E |J^T v|^2 / dim`, v ~ N(0, I) (MS-ResNet; Hutchinson's estimator).

    J is the Jacobian of a block: of membrane blocks from U to U', the neuron at its entrance included; of others from
    spikes to spikes, through the surrogates. Norms are frozen at the statistics of x.

    Args:
        model: a residual network; a calibrated copy is measured.
        x: [N, C, H, W] or [T, N, C, H, W].
        probes: at least 2; 64 give phi to a few percent.
        seed: of the probes.
    """
    if probes < 2:
        raise UsageError(f"probes must be at least 2, got {probes}")
    model = calibrated(model, x)
    blocks = blocks_of(model)
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
        figure.add_scatter(x=[row.block for row in rows], y=[row.phi for row in rows], name=name,
                           error_y={"array": [row.error for row in rows]})  # fmt: skip
    figure.add_hline(1.0, line_dash="dot")
    figure.update_layout(title="Block dynamical isometry", yaxis={"title": "phi(J J^T)", "type": "log"})
    return figure


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
    figure = go.Figure([
        go.Scatter(x=rates, y=[residual_influence(rate, v_threshold, sigma) for rate in rates], name="formula"),
        go.Scatter(x=rates, y=[simulate_influence(rate, v_threshold, sigma, 1 << 16) for rate in rates], name="drawn",
                   mode="markers"),
    ])  # fmt: skip
    figure.update_layout(title=title, yaxis={"title": "spikes that the residual branch changes", "range": [0, 1]})
    figure.update_xaxes(title="rate of the shortcut's spikes")
    return figure
