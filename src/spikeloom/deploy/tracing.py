"""What the exporters share: the graph of a network by `torch.export`, and errors that name a layer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.neurons import Neuron

torch.library.define("spikeloom::neurons", "(Tensor x, str name) -> Tensor")


@torch.library.register_fake("spikeloom::neurons")
def _neurons(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class _Named(nn.Module):
    """Stands for a neuron layer while a graph is traced: one node that says which."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.spikeloom.neurons(x, self.name)


def trace(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The graph of a network in eval mode; its neuron layers are nodes `spikeloom::neurons(x, name)`, whatever backend
    would run them.

    Args:
        model: is changed: its neuron layers become placeholders.
        example: an input, [N, ...] or [T, N, ...] as the network takes it.

    Raises:
        UsageError: the network cannot be traced with this input.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Neuron) and name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _Named(name))
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), (example,))
    except Exception as error:
        raise cannot_trace(model, example, error) from error


def cannot_trace(model: nn.Module, example: Tensor, error: Exception) -> UsageError:
    """The error of a network that `torch.export` does not take, with the first line of its reason."""
    reason = str(error.__cause__ or error).strip().split("\n")[0]
    return UsageError(f"{type(model).__name__} cannot be traced on an input {tuple(example.shape)}: {reason}")


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
        raise UsageError(
            f"the Python package {name!r} is not installed: pip install 'spikeloom[exchange]'"
        ) from None
