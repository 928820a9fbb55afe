"""Running a NIR graph, from here or from elsewhere, as a network; the equations stand in `exchange.nir_write`."""

from __future__ import annotations

import graphlib
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.deploy.exchange.graph import needed
from spikeloom.deploy.exchange.nir_neurons import FIELDS, Reset, neurons_of
from spikeloom.deploy.exchange.nir_write import DT
from spikeloom.encode import as_sequence
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike
from spikeloom.layers import AvgPool2d, Conv1d, Conv2d, Linear
from spikeloom.registry import nearest


class NIRNetwork(nn.Module):
    """The layers of a NIR graph, each run over the whole sequence; what several edges bring is added.

    Args:
        layers: by the names of their nodes, in the order in which they can run.
        sources: the nodes from which each of them, and the graph's output, takes its input.
        ends: the nodes that are the graph's input and output.
        dims: axes of a batch of single steps, [N, ...].
        T: how often such a batch is repeated.

    Shapes: [N, ...] or [T, N, ...] -> [T, N, ...].
    """

    def __init__(
        self, layers: dict[str, nn.Module], sources: dict[str, list[str]], ends: tuple[str, str], dims: int, T: int
    ):
        super().__init__()
        self.T, self.dims, self.sources, self.ends = T, dims, sources, ends
        self.names = list(layers)
        # A node may have any name, a module may not.
        self.layers = nn.ModuleDict({f"{n}_{name.replace('.', '_')}": m for n, (name, m) in enumerate(layers.items())})

    def forward(self, x: Tensor) -> Tensor:
        start, end = self.ends
        values = {start: as_sequence(x, self.T, self.dims)}

        def total(name: str) -> Tensor:
            first, *others = self.sources[name]
            summed = values[first]
            for other in others:
                summed = summed + values[other]
            return summed

        for name, layer in zip(self.names, self.layers.values(), strict=True):
            values[name] = layer(total(name))
        return total(end)


def from_nir(
    graph: Any, T: int | None = None, dt: float | None = None, strict: bool | None = None, reset: Reset | None = None
) -> NIRNetwork:
    """A network that computes a NIR graph in steps of `dt`; it has parameters and can be trained on.

    Args:
        graph: a `nir.NIRGraph` of one input and one output: Affine, Linear, Conv1d, Conv2d, AvgPool2d, SumPool2d,
            Flatten, Scale, IF, LIF, LI, CubaLI and CubaLIF, without cycles but those of neurons with recurrent weights.
        T: steps of a static input; None for the graph's own, 1 if it has none.
        dt: seconds of a step; None for the graph's own, 1e-4 if it has none.
        strict: neurons fire at `v > v_threshold`, as NIR's equations say and snnTorch does, or at `>=`, as SpikingJelly
            does; None for what a node's metadata say, `>` where they say nothing.
        reset: what a spike does to the potential: "set" it to v_reset, as NIR's equations say; "subtract" v_threshold,
            as snnTorch with `reset_mechanism="subtract", reset_delay=False`; or "subtract_later", after the next leak,
            as snnTorch does by default, whose exports do not say so. None for what a node's metadata say, else "set".

    Raises:
        UsageError: the graph has a node that has no counterpart here, which the message names.
    """
    nir = needed("nir")
    if reset not in (None, *get_args(Reset)):
        raise UsageError(f"unknown reset {reset!r}; {nearest(str(reset), get_args(Reset))}")
    dt = float(graph.metadata.get("dt", DT)) if dt is None else dt
    ends = {kind: [n for n, node in graph.nodes.items() if isinstance(node, kind)] for kind in (nir.Input, nir.Output)}
    if any(len(names) != 1 for names in ends.values()):
        counts = " and ".join(str(len(names)) for names in ends.values())
        raise UsageError(f"only a NIR graph of one input and one output can be read, this one has {counts}")
    (start,), (end,) = ends.values()
    sources = _sources(graph, start, end)
    feedback = _feedback(nir, graph, sources)
    # Files from here say of every neuron whether it is strict; those of before did so only of neurons that are.
    unsaid = "T" not in graph.metadata
    layers: dict[str, nn.Module] = {}
    for name in _order(sources):
        if name in (start, end):
            continue
        node, back = graph.nodes[name], feedback.get(name)
        if type(node).__name__ not in FIELDS:
            layers[name] = _layer(nir, name, node)
            continue
        weights = None if back is None else _layer(nir, back, graph.nodes[back])
        fires = bool(node.metadata.get("strict", unsaid)) if strict is None else strict
        layers[name] = neurons_of(name, node, dt, fires, reset or _reset_of(name, node), weights)
    dims = len(graph.nodes[start].input_type["input"]) + 1
    steps = int(graph.metadata.get("T", 1)) if T is None else T
    return NIRNetwork(layers, {name: sources[name] for name in (*layers, end)}, (start, end), dims, steps)


def _reset_of(name: str, node: Any) -> Reset:
    said: Any = node.metadata.get("reset", "set")
    said = said.decode() if isinstance(said, bytes) else said
    if said not in get_args(Reset):
        raise UsageError(f"node {name} of the NIR graph: unknown reset {said!r} in its metadata")
    return said


def _sources(graph: Any, start: str, end: str) -> dict[str, list[str]]:
    """The nodes from which every node takes its input, in the order of the edges."""
    sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        for name in (source, target):
            if name not in sources:
                raise UsageError(f"an edge of the NIR graph names {name!r}, which is none of its nodes")
        if target == start or source == end:
            raise UsageError(
                f"the NIR graph has an edge from {source} to {target}, out of its output or into its input"
            )
        sources[target].append(source)
    for name, found in sources.items():
        if not found and name != start:
            raise UsageError(f"node {name} of the NIR graph has no input")
    return sources


def _feedback(nir: Any, graph: Any, sources: dict[str, list[str]]) -> dict[str, str]:
    """Recurrent weights by the neurons that they connect: a linear node from neurons to themselves, and nowhere else.

    They are taken out of `sources`.
    """
    found: dict[str, str] = {}
    for name, node in graph.nodes.items():
        targets = [target for target, others in sources.items() if name in others]
        if isinstance(node, (nir.Affine, nir.Linear)) and targets == sources[name] and len(targets) == 1:
            (neurons,) = targets
            if isinstance(graph.nodes[neurons], (nir.IF, nir.LIF, nir.CubaLIF)) and neurons not in found:
                found[neurons] = name
    for neurons, name in found.items():
        del sources[name]
        sources[neurons].remove(name)
    return found


def _order(sources: dict[str, list[str]]) -> list[str]:
    try:
        return list(graphlib.TopologicalSorter(sources).static_order())
    except graphlib.CycleError as error:
        raise UsageError(
            f"the NIR graph has a cycle ({' - '.join(error.args[1])}): whole sequences run layer by layer here, and "
            "the only cycles are those of neurons with a linear layer from them to themselves"
        ) from None


def read_nir(path: PathLike) -> Any:
    """The `nir.NIRGraph` of an HDF5 file.

    Raises:
        DataFileError: there is no such file, or it holds no NIR graph.
    """
    nir = needed("nir")
    path = Path(path)
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")
    try:
        graph = nir.read(path, type_check=False)
        # NIR's own check of shapes does not know scalars that stand for all neurons of a layer.
        neurons = (node for node in graph.nodes.values() if type(node).__name__ in FIELDS)
        if all(np.size(node.input_type["input"]) for node in neurons):
            graph.infer_types()
            graph.check_types()
        return graph
    except Exception as error:  # whatever the library stumbles over in a damaged file
        raise DataFileError(f"{path} is no NIR graph: {type(error).__name__}: {error}") from error


def _layer(nir: Any, name: str, node: Any) -> nn.Module:
    """A layer without memory."""
    if isinstance(node, (nir.Affine, nir.Linear)):
        bias = getattr(node, "bias", None)
        return _with_weights(Linear(node.weight.shape[1], node.weight.shape[0], bias is not None), node.weight, bias)
    if isinstance(node, (nir.Conv1d, nir.Conv2d)):
        make: Any = Conv1d if isinstance(node, nir.Conv1d) else Conv2d
        axes = 1 if isinstance(node, nir.Conv1d) else 2
        outputs, inputs, *kernel = node.weight.shape
        padding = node.padding if isinstance(node.padding, str) else _whole(node.padding, axes)
        layer = make(
            inputs * int(node.groups),
            outputs,
            tuple(kernel),
            _whole(node.stride, axes),
            padding,
            _whole(node.dilation, axes),
            int(node.groups),
        )
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
    raise UsageError(f"node {name}: {type(node).__name__} has no counterpart here")


class Scale(nn.Module):
    """A factor for every element of a step (NIR's Scale): [T, N, ...] -> the same shape."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _with_weights(layer: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(weight)))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(np.asarray(bias)))
    return layer


def _whole(value: Any, axes: int) -> tuple[int, ...]:
    """One number for all axes, or one each."""
    return tuple(int(n) for n in np.broadcast_to(np.asarray(value), (axes,)))
