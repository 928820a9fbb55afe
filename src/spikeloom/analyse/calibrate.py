"""Norms with the statistics of one batch, for networks that were not trained."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.layers import BatchNorm


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose norms have the statistics of x, as at the first training step.

    A norm that runs more than once, in a loop over time, takes the mean of its statistics.
    """
    model = copy.deepcopy(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    before = [norm.momentum for norm in norms]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for norm in norms:
            norm.momentum = 1.0
            if not isinstance(norm, BatchNorm):  # ours takes the whole sequence
                stack.callback(norm.register_forward_pre_hook(_averaging()).remove)
        model(x)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model.eval()


def _averaging() -> Callable[..., None]:
    """A hook whose norm averages the statistics of all its calls."""
    calls = itertools.count(1)

    def hook(norm: Any, args: Any) -> None:
        norm.momentum = 1 / next(calls)

    return hook
