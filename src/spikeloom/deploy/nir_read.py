"""Running a NIR graph, from here or from elsewhere, as a network; the equations stand in `deploy.nir_write`."""

from __future__ import annotations

import graphlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.deploy.nir_write import DT
from spikeloom.deploy.tracing import needed
from spikeloom.encode import as_sequence
from spikeloom.errors import DataFileError, UsageError
from spikeloom.layers import AvgPool2d, Conv1d, Conv2d, Linear
from spikeloom.neurons import LeakyIntegrator, SynapticLIF
from spikeloom.neurons.if_lif import Threshold


class Charged(Threshold):
    """Neurons of any linear charge, `H = V_reset + decay (V - V_reset) + gain X`: what NIR's IF and LIF are in steps.

    Args:
        decay, gain: of the charge.
        v_threshold, v_reset, strict: as `Threshold`.
    """

    def __init__(self, decay: float, gain: float, v_threshold: float, v_reset: float, strict: bool):
        super().__init__(v_threshold, v_reset, strict=strict)
        self.decay, self.gain = decay, gain

    def charge(self) -> tuple[float, float]:
        return self.decay, self.gain

    def extra_repr(self) -> str:
        return f"decay={self.decay}, gain={self.gain}, {super().extra_repr()}"


class NIRNetwork(nn.Module):
    """The layers of a NIR graph, each run over the whole sequence; what several edges bring is added.

    Args:
        layers: by the names of their nodes, in the order in which they can run.
        sources: the nodes from which each of them, and "output", takes its input; "input" is the network's own.
        dims: axes of a batch of single steps, [N, ...].
        T: how often such a batch is repeated.

    Shapes: [N, ...] or [T, N, ...] -> [T, N, ...].
    """

    def __init__(self, layers: dict[str, nn.Module], sources: dict[str, list[str]], dims: int, T: int):
        super().__init__()
        self.T, self.dims, self.sources = T, dims, sources
        self.names = list(layers)
        # A node may have any name, a module may not.
        self.layers = nn.ModuleDict({f"{n}_{name.replace('.', '_')}": m for n, (name, m) in enumerate(layers.items())})

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": as_sequence(x, self.T, self.dims)}

        def total(name: str) -> Tensor:
            first, *others = self.sources[name]
            summed = values[first]
            for other in others:
                summed = summed + values[other]
            return summed

        for name, layer in zip(self.names, self.layers.values(), strict=True):
            values[name] = layer(total(name))
        return total("output")


def from_nir(graph: Any, T: int | None = None, dt: float | None = None) -> NIRNetwork:
    """A network that computes a NIR graph in steps of `dt`; it has parameters and can be trained on.

    Args:
        graph: a `nir.NIRGraph` of one input and one output, without cycles: Affine, Linear, Conv1d, Conv2d, AvgPool2d,
            SumPool2d, Flatten, Scale, IF, LIF, LI, CubaLI and CubaLIF, whose neurons share their constants.
        T: steps of a static input; None for the graph's own, 1 if it has none.
        dt: seconds of a step; None for the graph's own, 1e-4 if it has none.

    Raises:
        UsageError: the graph has a node that has no counterpart here, which the message names.
    """
    nir = needed("nir")
    dt = float(graph.metadata.get("dt", DT)) if dt is None else dt
    ends = {kind: [n for n, node in graph.nodes.items() if isinstance(node, kind)] for kind in (nir.Input, nir.Output)}
    if any(len(names) != 1 for names in ends.values()):
        counts = " and ".join(str(len(names)) for names in ends.values())
        raise UsageError(f"only a NIR graph of one input and one output can be read, this one has {counts}")
    (start,), (end,) = ends.values()
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        sources[target].append("input" if source == start else source)
    try:
        order = list(graphlib.TopologicalSorter({n: s for n, s in sources.items() if n != start}).static_order())
    except graphlib.CycleError as error:
        raise UsageError(
            f"the NIR graph has a cycle ({' - '.join(error.args[1])}): whole sequences run layer by layer here"
        ) from None
    layers = {name: _layer(nir, name, graph.nodes[name], dt) for name in order if name not in ("input", end)}
    lonely = [name for name in (*layers, end) if not sources[name]]
    if lonely:
        raise UsageError(f"node {lonely[0]} of the NIR graph has no input")
    wired = {"output" if name == end else name: sources[name] for name in (*layers, end)}
    dims = len(graph.nodes[start].input_type["input"]) + 1
    return NIRNetwork(layers, wired, dims, int(graph.metadata.get("T", 1)) if T is None else T)


def read_nir(path: Path) -> Any:
    """The `nir.NIRGraph` of an HDF5 file.

    Raises:
        DataFileError: there is no such file, or it holds no NIR graph.
    """
    nir = needed("nir")
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")
    try:
        return nir.read(path)
    except Exception as error:  # whatever the library stumbles over in a damaged file
        raise DataFileError(f"{path} is no NIR graph: {type(error).__name__}: {error}") from error


def _layer(nir: Any, name: str, node: Any, dt: float) -> nn.Module:
    kind = type(node).__name__

    def constant(field: str) -> float:
        values = np.unique(getattr(node, field))
        if values.size != 1:
            raise UsageError(f"node {name} ({kind}): neurons of one node share {field} here, this one has several")
        return float(values[0])

    if isinstance(node, (nir.Affine, nir.Linear)):
        bias = getattr(node, "bias", None)
        return _with_weights(Linear(node.weight.shape[1], node.weight.shape[0], bias is not None), node.weight, bias)
    if isinstance(node, (nir.Conv1d, nir.Conv2d)):
        make: Any = Conv1d if isinstance(node, nir.Conv1d) else Conv2d
        axes = 1 if isinstance(node, nir.Conv1d) else 2
        outputs, inputs, *kernel = node.weight.shape
        padding = node.padding if isinstance(node.padding, str) else _whole(node.padding, axes)
        layer = make(
            inputs * int(node.groups), outputs, tuple(kernel), _whole(node.stride, axes), padding,
            _whole(node.dilation, axes), int(node.groups),
        )  # fmt: skip
        return _with_weights(layer, node.weight, node.bias)
    if isinstance(node, (nir.AvgPool2d, nir.SumPool2d)):
        divisor = 1 if isinstance(node, nir.SumPool2d) else None
        sizes: Any = {name: _whole(getattr(node, name), 2) for name in ("kernel_size", "stride", "padding")}
        return AvgPool2d(**sizes, divisor_override=divisor)
    if isinstance(node, nir.Flatten):
        first, last = (int(n) + 2 if n >= 0 else int(n) for n in (node.start_dim, node.end_dim))
        return nn.Flatten(first, last)
    if isinstance(node, nir.Scale):
        return Scale(torch.from_numpy(np.asarray(node.scale, np.float32)))
    if isinstance(node, (nir.IF, nir.LIF)):
        v_reset = constant("v_reset")
        if isinstance(node, nir.LIF):
            share = _share(name, kind, "tau", constant("tau"), dt)
            if not math.isclose(constant("v_leak"), v_reset, abs_tol=1e-9):
                raise UsageError(
                    f"node {name} ({kind}): v_leak is v_reset here, got {constant('v_leak')} and {v_reset}"
                )
        else:
            share = 0.0
        gain = constant("r") * (share if isinstance(node, nir.LIF) else dt)
        return Charged(1 - share, gain, constant("v_threshold"), v_reset, bool(node.metadata.get("strict", False)))
    if isinstance(node, (nir.LI, nir.CubaLI, nir.CubaLIF)):
        return _filter(nir, name, node, constant, dt)
    raise UsageError(f"node {name}: {kind} has no counterpart here")


def _filter(nir: Any, name: str, node: Any, constant: Any, dt: float) -> nn.Module:
    """LI, CubaLI and CubaLIF, whose decays are `exp(-dt / tau)` here and `1 - dt / tau` in NIR."""
    kind = type(node).__name__
    synapse = not isinstance(node, nir.LI)
    share = _share(name, kind, "tau_mem", constant("tau_mem" if synapse else "tau"), dt)
    options: dict[str, Any] = {"tau_mem": -dt / math.log1p(-share), "tau_syn": None, "time_step": dt}
    wanted = {"r": 1.0, "v_leak": 0.0}
    if synapse:
        fast = _share(name, kind, "tau_syn", constant("tau_syn"), dt)
        options["tau_syn"], wanted["w_in"] = -dt / math.log1p(-fast), 1 / fast
    if isinstance(node, nir.CubaLIF):
        options |= {"v_threshold": constant("v_threshold"), "strict": bool(node.metadata.get("strict", False))}
        wanted["v_reset"] = 0.0
    for field, value in wanted.items():
        if not math.isclose(constant(field), value, rel_tol=1e-6, abs_tol=1e-9):
            raise UsageError(f"node {name} ({kind}): {field} must be {value:g} here, got {constant(field):g}")
    return SynapticLIF(**options) if isinstance(node, nir.CubaLIF) else LeakyIntegrator(**options)


class Scale(nn.Module):
    """A factor for every element of a step (NIR's Scale): [T, N, ...] -> the same shape."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _share(name: str, kind: str, field: str, tau: float, dt: float) -> float:
    """dt / tau, the part of a potential that leaks away in a step."""
    if not tau > dt:
        raise UsageError(f"node {name} ({kind}): {field} must be more than a step of {dt:g} s, got {tau:g} s")
    return dt / tau


def _with_weights(layer: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(weight)))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(np.asarray(bias)))
    return layer


def _whole(value: Any, axes: int) -> tuple[int, ...]:
    """One number for all axes, or one each."""
    return tuple(int(n) for n in np.broadcast_to(np.asarray(value), (axes,)))
