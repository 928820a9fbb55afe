"""Writing a network as a NIR graph (Pedersen et al. 2024, "Neuromorphic intermediate representation").

NIR's neurons are differential equations; with forward Euler steps of `dt` seconds they are the scans of `ops.scan`:

    tau dv/dt = (v_leak - v) + r I    ->    H = V + dt / tau ((v_leak - V) + r X)
    decay = 1 - dt / tau,  gain = r dt / tau    <->    tau = dt / (1 - decay),  r = gain / (1 - decay)

so that `decay_input=True` has r = 1 and `decay_input=False` r = tau / dt. Of IF, `dv/dt = r I`, r = gain / dt. Without
another rule in the format `dt` is 1e-4 s, as SpikingJelly, Norse and snnTorch take it; it is kept in the metadata.

v_leak is v_reset, the potential at rest. NIR fires at `v > v_threshold`, the layers here at `>=` unless they are
`strict`, which a node's metadata keep; SpikingJelly reads every neuron as `>=`. NIR (1.0.8) has no soft reset: v_reset
is a potential. Metadata keep it too, where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.deploy.exchange.fold import fold
from spikeloom.deploy.exchange.graph import described, input_of, name_neurons, needed, place, repeats_of, trace
from spikeloom.deploy.exchange.nir_neurons import NIRNeurons, Reset, fire_metadata
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, atomic
from spikeloom.neurons import LeakyIntegrator, Neuron, SynapticLIF
from spikeloom.neurons.lif import LIFBase

aten: Any = torch.ops.aten
Node = Any
"""A `torch.fx.Node`, whose arguments may be of any kind."""

DT = 1e-4
"""Seconds of a step, where nobody says otherwise."""


def to_nir(model: nn.Module, example: Tensor, dt: float = DT, soft_reset: bool = False) -> Any:
    """The network as a `nir.NIRGraph`, its norms folded into the convolutions (`fold`).

    Sums, of shortcuts above all, are edges into one node. A mean over all positions is an average pool as large as
    the image; zero channels added to a shortcut are a 1x1 convolution.

    Args:
        model: in any mode; it is not changed.
        example: an input of any batch, [N, ...] of a static image or [T, N, ...]. The graph is of one step, its shapes
            those of this input.
        dt: seconds of a step (equations at the top of this file).
        soft_reset: write neurons that subtract v_threshold when they fire, with `reset = "subtract"` in the metadata of
            their nodes. `from_nir` knows it; other readers set such neurons to v_reset.

    Raises:
        UsageError: NIR cannot express a layer, which the message names; or `nir` is not installed.
    """
    needed("nir")
    if not dt > 0:
        raise UsageError(f"dt must be a positive number of seconds, got {dt}")
    folded = fold(model, example).cpu().float()
    neurons = name_neurons(folded)
    return _Writer(neurons, trace(folded, example.cpu().float()), dt, soft_reset).graph()


def write_nir(graph: Any, path: PathLike) -> None:
    """Writes a `nir.NIRGraph` as HDF5, whole or not at all."""
    nir = needed("nir")
    with atomic(path) as temporary:
        nir.write(temporary, graph)


class _Value(NamedTuple):
    """A tensor of the traced graph.

    Attributes:
        sources: the NIR nodes whose outputs are its sum, in the order in which they are added.
        shape: of one step of one sample.
        lead: axes before those: 2 for [T, N], 1 for [T N] or for one step [N].
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    lead: int


class _Writer:
    def __init__(self, neurons: dict[str, Neuron], program: torch.export.ExportedProgram, dt: float, soft: bool):
        self.nir, self.neurons, self.program, self.dt, self.soft = needed("nir"), neurons, program, dt, soft
        signature = program.graph_signature
        tensors: dict[str, Any] = {
            **{name: program.state_dict[target] for name, target in signature.inputs_to_parameters.items()},
            **{
                name: program.state_dict.get(target, program.constants.get(target))
                for name, target in signature.inputs_to_buffers.items()
            },
            **{name: program.constants[target] for name, target in signature.inputs_to_lifted_tensor_constants.items()},
        }
        self.tensors: dict[str, Tensor] = tensors
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.values: dict[Node, _Value] = {}

    def graph(self) -> Any:
        start, repeats = input_of(self.program), repeats_of(self.program)
        shape, lead = tuple(start.meta["val"].shape), 2 if repeats is None else 1
        self.nodes["input"] = self.nir.Input(input_type=np.array(shape[lead:]))
        self.values[start] = _Value(("input",), shape[lead:], lead)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(self._value(node.args[0][0], node))
        return self.nir.NIRGraph(self.nodes, self.edges, metadata={"dt": self.dt, "T": repeats or shape[0]})

    def _output(self, value: _Value) -> None:
        self.nodes["output"] = self.nir.Output(output_type=np.array(value.shape))
        self._connect(value, "output")

    def _call(self, node: Node) -> None:
        if not any(source in self.values for source in node.all_input_nodes):
            return  # computed from constants alone
        make = _OPS.get(node.target)
        if make is not None:
            self.values[node] = make(self, node)
        elif node.users:
            raise UsageError(f"{described(node)}: NIR has no node for {node.target}")

    def _value(self, argument: Any, node: Node) -> _Value:
        if not isinstance(argument, torch.fx.Node) or argument not in self.values:
            raise UsageError(f"{described(node)}: NIR cannot hold {node.target} with a constant")
        return self.values[argument]

    def _array(self, argument: Node | None, length: int = 0) -> np.ndarray:
        """A weight; zeros for a bias that a layer has not."""
        if argument is None:
            return np.zeros(length, np.float32)
        return self.tensors[argument.name].detach().numpy()

    def _connect(self, value: _Value, name: str) -> None:
        self.edges += [(source, name) for source in value.sources]

    def add(self, node: Node, value: _Value, made: Any, shape: tuple[int, ...]) -> _Value:
        """A NIR node behind `value`; its output is a step of `shape`."""
        for kind, types, expected in (("input", made.input_type, value.shape), ("output", made.output_type, shape)):
            known = next(iter(types.values()))
            if known is not None and tuple(int(n) for n in known) != expected:
                raise UsageError(
                    f"{described(node)}: NIR's {type(made).__name__} takes its {kind} to be "
                    f"{tuple(int(n) for n in known)}, but it is {expected}: groups and kernels that are not square "
                    "cannot be written"
                )
        name = self._unused(place(node)[0] or str(node.name))
        self.nodes[name] = made
        self._connect(value, name)
        return _Value((name,), shape, value.lead)

    def _unused(self, name: str) -> str:
        """A name that no node has, and that HDF5 does not take for a folder."""
        stem = name = name.replace("/", "_")
        count = 0
        while name in self.nodes or name in ("input", "output"):
            count += 1
            name = f"{stem}_{count}"
        return name

    # --- the ops ------------------------------------------------------------------------------------------------------

    def same(self, node: Node) -> _Value:
        return self._value(node.args[0], node)

    def flatten(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        axes = value.lead + len(value.shape)
        start, end = (n % axes for n in ((*node.args, -1)[1], (*node.args, -1, -1)[2]))
        if value.lead == 2 and (start, end) == (0, 1):
            return value._replace(lead=1)
        if start < value.lead:
            raise UsageError(f"{described(node)}: NIR cannot mix the steps or the batch with other axes")
        if start == end or all(_is_mean(user) for user in node.users):
            return value  # a mean over positions asks for these as they are
        first, last = start - value.lead, end - value.lead
        shape = (*value.shape[:first], math.prod(value.shape[first : last + 1]), *value.shape[last + 1 :])
        made = self.nir.Flatten(input_type=np.array(value.shape), start_dim=first, end_dim=last)
        return self.add(node, value, made, shape)

    def unflatten(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        if value.lead != 1 or node.args[1] != 0:
            raise UsageError(f"{described(node)}: NIR cannot split an axis")
        return value._replace(lead=2)

    def expand(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        if tuple(node.meta["val"].shape[2:]) != value.shape or value.lead != 1:
            raise UsageError(f"{described(node)}: NIR cannot repeat values along an axis")
        return value._replace(lead=2)

    def select(self, node: Node) -> _Value:
        # One step stands for all only where they are the same.
        source = node.args[0]
        if source.target is not aten.expand.default or node.args[1] != 0:
            raise UsageError(f"{described(node)}: NIR cannot take a part of a tensor, or one step of a sequence")
        return self._value(source, node)._replace(lead=1)

    def plus(self, node: Node) -> _Value:
        one, other = self._value(node.args[0], node), self._value(node.args[1], node)
        if one.shape != other.shape or node.kwargs.get("alpha", 1) != 1:
            raise UsageError(f"{described(node)}: NIR adds what has one shape, got {one.shape} and {other.shape}")
        if set(one.sources) & set(other.sources):
            raise UsageError(f"{described(node)}: adds a layer's output twice, which NIR's edges cannot say")
        # In the order of the network: the longer chain of shortcuts first, as it was added first.
        order = {name: position for position, name in enumerate(self.nodes)}
        return one._replace(sources=tuple(sorted((*one.sources, *other.sources), key=order.__getitem__)))

    def linear(self, node: Node) -> _Value:
        value, weight, bias = self._value(node.args[0], node), self._array(node.args[1]), (*node.args, None)[2]
        if len(value.shape) != 1:
            raise UsageError(f"{described(node)}: NIR's Linear takes a vector, got {value.shape}: no tokens or maps")
        made = self.nir.Linear(weight) if bias is None else self.nir.Affine(weight, self._array(bias))
        return self.add(node, value, made, (len(weight),))

    def convolution(self, node: Node) -> _Value:
        value, weight = self._value(node.args[0], node), self._array(node.args[1])
        axes = weight.ndim - 2
        given = (*node.args[2:], *(None, 1, 0, 1, 1)[len(node.args) - 2 :])
        bias, (stride, padding, dilation) = given[0], (_spread(n, axes) for n in given[1:4])
        settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        if axes == 1:
            settings = {name: pair[0] for name, pair in settings.items()}
        kind = self.nir.Conv1d if axes == 1 else self.nir.Conv2d
        made = kind(
            input_shape=value.shape[1] if axes == 1 else value.shape[1:],
            weight=weight,
            groups=given[4],
            bias=self._array(bias, len(weight)),
            **settings,
        )
        return self.add(node, value, made, tuple(node.meta["val"].shape[1:]))

    def average(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        given = (*node.args[1:], *(None, (), 0, False, True, None)[len(node.args) - 1 :])
        kernel, stride, padding = _spread(given[0], 2), _spread(given[1] or given[0], 2), _spread(given[2], 2)
        shape = tuple(node.meta["val"].shape[1:])
        sizes = zip(value.shape[1:], padding, kernel, stride, strict=True)
        whole = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in sizes)
        if whole != shape[1:] or (any(padding) and not given[4]) or given[5] is not None:
            raise UsageError(f"{described(node)}: NIR's AvgPool2d has no ceil_mode, and counts its padding")
        return self.add(node, value, self._pool(kernel, stride, padding), shape)

    def _pool(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Any:
        return self.nir.AvgPool2d(kernel_size=np.array(kernel), stride=np.array(stride), padding=np.array(padding))

    def mean(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        if len(value.shape) != 3 or not _is_mean(node):
            raise UsageError(f"{described(node)}: NIR averages over the positions of maps [C, H, W], not otherwise")
        channels, *size = value.shape
        if size != [1, 1]:
            pooled = self._pool(tuple(size), tuple(size), (0, 0))
            value = self.add(node, value, pooled, (channels, 1, 1))
        made = self.nir.Flatten(input_type=np.array((channels, 1, 1)), start_dim=0, end_dim=-1)
        return self.add(node, value, made, (channels,))

    def pad(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        padding, fill = [*node.args[1], 0, 0][:6], (*node.args, 0)[2]
        if len(value.shape) != 3 or any(padding[:4]) or min(padding) < 0 or fill != 0 or len(node.args[1]) > 6:
            raise UsageError(f"{described(node)}: NIR pads with zeros inside convolutions, not otherwise")
        channels, *size = value.shape
        before, behind = padding[4:]
        weight = np.zeros((before + channels + behind, channels, 1, 1), np.float32)
        weight[before : before + channels, :, 0, 0] = np.eye(channels, dtype=np.float32)
        made = self.nir.Conv2d(tuple(size), weight, (1, 1), (0, 0), (1, 1), 1, np.zeros(len(weight), np.float32))
        return self.add(node, value, made, (len(weight), *size))

    def maximum(self, node: Node) -> _Value:
        raise UsageError(f"{described(node)}: NIR has no max pool; train the network with average pools")

    def norm(self, node: Node) -> _Value:
        raise UsageError(f"{described(node)}: NIR has no norm, and this one cannot be folded into a convolution")

    def product(self, node: Node) -> _Value:
        raise UsageError(f"{described(node)}: NIR has no product of two signals, as attention, AND and IAND take it")

    def neuron(self, node: Node) -> _Value:
        value = self._value(node.args[0], node)
        if value.lead != 2:
            raise UsageError(f"{described(node)}: its input is no sequence [T, N, ...]")
        made = self.add(node, value, self._neuron_node(node, value.shape), value.shape)
        weights = getattr(self.neurons[str(node.args[1])], "feedback", None)
        if isinstance(weights, nn.Linear):
            name = self._unused(f"{made.sources[0]}.w_rec")
            weight, *bias = (parameter.detach().numpy() for parameter in weights.parameters())
            self.nodes[name] = self.nir.Affine(weight, *bias) if bias else self.nir.Linear(weight)
            self.edges += [(made.sources[0], name), (name, made.sources[0])]
        return made

    def _neuron_node(self, node: Node, shape: tuple[int, ...]) -> Any:
        module = self.neurons[str(node.args[1])]
        kind = type(module).__name__
        where = f"layer {node.args[1]} ({kind})"

        def full(value: Any) -> np.ndarray:
            return np.full(shape, float(value), np.float64)

        if isinstance(module, NIRNeurons):
            return module.node(self.nir, self.dt, shape)
        if isinstance(module, LIFBase) and module.scale() is None and not isinstance(module.v_threshold, tuple):
            reset: Reset = "subtract" if module.v_reset is None else "set"
            if reset == "subtract" and not self.soft:
                raise UsageError(
                    f"{where}: NIR sets a neuron to v_reset when it fires, and has no soft reset; "
                    "to_nir(..., soft_reset=True) notes it in the metadata, which from_nir reads and others do not"
                )
            decay, gain = (float(torch.as_tensor(c).detach()) for c in module.charge())
            fires: Any = {"v_threshold": full(module.v_threshold), "v_reset": full(module.v_reset or 0)}
            metadata = fire_metadata(module.strict, reset)
            if decay == 1:
                return self.nir.IF(r=full(gain / self.dt), metadata=metadata, **fires)
            tau = self.dt / (1 - decay)
            return self.nir.LIF(
                tau=full(tau), r=full(gain / (1 - decay)), v_leak=fires["v_reset"], metadata=metadata, **fires
            )
        if isinstance(module, LeakyIntegrator) and type(module) in _FILTERS:
            made = self._filter_node(module, full)
            if made is not None:
                return made
        raise UsageError(
            f"{where}: NIR's neurons charge linearly, step by step, and have one threshold; it has no {kind}"
        )

    def _filter_node(self, module: LeakyIntegrator, full: Callable[[Any], np.ndarray]) -> Any:
        """A readout, or neurons with a synaptic current; None where every feature has decays of its own."""
        alpha, beta = module.decays()
        if alpha.numel() > 1 or beta.numel() > 1:
            return None
        tau, tau_syn = self.dt / (1 - float(beta.detach())), self.dt / (1 - float(alpha.detach()))
        settings: Any = {"r": full(1), "v_leak": full(0)}
        fires = isinstance(module, SynapticLIF)
        if fires:
            settings |= {"v_threshold": full(module.v_threshold), "v_reset": full(0)}
            settings["metadata"] = fire_metadata(module.strict)
        if not module.has_synapse:
            return (self.nir.LIF if fires else self.nir.LI)(tau=full(tau), **settings)
        kind = self.nir.CubaLIF if fires else self.nir.CubaLI
        return kind(tau_mem=full(tau), tau_syn=full(tau_syn), w_in=full(tau_syn / self.dt), **settings)


def _is_mean(node: Node) -> bool:
    """Whether a node is a mean over the last axis of [N, C, positions]."""
    return node.target is aten.mean.dim and [*node.args[1]] in ([2], [-1]) and len(node.args) == 2


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    """One number for all axes, or one each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * axes if len(values) == 1 else values


_FILTERS: tuple[type[Neuron], ...] = (LeakyIntegrator, SynapticLIF)

_OPS: dict[Any, Callable[[_Writer, Node], _Value]] = {
    torch.ops.spikeloom.neurons.default: _Writer.neuron,
    aten.conv1d.default: _Writer.convolution,
    aten.conv2d.default: _Writer.convolution,
    aten.linear.default: _Writer.linear,
    aten.avg_pool2d.default: _Writer.average,
    aten.mean.dim: _Writer.mean,
    aten.flatten.using_ints: _Writer.flatten,
    aten.unflatten.int: _Writer.unflatten,
    aten.expand.default: _Writer.expand,
    aten.select.int: _Writer.select,
    aten.add.Tensor: _Writer.plus,
    aten.pad.default: _Writer.pad,
    aten.constant_pad_nd.default: _Writer.pad,
    aten.max_pool2d.default: _Writer.maximum,
    aten.batch_norm.default: _Writer.norm,
    aten.mul.Tensor: _Writer.product,
    aten.matmul.default: _Writer.product,
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.dropout.default), _Writer.same),
}
