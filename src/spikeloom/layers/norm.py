"""Batch normalisation over time, batch and space, alone or as one unit with the neuron behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.layers.steps import each_step, repeats
from spikeloom.neurons.base import make_neuron
from spikeloom.stream import recomputing


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of [T, N, C, ...], statistics per channel over all other axes.

    Weights and buffers are those of `torch.nn.BatchNorm2d`. One element per channel gives zero before weight and
    bias, where `torch.nn` raises. A repeated image is normalised once, as if it had been repeated.

    Args:
        channels: C.
        eps, momentum: as `torch.nn`.
    """

    running_mean: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    running_var: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    num_batches_tracked: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: float  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(channels, eps, momentum)

    def scaled_weight(self) -> Tensor:
        """What multiplies the normalised input."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return each_step(
                lambda y: F.batch_norm(
                    y, self.running_mean, self.running_var, self.scaled_weight(), self.bias, False, 0.0, self.eps
                ),
                input,
            )
        steps = input.shape[0] if repeats(input) else 1

        def normalise(y: Tensor) -> Tensor:
            count = y.numel() // y.shape[1]
            shape = (-1, *(1,) * (y.dim() - 2))
            if count == 1:
                self._track(y.detach().flatten().float(), torch.zeros_like(self.running_var))
                return y * 0 + self.bias.to(y.dtype).view(shape)
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            # With momentum 1 the buffers receive the batch's own statistics, variance with the factor n / (n - 1).
            z = F.batch_norm(y, mean, variance, self.scaled_weight(), self.bias, True, 1.0, self.eps)
            self._track(mean, variance * ((count - 1) * steps / (count * steps - 1)))
            return z

        return each_step(normalise, input)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if recomputing():
            return
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class TdBN(BatchNorm):
    """Threshold-dependent batch normalisation (Zheng et al. 2021, tdBN, Eqs. 6-8): std `alpha v_threshold` at first.

    Args:
        channels: C.
        v_threshold: of the neuron behind.
        alpha: 1, or `1 / sqrt(n)` where n normalised branches are added before a neuron.
        form: "multiplier", `y = weight alpha v_threshold xh + bias` with weight from 1; or "affine",
            `y = weight xh + bias` with weight from `alpha v_threshold` (SpikingJelly, MS-ResNet). The same function
            at first, with another learning rate of the weight.
        eps_outside: divide by `sqrt(var) + eps` instead of `sqrt(var + eps)` (released DS-ResNet code).
        eps, momentum: as `BatchNorm`.
    """

    def __init__(
        self,
        channels: int,
        v_threshold: float = 1.0,
        alpha: float = 1.0,
        form: Literal["multiplier", "affine"] = "multiplier",
        eps_outside: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__(channels, eps, momentum)
        if form not in ("multiplier", "affine"):
            raise ValueError(f"form must be 'multiplier' or 'affine', got {form!r}")
        self.scale = alpha * v_threshold if form == "multiplier" else 1.0
        self.eps_outside = eps_outside
        if form == "affine":
            nn.init.constant_(self.weight, alpha * v_threshold)

    def scaled_weight(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        if not self.eps_outside:
            return super().forward(input)
        shape = (1, -1, *(1,) * (input.dim() - 3))

        def normalise(y: Tensor) -> Tensor:
            mean, variance = self.running_mean, self.running_var
            if self.training:
                axes = [0, *range(2, y.dim())]
                count = y.numel() // y.shape[1] * (input.shape[0] if repeats(input) else 1)
                variance, mean = torch.var_mean(y if y.dtype == torch.float64 else y.float(), axes, correction=0)
                self._track(mean, variance * (count / max(count - 1, 1)))
            # The square root has no gradient at 0: a constant channel, or a single element.
            deviation = variance.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            factor = self.scaled_weight() / (deviation + self.eps)
            return ((y - mean.view(shape)) * factor.view(shape) + self.bias.view(shape)).to(y.dtype)

        return each_step(normalise, input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, eps_outside={self.eps_outside}"


class NormSpike(nn.Module):
    """Normalisation, an optional residual added to it, and the neuron: one unit, so that all three can be one pass.

    Args:
        channels: C of the input.
        neuron: makes the neuron layer.
        norm: makes the normalisation from `channels`.

    Shapes: input and residual [T, N, C, ...] -> spikes [T, N, C, ...].
    """

    def __init__(
        self,
        channels: int,
        neuron: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module] = BatchNorm,
    ):
        super().__init__()
        self.norm = norm(channels)
        self.neuron = make_neuron(neuron, channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.with_sum(x, residual)[0]

    def with_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The spikes, and the sum of norm and residual that caused them: what a membrane shortcut carries on."""
        u = self.norm(x)
        if residual is not None:
            u = u + residual
        return self.neuron(u), u


def add_to_branches(count: int) -> float:
    """tdBN's alpha where `count` normalised branches are added before a neuron (Zheng et al. 2021, Sec. 3.3)."""
    return 1 / math.sqrt(count)
