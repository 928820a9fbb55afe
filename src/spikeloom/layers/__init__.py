"""Time-first layers: sequences [T, N, ...] in and out."""

from spikeloom.layers.attention import SpatialAttention, SynapticAttention
from spikeloom.layers.norm import BatchNorm, NormSpike, TdBN
from spikeloom.layers.shortcuts import (
    COMBINE,
    Block,
    MembraneBlock,
    PadShortcut,
    PlainBlock,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    bottleneck_branch,
    conv_shortcut,
    residual_stages,
    start_as_identity,
)
from spikeloom.layers.spiking_attention import AttentionProduct, SpikingSelfAttention, mlp_branch, patch_units
from spikeloom.layers.steps import (
    AvgPool1d,
    AvgPool2d,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    each_step,
    repeats,
)

__all__ = [
    "AttentionProduct", "AvgPool1d", "AvgPool2d", "BatchNorm", "Block", "COMBINE", "Conv1d", "Conv2d", "Dropout",
    "Flatten", "GlobalAvgPool", "Linear", "MaxPool2d", "MembraneBlock", "NormSpike", "PadShortcut", "PlainBlock",
    "SEWBlock", "SpatialAttention", "SpikingSelfAttention", "SynapticAttention", "TdBN", "VanillaBlock", "basic_branch",
    "bottleneck_branch", "conv_shortcut", "each_step", "mlp_branch", "patch_units", "repeats", "residual_stages",
    "start_as_identity",
]  # fmt: skip
