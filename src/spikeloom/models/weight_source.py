"""Where weights from elsewhere come from: a module, its state dict, or a file of that; as layers in their order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.files import read_state_dict

Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module
"""A module, its state dict, or a safetensors or `torch.save` file of that."""

COUNTER = "num_batches_tracked"  # of a norm: no part of what it computes in eval mode

# Parts of names in SpikingJelly's networks, in the order in which these register them.
_ORDER = [
    "stem",
    "spike1",
    "conv1",
    "bn1",
    "sn1",
    "spike2",
    "conv2",
    "bn2",
    "sn2",
    "conv3",
    "bn3",
    "sn3",
    "downsample",
    "downsample_sn",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "patch_embed",
    "stages",
    "conv_bn",
    "block",
    "neuron",
    "positional_encoding",
    "features",
    "blocks",
    "attn",
    "qkv_conv_bn",
    "qkv_lif",
    "attn_lif",
    "proj_conv_bn",
    "proj_lif",
    "mlp",
    "fc1",
    "neuron1",
    "fc2",
    "neuron2",
    "head_lif",
    "classifier",
    "fc",
    "head",
]
_RANK = {part: rank for rank, part in enumerate(_ORDER)}


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer: `weight`, `bias`, statistics, or what a neuron learns.

    Attributes:
        name: of the layer.
        tensors: by their names in the layer.
    """

    name: str
    tensors: dict[str, Tensor]

    def key(self, kind: str) -> str:
        """The full name of a tensor."""
        return f"{self.name}.{kind}" if self.name else kind

    @property
    def signature(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What two layers must share to be one: shapes of all but bias and counter, kernels of 1x1 as linear layers."""
        kinds = sorted(self.tensors.keys() - {"bias", COUNTER})
        return tuple((kind, _plain(self.tensors[kind].shape)) for kind in kinds)


def layers_of(source: Source, owner: str) -> list[Layer]:
    """The layers of a source that hold tensors, in the order in which they were registered.

    Args:
        source: as `copy_weights`.
        owner: who asks, for messages.

    Raises:
        UsageError: values that are no tensors, or names that a file of safetensors has sorted and that do not tell the
            order of the layers.
        DataFileError: a file that cannot be read.
    """
    if isinstance(source, nn.Module):
        state: Mapping[str, Tensor] = source.state_dict()
    elif isinstance(source, Mapping):
        state = source
    else:
        state = read_state_dict(source, owner)
    layers: dict[str, Layer] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(
                f"{owner}: {key} is a {type(tensor).__name__}, not a tensor: give a state dict or a module"
            )
    for key in _in_order(list(state), owner):
        tensor = state[key]
        name, _, kind = key.rpartition(".")
        layers.setdefault(name, Layer(name, {})).tensors[kind] = tensor
    return list(layers.values())


def _plain(shape: Any) -> tuple[int, ...]:
    """A kernel's shape without axes of one position: a 1x1 convolution is a linear layer."""
    plain = list(shape)
    while len(plain) > 2 and plain[-1] == 1:
        plain.pop()
    return tuple(plain)


def _in_order(keys: list[str], owner: str) -> list[str]:
    """Names of tensors in the order of their registration, also where safetensors has sorted them.

    Raises:
        UsageError: they are sorted, and of a network whose order is not known.
    """
    if not _sorted_by_name(keys):
        return keys
    paths = {key: key.removeprefix("module.").split(".")[:-1] for key in keys}
    unknown = [part for path in paths.values() for part in path if not part.isdigit() and part not in _RANK]
    if unknown:
        raise UsageError(
            f"{owner}: the names of the tensors are sorted, as by safetensors, and the order of the layers is lost "
            f"({unknown[0]!r} may be anywhere): give the module itself, or its state dict saved by torch.save"
        )
    return sorted(
        keys, key=lambda key: [(int(part), -1) if part.isdigit() else (-1, _RANK[part]) for part in paths[key]]
    )


def _sorted_by_name(keys: list[str]) -> bool:
    """Whether names are sorted: modules register a weight before its bias."""
    place = {key: number for number, key in enumerate(keys)}
    return any(
        place.get(f"{name}.weight", number) > number
        for key, number in place.items()
        if (name := key.rpartition(".")[0]) and key.endswith(".bias")
    )
