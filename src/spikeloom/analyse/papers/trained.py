"""What trained networks do inside: rates of blocks and of attention, the size of attention's products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.api import audit
from spikeloom.analyse.load import open_targets
from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.analyse.papers.rates import BlockRates, block_rates, draw_rates
from spikeloom.analyse.spike_plots import attention_rates, draw_attention_rates
from spikeloom.errors import UsageError
from spikeloom.layers import SpikingSelfAttention
from spikeloom.neurons.lif import LIFBase

Json = dict[str, Any]


def _targets(
    networks: list[str], data: Json | None, images: int, model: Json | None = None
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Each network by its title, with a batch of test images; untrained ones have their norms calibrated on it."""
    if not networks:
        raise UsageError("""name the networks to measure: 'measure.networks=["RUN", "weights:NAME"]'""")
    for target in open_targets(networks, data, images, model):
        x, _ = next(target.batches())
        yield target.title, target.ready(x), x


@MEASUREMENTS.register
def trained_rates(networks: list[str], data: dict[str, Any] | None = None, images: int = 64) -> Measured:
    """Firing rates of branch A and output O of every residual block of trained networks (SEW ResNet, figures 4 and 11).

    Args:
        networks: folders of runs, or `weights:NAME`; a model's name is an untrained network.
        data: a data set with its options, instead of the runs'.
        images: of the test part, one batch.
    """
    found: dict[str, list[BlockRates]] = {}
    measured = Measured()
    for title, model, x in _targets(networks, data, images):
        found[title] = rates = block_rates(model, x)
        measured.values[f"largest rate of A in {title}"] = max(rate.branch for rate in rates)
        measured.values[f"blocks of {title} with A at most 0.25"] = (
            f"{sum(rate.branch <= 0.25 for rate in rates)} of {len(rates)}"
        )
        measured.tables[f"rates of {title}"] = [asdict(rate) for rate in rates]
    measured.figures["rates"] = draw_rates(found, "Firing rates of trained networks")
    return measured


@MEASUREMENTS.register
def rates_of_attention(networks: list[str], data: dict[str, Any] | None = None, images: int = 64) -> Measured:
    """Firing rates of Q, K and V in every block of trained transformers (Spikformer, figure of their rates).

    Args:
        networks, data, images: as `trained_rates`.

    Raises:
        UsageError: a network without spiking self-attention.
    """
    measured = Measured()
    for index, (title, model, x) in enumerate(_targets(networks, data, images)):
        found = attention_rates(audit(model, x).rows)
        if not found:
            raise UsageError(f"{title} has no spiking self-attention")
        for key in ("queries", "keys", "values"):
            measured.values[f"mean rate of {key} in {title}"] = sum(getattr(row, key) for row in found) / len(found)
        measured.tables[f"rates in attention of {title}"] = [asdict(row) for row in found]
        measured.figures[f"attention{index}"] = draw_attention_rates(found)
    return measured


@dataclass(frozen=True)
class ProductSize:
    """The product `Q K^T V s` of one block, over all steps, images, tokens and channels.

    Attributes:
        block: the name of its attention.
        mean, largest: of its size.
        far: the part of its values at which the surrogate behind it has less than a hundredth of its peak.
    """

    block: str
    mean: float
    largest: float
    far: float


@torch.no_grad()
def product_sizes(model: nn.Module, x: Tensor) -> list[ProductSize]:
    """How large `Q K^T V s` is in every block, and how much of it lies where neurons behind it cannot learn.

    Args:
        model: a transformer with `SpikingSelfAttention`, in the mode it shall run in.
        x: [N, C, H, W] or [T, N, C, H, W].

    Raises:
        UsageError: neurons behind the product without a single threshold.
    """
    found: list[ProductSize] = []

    def seen(name: str, neuron: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            above = out.float() - neuron.v_threshold
            slope, peak = neuron.surrogate.derivative(above), neuron.surrogate.derivative(torch.zeros(1))
            far = (slope < peak / 100).float().mean().item()
            found.append(ProductSize(name, out.abs().mean().item(), out.abs().max().item(), far))

        return hook

    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, SpikingSelfAttention)]
    for name, block in blocks:
        if not isinstance(block.spike, LIFBase) or isinstance(block.spike.v_threshold, tuple):
            raise UsageError(f"{name}: its neurons have no single threshold to compare with, as IF and LIF have")
    handles = [block.product.register_forward_hook(seen(name, block.spike)) for name, block in blocks]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


@MEASUREMENTS.register
def sizes_of_attention(
    networks: list[str], data: dict[str, Any] | None = None, images: int = 64, maps: list[str] | None = None
) -> Measured:
    """Size of `Q K^T V s` in every block: why I, ReLU and LeakyReLU do not converge (Spikformer, Appendix D.3).

    Args:
        networks, data, images: as `trained_rates`.
        maps: attention maps that untrained networks are built with, one after the other; their own without them.

    Raises:
        UsageError: a network without spiking self-attention.
    """
    import plotly.graph_objects as go

    measured, figure = Measured(), go.Figure()
    for kind in maps or [None]:
        for title, model, x in _targets(networks, data, images, None if kind is None else {"attention": kind}):
            name = title if kind is None else f"{title}, map {kind}"
            found = product_sizes(model, x)
            if not found:
                raise UsageError(f"{title} has no spiking self-attention")
            measured.values[f"mean size in {name}"] = sum(row.mean for row in found) / len(found)
            measured.values[f"largest size in {name}"] = max(row.largest for row in found)
            measured.values[f"part without gradient in {name}"] = sum(row.far for row in found) / len(found)
            measured.tables[f"Q K^T V s of {name}"] = [asdict(row) for row in found]
            figure.add_scatter(y=[row.mean for row in found], x=[row.block for row in found], name=name)
    figure.update_yaxes(type="log", title="mean size of Q K^T V s")
    figure.update_layout(title="Size of attention's products", xaxis_title="block")
    measured.figures["sizes"] = figure
    return measured
