"""Weights of an ordinary ResNet, trained without spikes, as the start of a spiking one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.files import read_state_dict
from spikeloom.layers import NormSpike
from spikeloom.models._residual import ResidualNet

PretrainedANN = str | os.PathLike[str] | Mapping[str, Tensor] | None
"""A state dict of a torchvision ResNet, a safetensors or `torch.save` file of one, or None."""


@torch.no_grad()
def load_ann(model: ResidualNet, weights: PretrainedANN) -> None:
    """Copies convolutions, norms and the classifier of a torchvision ResNet wherever the shapes are the same.

    Layers are matched by their place: blocks in their order, convolutions and norms within a block. What has no
    counterpart of its shape stays as it was; a warning names it.

    Args:
        model: with basic or bottleneck blocks.
        weights: names are torchvision's: `conv1`, `bn1`, `layer1.0.conv1`, ..., `fc`. None does nothing.

    Raises:
        UsageError: no such file, not a state dict, or nothing fits.
    """
    if weights is None:
        return
    state = read_state_dict(weights, "pretrained_ann") if isinstance(weights, str | os.PathLike) else weights
    blocks = sorted({(int(m[1]), int(m[2])) for key in state if (m := re.match(r"layer(\d+)\.(\d+)\.", key))})
    places: dict[str, nn.Module] = {"conv1": model.stem, "bn1": model.stem_spike.norm}
    places["fc"] = model.head[-1] if isinstance(model.head, nn.Sequential) else model.head
    for (layer, index), block in zip(blocks, model.blocks, strict=False):
        places |= {f"layer{layer}.{index}.{name}": module for name, module in _places(block).items()}
    left: list[str] = []
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        target = getattr(places.get(name), kind, None)
        if isinstance(target, Tensor) and target.shape == value.shape:
            target.copy_(value)
        else:
            left.append(f"{key} {tuple(value.shape)}")
    if len(left) == len(state):
        raise UsageError(
            "pretrained_ann: none of its weights fits this network; expected a state dict of a torchvision ResNet of "
            "the same depth (conv1.weight, layer1.0.conv1.weight, ..., fc.weight)"
        )
    if left:
        warnings.warn(
            f"pretrained_ann: {len(left)} of {len(state)} tensors have no counterpart of their shape and were not "
            f"taken: {', '.join(left[:6])}{', ...' if len(left) > 6 else ''}",
            stacklevel=2,
        )


def _places(block: nn.Module) -> dict[str, nn.Module]:
    """The layers of a block by torchvision's names."""
    branch = list(block.get_submodule("branch").children())
    norms = [unit.norm for unit in (*branch[1::2], block.get_submodule("spike")) if isinstance(unit, NormSpike)]
    named = {f"conv{k}": conv for k, conv in enumerate(branch[::2], start=1)}
    named |= {f"bn{k}": norm for k, norm in enumerate(norms, start=1)}
    shortcut = list(block.get_submodule("shortcut").children())
    if shortcut:
        end = shortcut[-1]
        named |= {"downsample.0": shortcut[-2], "downsample.1": end.norm if isinstance(end, NormSpike) else end}
    return named
