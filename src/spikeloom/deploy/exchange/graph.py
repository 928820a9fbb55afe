"""What the exporters share: the graph of a network by `torch.export`, and errors that name a layer."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.neurons import Neuron
from spikeloom.ops import backend
from spikeloom.ops._dispatch import Backend

torch.library.define("spikeloom::neurons", "(Tensor x, str name) -> Tensor")


def _same_shape(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


torch.library.register_fake("spikeloom::neurons", _same_shape)


class _Named(nn.Module):
    """Stands for a neuron layer while a graph is traced: one node that says which."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spikeloom.neurons(x, self.name)


def name_neurons(model: nn.Module) -> dict[str, Neuron]:
    """Puts a placeholder where each neuron layer of the model is; returns the layers by their names.

    A traced graph then has nodes `spikeloom::neurons(x, name)`, whatever backend would have run them.
    """
    neurons = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Neuron) and name}
    for name in neurons:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _Named(name))
    return neurons


def trace(
    model: nn.Module, example: Tensor, dynamic: Any = None, ops: Backend = "reference"
) -> torch.export.ExportedProgram:
    """The graph of a module in eval mode, without gradients.

    Args:
        model: is put into eval mode.
        example: its input.
        dynamic: the axes of it that may have any size, as `torch.export` takes them.
        ops: the backend that is traced: "reference" gives the ops' equations, "native" one node for each op.

    Raises:
        UsageError: the module cannot be traced with this input; the message has the first line of the reason.
    """
    try:
        with quiet(), backend(ops), torch.no_grad():
            return torch.export.export(model.eval(), (example,), dynamic_shapes=None if dynamic is None else (dynamic,))
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be traced on an input {tuple(example.shape)}: {reason_of(error)}"
        ) from error


def reason_of(error: Exception) -> str:
    """The first line of what went wrong."""
    return (str(error.__cause__ or error).strip() or type(error).__name__).split("\n")[0]


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the progress, warnings and logs of PyTorch's exporters, which speak of their own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def input_of(program: torch.export.ExportedProgram) -> torch.fx.Node:
    """The placeholder of the network's input."""
    (name,) = program.graph_signature.user_inputs
    return next(node for node in program.graph.nodes if node.name == name)


def repeats_of(program: torch.export.ExportedProgram) -> int | None:
    """How often a network repeats its input, if that is a static image [N, ...]; None for a sequence [T, N, ...]."""
    node = input_of(program)
    shape = node.meta["val"].shape
    # It is repeated before anything else happens to it.
    longer = (user.meta["val"].shape for user in node.users if user.target is torch.ops.aten.expand.default)
    return next((int(s[0]) for s in longer if len(s) > len(shape)), None)


def place(node: torch.fx.Node) -> tuple[str, str]:
    """Name and class of the layer in which a node of an exported graph was computed."""
    stack = node.meta.get("nn_module_stack") or {}
    name, kind = next(reversed(stack.values()), ("", ""))
    return name, str(kind).rpartition(".")[2]


def described(node: torch.fx.Node) -> str:
    """A layer for error messages, as `layer blocks.0.pool (MaxPool2d)`."""
    name, kind = place(node)
    return f"layer {name or 'the network itself'} ({kind})"


class Aliases:
    """Which tensors of a graph lie in the same memory."""

    def __init__(self, graph: torch.fx.Graph):
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.root: dict[torch.fx.Node, torch.fx.Node] = {}
        self.same: dict[torch.fx.Node, list[torch.fx.Node]] = {}
        for node in graph.nodes:
            target: Any = node.target
            schema = getattr(target, "_schema", None)
            alias = schema is not None and (any(r.alias_info for r in schema.returns) or "dropout" in schema.name)
            sources = node.all_input_nodes if alias else []
            self.root[node] = self.root[sources[0]] if sources else node
            self.same.setdefault(self.root[node], []).append(node)

    def written_and_read(self, node: torch.fx.Node) -> bool:
        """Whether a node writes into its first input, and the memory is read later but by what it returns."""
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is None or not schema.is_mutable:
            return False
        now = self.position[node]
        before = (one for one in self.same[self.root[node]] if self.position[one] < now)
        return any(self.position[user] > now for one in before for user in one.users)


def needed(name: str) -> Any:
    """A package of the extra `exchange`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"the Python package {name!r} is not installed: pip install 'spikeloom[exchange]'") from None
