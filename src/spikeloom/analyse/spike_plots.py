"""Spikes to look at: trains of a layer as pictures and rasters, rates of attention, responses to a test current."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.attention_products import attentions
from spikeloom.analyse.audit.cost import evaluating
from spikeloom.analyse.audit.layer import Layer
from spikeloom.analyse.training_curves import COLORS
from spikeloom.errors import UsageError
from spikeloom.neurons.base import Neuron
from spikeloom.record import Recorder


def spike_train(model: nn.Module, x: Tensor, layer: str | None = None) -> tuple[str, Tensor]:
    """The spikes of a layer of neurons, [T, N, ...], and its name.

    Args:
        model: built from Spikeloom's neurons; runs in eval mode.
        x: a batch.
        layer: name of a neuron; the first one that runs if None.

    Raises:
        UsageError: no such layer, or one that is no neuron or did not run.
    """
    neurons = [name for name, module in model.named_modules() if isinstance(module, Neuron)]
    if layer is not None and layer not in neurons:
        raise UsageError(f"the model has no layer of neurons named {layer!r}; it has {', '.join(neurons[:8])}, ...")
    with evaluating(model), torch.no_grad(), Recorder(model, only=None if layer is None else {layer}) as record:
        model(x)
    if not record.spikes:
        raise UsageError(f"no neuron of {type(model).__name__} ran" if layer is None else f"{layer} did not run")
    name = layer or next(iter(record.spikes))
    return name, record.spikes[name][0]


def draw_spike_maps(networks: Mapping[str, Tensor], channels: int = 16) -> Any:
    """Spike maps of some layers as pictures (course report, figure 11): a row a network, a column a channel.

    Args:
        networks: spikes [T, C, H, W] of one image, by title; their sum over time is drawn.
        channels: the first ones of each.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(len(networks), channels, row_titles=list(networks), horizontal_spacing=0.004)
    for row, spikes in enumerate(networks.values(), start=1):
        for channel in range(min(channels, spikes.shape[1])):
            counts = spikes[:, channel].sum(0).flip(0)
            figure.add_heatmap(
                z=counts.tolist(),
                row=row,
                col=channel + 1,
                showscale=False,
                colorscale="Greys",
                zmin=0,
                zmax=len(spikes),
            )
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.update_layout(title="Spikes a neuron over all steps")
    return figure


def draw_raster(spikes: Tensor, title: str = "Spikes", neurons: int = 200) -> Any:
    """Spikes [T, ...] of one input as a raster: a dot for each spike, time to the right, neurons upwards."""
    import plotly.graph_objects as go

    flat = spikes.flatten(1)[:, :neurons]
    times, indices = flat.nonzero(as_tuple=True)
    figure = go.Figure(go.Scatter(x=times.tolist(), y=indices.tolist(), mode="markers", marker={"size": 3}))
    figure.update_layout(title=title, xaxis={"title": "step", "range": [-0.5, len(flat) - 0.5]}, yaxis_title="neuron")
    if len(flat) <= 20:
        figure.update_xaxes(dtick=1)
    return figure


@dataclass(frozen=True)
class AttentionRates:
    """Firing rates of the operands of one attention."""

    name: str
    queries: float
    keys: float
    values: float


def attention_rates(layers: tuple[Layer, ...]) -> list[AttentionRates]:
    """Firing rates of Q, K and V in every attention of an audited network (Spikformer, figure of Q/K/V rates)."""
    return [
        AttentionRates(layers[index].name.split(":")[0], a.queries.rate, a.keys.rate, a.values.rate)
        for index, a in attentions(layers).items()
    ]


def draw_attention_rates(found: list[AttentionRates]) -> Any:
    """A line each for Q, K and V over the attentions."""
    import plotly.graph_objects as go

    names = [row.name for row in found]
    figure = go.Figure(
        [go.Scatter(x=names, y=[getattr(row, key) for row in found], name=key) for key in ("queries", "keys", "values")]
    )
    figure.update_layout(title="Firing rates in attention", yaxis_title="spikes per element and step")
    return figure


def probe_current(T: int = 120) -> Tensor:
    """A current [T] of a rest, a step, a ramp up and down, and a sine, in the unit of the threshold 1."""
    part = T // 4
    ramp = torch.linspace(0, 2, part // 2)
    sine = 1 + torch.sin(torch.arange(T - 3 * part) * (4 * math.pi / max(T - 3 * part, 1)))
    up_and_down = torch.cat([ramp, ramp.flip(0), torch.zeros(part - 2 * len(ramp))])
    return torch.cat([torch.zeros(part), 1.5 * torch.ones(part), up_and_down, sine])


@torch.no_grad()
def responses(neurons: Mapping[str, nn.Module], current: Tensor) -> dict[str, Tensor]:
    """The spikes [T] of single neurons on a current [T] (ParaLIF, Sec. 3.3: the figure of neuron responses)."""
    return {name: neuron(current[:, None, None])[:, 0, 0] for name, neuron in neurons.items()}


def draw_responses(current: Tensor, found: Mapping[str, Tensor]) -> Any:
    """The current above, a raster line for each neuron below."""
    from plotly.subplots import make_subplots

    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.3, 0.7])
    figure.add_scatter(y=current.tolist(), name="current", row=1, col=1)
    for line, (name, spikes) in enumerate(found.items()):
        times = spikes.nonzero()[:, 0].tolist()
        figure.add_scatter(
            x=times,
            y=[line] * len(times),
            mode="markers",
            name=name,
            row=2,
            col=1,
            marker={"symbol": "line-ns-open", "size": 12},
        )
    figure.update_yaxes(tickvals=list(range(len(found))), ticktext=list(found), row=2, col=1)
    figure.update_layout(title="Responses to a test current", xaxis2_title="step", showlegend=False)
    return figure


@dataclass(frozen=True)
class NeuronTrace:
    """What one neuron did on a current.

    Attributes:
        current: [T].
        potentials: [T], those that decide whether it fires: after the charge, before the reset.
        spikes: [T].
        v_threshold: at which it fires; None of a neuron without one fixed threshold.
    """

    current: Tensor
    potentials: Tensor
    spikes: Tensor
    v_threshold: float | None


@torch.no_grad()
def neuron_trace(neuron: Neuron, current: Tensor) -> NeuronTrace:
    """Current, potential and spikes of a single neuron.

    Args:
        neuron: tells its potentials (`Neuron.has_potentials`).
        current: [T], in the unit of the threshold.

    Raises:
        UsageError: no tensor, or one of other axes.
    """
    given: Any = current
    if not isinstance(given, Tensor):
        raise UsageError(f"a single neuron takes a tensor of currents [T], got a {type(given).__name__}")
    if current.dim() != 1:
        raise UsageError(f"a single neuron takes a current [T], got shape {tuple(current.shape)}: give one neuron's")
    x = current[:, None, None]
    potentials, spikes = neuron.potentials(x)[:, 0, 0], neuron(x)[:, 0, 0]
    threshold = getattr(neuron, "v_threshold", None)
    return NeuronTrace(current, potentials, spikes, threshold if isinstance(threshold, float) else None)


def draw_traces(traces: Mapping[str, NeuronTrace], title: str = "Current, potential and spikes") -> Any:
    """The currents above, the potentials below with a mark at each spike; one colour a neuron, thresholds dashed."""
    from plotly.subplots import make_subplots

    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.3, 0.7], vertical_spacing=0.06)
    below: dict[str, Any] = {"row": 2, "col": 1}
    for index, (name, found) in enumerate(traces.items()):
        line: dict[str, Any] = {"color": COLORS[index % len(COLORS)]}
        shared: dict[str, Any] = {"legendgroup": name, "name": name, "line": line, "mode": "lines"}
        if not any(torch.equal(found.current, one.current) for one in list(traces.values())[:index]):
            figure.add_scatter(y=found.current.tolist(), **{**shared, "line_shape": "hv"}, showlegend=False)
        figure.add_scatter(y=found.potentials.tolist(), **shared, **below)
        times = found.spikes.nonzero()[:, 0]
        figure.add_scatter(
            x=times.tolist(),
            y=found.potentials[times].tolist(),
            mode="markers",
            marker={"symbol": "triangle-up", "size": 10, **line},
            legendgroup=name,
            name=f"{name}: spike",
            showlegend=False,
            **below,
        )
    for threshold in {found.v_threshold for found in traces.values()} - {None}:
        figure.add_hline(threshold, line={"dash": "dash", "width": 1, "color": "#888888"}, **below)
    figure.update_layout(title=title, xaxis2_title="step", yaxis_title="current", yaxis2_title="potential")
    return figure
