"""Time-first layers: sequences [T, N, ...] in and out."""

from spikeloom.layers.norm import BatchNorm, NormSpike, TdBN
from spikeloom.layers.shortcuts import (
    COMBINE,
    MembraneBlock,
    PadShortcut,
    SEWBlock,
    VanillaBlock,
    basic_branch,
)
from spikeloom.layers.spiking_attention import AttentionProduct, SpikingSelfAttention, mlp_branch, patch_units
from spikeloom.layers.steps import (
    AvgPool1d,
    AvgPool2d,
    Conv1d,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    each_step,
    repeats,
)

__all__ = [
    "COMBINE", "AttentionProduct", "AvgPool1d", "AvgPool2d", "BatchNorm", "Conv1d", "Conv2d", "Flatten",
    "GlobalAvgPool", "Linear", "MaxPool2d", "MembraneBlock", "NormSpike", "PadShortcut", "SEWBlock",
    "SpikingSelfAttention", "TdBN", "VanillaBlock", "basic_branch", "each_step", "mlp_branch", "patch_units",
    "repeats",
]  # fmt: skip
