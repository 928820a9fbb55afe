"""Small networks: registered ones as small as they go with the shapes of their inputs, and some layers in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.encode import repeat
from spikeloom.layers import channels_last
from spikeloom.models import list_models

SMALL: dict[str, dict[str, Any]] = {
    **{name: {"channels": 32, "heads": 4, "depth": 1} for name in list_models("spik*former_*")},
    "sequential_cifar_net": {"channels": 16},
    "psn_cifar_net": {"channels": 8},
    "cifarnet": {"T": 2},
    **{name: {"hidden": 16} for name in list_models("spiking_vgg*")},
}
SHAPES = {
    "sequential_cifar_net": (3, 32),
    "shd_net": (700,),
    "delay_net": (140,),
    "paralif_shd": (700,),
    "paralif_ntidigits": (64,),
    "paralif_nmnist": (1, 34, 34),
    "paralif_gesture": (2, 64, 64),
    "colored_mnist_net": (3, 28, 28),
}
SMALL["masked_autoencoder"] = {
    "encoder": "spikformer_v2_2_64",
    "image_size": 32,
    "decoder_depth": 1,
    "decoder_width": 32,
    "decoder_heads": 4,
}
# The events of these have two channels, whatever the side.
EVENTS = dict.fromkeys((*list_models("spik*_dvs"), "ds_resnet14_dvs", "ds_resnet20_gesture"), (2, 32, 32))
EVENTS |= dict.fromkeys(list_models("*_7b"), (2, 128, 128)) | {"vggsnn": (2, 16, 16), "plif_net": (2, 16, 16)}
SMALL |= {name: {"T": 2} for name in list_models("*_7b")} | {"vggsnn": {"T": 2, "image_size": 16}}
SMALL["plif_net"] = {"convs": 2, "channels": 16, "hidden": 32, "image_size": 16}


def shortened(model: nn.Module, most: int = 2) -> nn.Module:
    """A residual network, in place, without most of the blocks that repeat others; any other network as it is.

    All blocks stay that change the shape of their input. Of the others between two of these `most` stay of each kind:
    of the same layers, whatever their widths.
    """
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        return model
    seen: Counter[tuple[type[nn.Module], ...]] = Counter()
    blocks: Any = model.blocks
    kept = nn.ModuleList()
    for block in blocks:
        kind = tuple(type(module) for module in block.modules())
        if not isinstance(getattr(block, "shortcut", None), nn.Identity):
            seen.clear()
        else:
            seen[kind] += 1
        if seen[kind] <= most:
            kept.append(block)
    model.blocks = kept
    return model


def in_order(x: Tensor) -> Tensor:
    """Images or frames in the order of memory in which a network computes; exported, it computes in its input's."""
    return x if x.dim() < 4 else channels_last(x) if x.dim() == 5 else channels_last(x[None])[0]


class Net(nn.Module):
    """Layers on an image of `dims` axes, repeated T times, or on a sequence."""

    def __init__(self, *layers: nn.Module, dims: int = 4, T: int = 4):
        super().__init__()
        self.layers, self.dims, self.T = nn.Sequential(*layers), dims, T

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(repeat(x, self.T) if x.dim() == self.dims else x)


class Graph(nn.Module):
    """Modules by their names, and a function of them and x."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@torch.no_grad()
def lively(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with norms that have seen x and let all layers fire."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 1.0, 2.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.momentum = 1.0
    model.train()(x)
    return model.eval()
