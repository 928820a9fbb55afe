"""Writing a network as ONNX: T steps unrolled into operators of the standard.

The network is traced with one node for a layer of neurons. What stands behind such a node, the reference equations of
these neurons over T steps, is traced once for all layers whose neurons differ in nothing but the values of their
parameters, and put in place of each: tracing thousands of steps one by one would take many minutes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.deploy.exchange.graph import (
    described,
    input_of,
    name_neurons,
    needed,
    quiet,
    reason_of,
    repeats_of,
    trace,
)
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, atomic
from spikeloom.neurons import Neuron

OPSET = 18
"""Version of the operators."""


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: of the file.
        opset: version of the operators.
        nodes: how many operators the graph has.
        steps: T.
        bytes: size of the file.
    """

    path: Path
    opset: int
    nodes: int
    steps: int
    bytes: int


def to_onnx(model: nn.Module, example: Tensor, path: PathLike) -> OnnxFile:
    """Writes the network in eval mode, for as many steps as the example has or `model.T` says.

    The graph holds the reference equations of every layer, step after step, in operators of the standard opset alone;
    a static image passes the layers before the first neurons once, not T times. Input `input`, [N, ...] or
    [T, N, ...] as the example, and output `logits` [T, N, classes] take any batch N.

    Args:
        model: in any mode; it is not changed. Nothing is folded: runtimes fold norms themselves.
        example: an input of any batch, [N, ...] of a static image or [T, N, ...].
        path: of the file, written whole or not at all.

    Raises:
        UsageError: the network draws random numbers, cannot be traced, or needs operators beyond the standard; or a
            package of the extra `exchange` is missing.
    """
    onnx = needed("onnx")
    needed("onnxscript")
    path = Path(path)
    model = copy.deepcopy(model).cpu().float()
    neurons = name_neurons(model)
    example = example.cpu().float()
    steps = repeats_of(trace(model, example))
    axis = 0 if steps else 1
    # A batch of one would be taken for a constant.
    example = example.narrow(axis, 0, 1).expand([2 if a == axis else n for a, n in enumerate(example.shape)])
    program = trace(model, example.contiguous(), {axis: torch.export.Dim("batch", min=1)})
    steps = steps or example.shape[0]
    proto = _convert(program, type(model).__name__, optimize=True, dynamic=({axis: "batch"},))
    _Unrolling(neurons, program).into(proto)
    foreign = sorted({node.domain for node in proto.graph.node} - {"", "ai.onnx"})
    if foreign:
        raise UsageError(f"{type(model).__name__} needs operators beyond the ONNX standard: {', '.join(foreign)}")
    with atomic(path) as temporary:
        onnx.save_model(proto, str(temporary))
        onnx.checker.check_model(str(temporary))
    return OnnxFile(path, OPSET, len(proto.graph.node), steps, path.stat().st_size)


class _Unrolled(NamedTuple):
    """Some neurons over T steps.

    Attributes:
        same: what neurons must have in common to use this graph.
        shape: of the input; None for an axis of any size.
        graph: in ONNX, from one input to one output.
    """

    same: str
    shape: tuple[int | None, ...]
    graph: Any

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of this shape may enter."""
        return len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))


class _Unrolling:
    """Puts the steps of every layer of neurons in the place of its node."""

    def __init__(self, neurons: dict[str, Neuron], program: torch.export.ExportedProgram):
        self.onnx, self.neurons, self.made = needed("onnx"), neurons, list[_Unrolled]()
        nodes = (n for n in program.graph.nodes if n.target is torch.ops.spikeloom.neurons.default)
        self.inputs: dict[str, Tensor] = {str(n.args[1]): n.args[0].meta["val"] for n in nodes}

    def into(self, proto: Any) -> None:
        """Replaces the nodes of a converted network."""
        nodes = list(proto.graph.node)
        del proto.graph.node[:]
        for node in nodes:
            if node.domain == "spikeloom":
                self._put(proto.graph, node)
            else:
                proto.graph.node.append(node)
        used = {name for node in proto.graph.node for name in node.input}
        for number, unrolled in enumerate(self.made):
            for tensor in unrolled.graph.initializer:
                tensor.name = f"steps{number}/{tensor.name}"
                if tensor.name in used:
                    proto.graph.initializer.append(tensor)
        kept = [opset for opset in proto.opset_import if opset.domain != "spikeloom"]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)

    def _put(self, graph: Any, node: Any) -> None:
        (attribute,) = node.attribute
        layer = attribute.s.decode()
        neuron = self.neurons[layer]
        number = self._unrolled(layer, neuron)
        own = self.made[number].graph
        values = dict((*neuron.named_parameters(), *neuron.named_buffers()))
        names = {own.input[0].name: node.input[0], own.output[0].name: node.output[0], "": ""}
        for tensor in own.initializer:
            if tensor.name in values:
                names[tensor.name] = f"{layer}/{tensor.name}"
                value = values[tensor.name].detach().cpu().numpy()
                graph.initializer.append(self.onnx.numpy_helper.from_array(value, names[tensor.name]))
            else:
                names[tensor.name] = f"steps{number}/{tensor.name}"
        for step in own.node:
            copied = graph.node.add()
            copied.CopyFrom(step)
            for field in (copied.input, copied.output):
                field[:] = [names.get(name, f"{layer}/{name}") for name in field]
            copied.name = f"{layer}/{step.name}"

    def _unrolled(self, layer: str, neuron: Neuron) -> int:
        """The number of the graph for a layer, made if there is none."""
        x = self.inputs[layer]
        sizes: tuple[Any, ...] = tuple(x.shape)  # numbers, and symbols for axes of any size
        shape = tuple(n if isinstance(n, int) else 2 for n in sizes)
        same = _without_values(neuron)
        for number, known in enumerate(self.made):
            if known.same == same and known.takes(shape):
                return number
        free = dict.fromkeys(range(1, x.dim()), torch.export.Dim.AUTO)
        program = trace(neuron, torch.zeros(shape, dtype=x.dtype), free)
        _refuse_random(program, f"layer {layer} ({type(neuron).__name__})")
        # Constants are computed beforehand, but not from the neurons' tensors, which have other values in other layers.
        has_tensors = any(True for _ in (*neuron.parameters(), *neuron.buffers()))
        graph = _convert(program, type(neuron).__name__, optimize=not has_tensors).graph
        taken: tuple[Any, ...] = tuple(input_of(program).meta["val"].shape)
        given: tuple[Any, ...] = tuple(program.graph.output_node().args[0][0].meta["val"].shape)  # pyright: ignore
        if isinstance(taken[1], int) or isinstance(given[1], int):
            raise UsageError(f"layer {layer} ({type(neuron).__name__}) takes a batch of one size only")
        self.made.append(_Unrolled(same, tuple(n if isinstance(n, int) else None for n in taken), graph))
        return len(self.made) - 1


def _without_values(neuron: Neuron) -> str:
    """What determines the graph of some neurons: their kind and constants, and the shapes of their tensors."""
    constants = {k: _plain(v) for k, v in vars(neuron).items() if k[0] != "_"}
    tensors = [(k, v.dtype, v.shape) for k, v in (*neuron.named_parameters(), *neuron.named_buffers())]
    return f"{type(neuron)} {constants} {tensors}"


def _plain(value: Any) -> Any:
    """A constant with all its digits: numpy and PyTorch print large arrays in part."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _refuse_random(program: torch.export.ExportedProgram, layer: str = "") -> None:
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UsageError(
                f"{layer or described(node)} draws random numbers ({node.target}), and an ONNX graph would draw "
                "others: use neurons that are not stochastic"
            )


def _convert(program: torch.export.ExportedProgram, name: str, optimize: bool, dynamic: Any = None) -> Any:
    """An exported graph in ONNX, a `ModelProto`; a layer of neurons is one node of the domain `spikeloom`.

    `dynamic` names the axes of any size.
    """
    _refuse_random(program)
    node = _neurons_node()

    def neurons(x: Any, name: str) -> Any:
        return node(x, name=name)

    table = {torch.ops.spikeloom.neurons.default: neurons}
    try:
        with quiet():
            written: Any = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["input"],
                output_names=["logits"],
                opset_version=OPSET,
                optimize=optimize,
                dynamic_shapes=dynamic,
                custom_translation_table=table,
            )
    except Exception as error:
        raise UsageError(f"{name} cannot be written as ONNX: {reason_of(error)}") from error
    return written.model_proto


def _neurons_node() -> Any:
    """The operator that stands for a layer of neurons until its steps take its place."""
    defs, values = needed("onnx").defs, needed("onnxscript").values
    tensor = [defs.OpSchema.FormalParameter(name, "T") for name in ("x", "y")]
    schema = defs.OpSchema(
        "neurons",
        "spikeloom",
        1,
        inputs=tensor[:1],
        outputs=tensor[1:],
        type_constraints=[("T", ["tensor(float)"], "potentials and spikes")],
        attributes=[defs.OpSchema.Attribute("name", defs.OpSchema.AttrType.STRING)],
    )
    return values.Op(values.Opset("spikeloom", 1), "neurons", schema)
