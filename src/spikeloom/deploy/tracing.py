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


def trace(model: nn.Module, example: Tensor, dynamic: Any = None) -> torch.export.ExportedProgram:
    """The graph of a module in eval mode, of the ops' references, without gradients.

    Args:
        model: is put into eval mode.
        example: its input.
        dynamic: the axes of it that may have any size, as `torch.export` takes them.

    Raises:
        UsageError: the module cannot be traced with this input; the message has the first line of the reason.
    """
    try:
        with quiet(), backend("reference"), torch.no_grad():
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


def needed(name: str) -> Any:
    """A package of the extra `exchange`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"the Python package {name!r} is not installed: pip install 'spikeloom[exchange]'") from None
