"""Small networks for the event engine, whose weights are on a grid, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.small_networks import Graph
from spikeloom.layers import Conv2d, Flatten, GlobalAvgPool, Linear
from spikeloom.neurons import IF, LIF

T, N, C, H, W = 3, 2, 4, 2, 3


@torch.no_grad()
def on_a_grid(model: nn.Module, shaken: bool = True) -> nn.Module:
    """The model with weights in multiples of 1/8, of which no sum here rounds."""
    for parameter in model.parameters():
        parameter.copy_(torch.randint(-8, 9, parameter.shape) / 8)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        if norm.running_mean is not None and shaken:
            norm.running_mean.copy_(torch.randint(-4, 5, norm.running_mean.shape) / 8)
            norm.running_var.copy_(4.0 ** torch.randint(-1, 2, norm.running_mean.shape) - norm.eps)  # pyright: ignore
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randint(-8, 17, shape) / 8


def unit(function: Callable[[Tensor, Any], Tensor], width: int = C) -> nn.Module:
    """A network with a function between its neurons and its head."""
    return on_a_grid(
        Graph(
            lambda m, x: m.head(m.pool(function(m.neuron(m.conv(x)), m))),
            conv=Conv2d(2, C, 3, padding=1),
            neuron=IF(),
            pool=GlobalAvgPool(),
            head=Linear(width, 5),
        )
    )


def layers() -> dict[str, nn.Module]:
    return {
        "conv": Conv2d(2, C, 3, padding=1),
        "neuron": LIF(),
        "flatten": Flatten(),
        "head": nn.Linear(C * 16, 5),
    }


def net(m: Any, x: Tensor) -> Tensor:
    return m.head(m.flatten(m.neuron(m.conv(x))))
