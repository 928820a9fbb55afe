"""What a network costs by its layout alone: parameters, and operations by the two rules of the course report."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.layers import DelayedLinear


@dataclass(frozen=True)
class Cost:
    """Counts for one image.

    Attributes:
        parameters: trainable elements.
        macs: multiply-accumulates of convolutions (groups respected) and linear layers, one time step. A weight with a
            delay counts once.
        flops_s0: the rule that all published FLOPs of the course report follow: `macs`, plus 2 T per
            output element of a batch norm, plus one step's bias additions of convolutions and inputs of poolings
            that have a window.
    """

    parameters: int
    macs: int
    flops_s0: int


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """A model in eval mode; each of its modules is put back as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def steps_of(model: nn.Module, x: Tensor, sequence: bool) -> int:
    """T of what a model gets: that of a sequence x [T, N, ...]; of images [N, ...] what the model makes of them."""
    return len(x) if sequence else int(getattr(model, "T", 1))


def count_cost(model: nn.Module, image: tuple[int, ...], T: int) -> Cost:
    """Counts the cost of a model for one image of shape [C, H, W], or another input of one step, over T steps.

    The model runs once on the CPU, on T empty steps.
    """
    macs, norm, other = 0, 0, 0

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        nonlocal macs, norm, other
        if isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
            each = args[0] if module.transposed else output
            macs += each[0].numel() * module.weight[0].numel()
            other += output[0].numel() if module.bias is not None else 0
        elif isinstance(module, nn.Linear | DelayedLinear):
            macs += output[0].numel() * module.weight.shape[1]
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            norm += output[0].numel()
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AvgPool1d):
            other += args[0][0].numel()

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(T, 1, *image))
    finally:
        for handle in handles:
            handle.remove()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, macs, macs + 2 * T * norm + other)
