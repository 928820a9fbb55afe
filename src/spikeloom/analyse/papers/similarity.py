"""How alike the outputs of consecutive residual blocks are (Hu et al. 2024, MS-ResNet)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.errors import UsageError

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


def listed_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name: what its list `blocks` holds.

    Raises:
        UsageError: it has none.
    """
    found = getattr(model, "blocks", None)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UsageError(f"{type(model).__name__} has no list `blocks`: name a residual network")
    return {f"blocks.{index}": block for index, block in enumerate(found)}


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

    handles = [block.register_forward_hook(tap(name)) for name, block in listed_blocks(model).items()]
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
