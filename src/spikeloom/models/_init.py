"""How weights are drawn, where a paper says it."""

from __future__ import annotations

from typing import Literal

from torch import nn


def kaiming(model: nn.Module, mode: Literal["fan_in", "fan_out"], linear: bool) -> None:
    """Kaiming-normal weights and zero biases for all convolutions and, with `linear`, all linear layers."""
    kinds = nn.Conv2d | nn.Linear if linear else nn.Conv2d
    for module in model.modules():
        if isinstance(module, kinds):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
