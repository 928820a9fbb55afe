"""Norms with the statistics of one batch, for networks that were not trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from spikeloom.layers.norm import measuring


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode whose norms have the statistics of x, as at the first training step.

    A norm that runs more than once, in a loop over time, takes the mean of its statistics.
    """
    model = copy.deepcopy(model).train()
    with torch.no_grad(), measuring(model):
        model(x)
    return model.eval()
