"""Attention: learned masks over the steps, channels or positions of a sequence [T, N, C, H, W].

    MA   y = ReLU(sigmoid(z) x)              SynA-ResNet's modulation, on a branch
    IA   y = ReLU(Theta(z / tau - V_th) x)   its inhibition, on a shortcut: a binary gate that can shut all of it
    SAM  y = sigmoid(z) x                    spatial attention of each step by itself (CBAM; Woo et al. 2018)

with a score z(x) from means and maxima of x.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.layers.stateless import check_axes, each_step
from spikeloom.neurons.psn import check_length
from spikeloom.stream import streaming

Axis = Literal["time", "channel", "space"]
"""Over which axis a mask varies."""


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False))


class TimeScore(nn.Module):
    """`z = MLP(mean x) + MLP(max x)` over (C, H, W), MLP T - T/4 - T. Shapes: [T, N, C, H, W] -> [T, N, 1, 1, 1]."""

    def __init__(self, T: int):
        super().__init__()
        self.T = T
        self.mlp = _mlp(T, max(T // 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        check_length(self, self.T, x)
        steps = x.flatten(2).transpose(0, 1)
        z = self.mlp(torch.stack([steps.mean(2), steps.amax(2)])).sum(0)
        return z.t()[..., None, None, None]


class ChannelScore(nn.Module):
    """`z = MLP(mean x) + MLP(max x)` over (T, H, W), one MLP C - 8 - C. Shapes: [T, N, C, H, W] -> [1, N, C, 1, 1]."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = _mlp(channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        axes = (0, 3, 4)
        return self.mlp(torch.stack([x.mean(axes), x.amax(axes)])).sum(0)[None, ..., None, None]


class SpaceScore(nn.Module):
    """`z = Conv([mean x, max x])` over channels, here T C of them. Shapes: [T, N, C, H, W] -> [1, N, 1, H, W]."""

    def __init__(self, kernel: int):
        super().__init__()
        self.conv = _space_conv(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_mean_and_max(x.transpose(0, 1).flatten(1, 2)))[None]


def _space_conv(kernel: int) -> nn.Conv2d:
    return nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)


def _mean_and_max(x: Tensor) -> Tensor:
    return torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)


class SynapticAttention(nn.Module):
    """`y = ReLU(g(z(x)) x)`: MA with a sigmoid for g, IA with a neuron, which starts from rest at every call.

    Args:
        axis: what the score z weighs.
        gate: g, from the scores as a sequence of one step.
        T, channels: of x, where the score needs them.
        kernel: of the score over space.

    Shapes: [T, N, C, H, W] -> the same.
    Under a Stream it raises: every score needs the whole sequence.
    """

    def __init__(self, axis: Axis, gate: nn.Module, T: int, channels: int, kernel: int = 3):
        super().__init__()
        if axis == "time":
            self.score: nn.Module = TimeScore(T)
        elif axis == "channel":
            self.score = ChannelScore(channels)
        else:
            self.score = SpaceScore(kernel)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = check_axes(self, x, 5)
        if streaming():
            raise RuntimeError(
                "attention needs the whole sequence at once and cannot run under a Stream; a model without it can step"
            )
        return F.relu(x * self.gate(self.score(x)[None])[0])  # in the order of memory of the first factor


class SpatialAttention(nn.Module):
    """SAM: `y = sigmoid(Conv([mean x, max x])) x`, means and maxima over the channels of each step.

    Its output is real-valued: the convolution behind it multiplies.

    Shapes: [T, N, C, H, W] -> the same.
    """

    def __init__(self, kernel: int = 7):
        super().__init__()
        self.conv = _space_conv(kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = check_axes(self, x, 5)
        return each_step(lambda y: torch.sigmoid(self.conv(_mean_and_max(y))) * y, x)
