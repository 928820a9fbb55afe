"""SEW ResNet and MS-ResNet against the released code: the same weights give the same spikes, outputs and gradients."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from helpers.golden_vectors import Golden
from torch import Tensor, nn

from spikeloom.layers import (
    MembraneBlock,
    NormSpike,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    bottleneck_branch,
    conv_shortcut,
)
from spikeloom.models import create_model
from spikeloom.models.ms_resnet import ms_lif, norm
from spikeloom.neurons import IF

NETWORKS = {
    "sew_7b_add": functools.partial(create_model, "sew_7b"),
    "sew_7b_iand": functools.partial(create_model, "sew_7b", combine="iand"),
    "spiking_7b": functools.partial(create_model, "spiking_7b"),
    "sew_wide_7b_add": functools.partial(create_model, "sew_wide_7b"),
    "sew_resnet18_add": functools.partial(create_model, "sew_resnet18"),
    "ms_resnet18": functools.partial(create_model, "ms_resnet18"),
    "ms_resnet104_stem_1111": functools.partial(
        create_model, "ms_resnet104", stem="3x3", counts=(1, 1, 1, 1), num_classes=100
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(golden_networks: Golden, name: str) -> None:
    case, model = golden_networks.network(name), NETWORKS[name]().eval()
    # Frames come as [N, T, ...].
    x = case.input.transpose(0, 1).contiguous() if case.input.dim() == 5 else case.input
    case.load(model, lambda: model(x))
    case.check(model, lambda x: model(x).mean(0), x)


class MembraneEntry(nn.Module):
    """An MS block that takes the membrane input alone, as the released one does: its own neuron first, none last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, pool: bool):
        super().__init__()
        self.neuron = ms_lif()
        self.block = MembraneBlock(
            basic_branch(in_channels, out_channels, stride, ms_lif, norm=norm),
            NormSpike(out_channels, nn.Identity, norm),
            conv_shortcut(in_channels, out_channels, stride, norm=norm, pool=pool),
        )

    def forward(self, u: Tensor) -> Tensor:
        return self.block(self.neuron(u), u)[1]


def block_of(constructor: str) -> nn.Module:
    """Our block for the released constructor's call."""
    kind, in_channels, width = re.match(r"(\w+)\((\d+), (\d+)", constructor).groups()  # pyright: ignore
    branch: Callable[..., nn.Sequential] = bottleneck_branch if kind == "Bottleneck" else basic_branch
    channels, out = int(in_channels), int(width) * (4 if kind == "Bottleneck" else 1)
    stride = 2 if "stride=2" in constructor else 1
    if kind.startswith("BasicBlock_"):
        return MembraneEntry(channels, out, stride, pool="104" in kind)
    body, spike = branch(channels, out, stride, IF), NormSpike(out, IF)
    combine = re.search(r"connect_f='(\w+)'", constructor)
    if combine is None:
        return VanillaBlock(body, spike, conv_shortcut(channels, out, stride))
    return SEWBlock(body, spike, conv_shortcut(channels, out, stride, IF), combine[1].lower())


BLOCKS = [
    *(f"sew_block_basicblock_{g}{end}" for g in ("add", "and", "iand") for end in ("", "_down", "_train")),
    *(f"sew_block_bottleneck_add{end}" for end in ("", "_down", "_train", "_down_train")),
    "sew_block_basicblock_add_down_train",
    "spiking_block_basic_down",
    "spiking_block_basic_train",
    *(f"ms_block{end}" for end in ("", "_down", "_train", "_down_train", "104_down")),
]


@pytest.mark.parametrize("name", BLOCKS)
def test_block(golden_networks: Golden, name: str) -> None:
    case = golden_networks.network(name)
    block = block_of(case.row["constructor"]).eval()
    case.load(block, lambda: block(case.input))
    case.check(block, block, case.input)


def test_no_vector_is_left_out(golden_networks: Golden) -> None:
    ours = {name for name in golden_networks.rows if name.startswith(("sew_", "spiking_", "ms_"))}
    assert ours == {*NETWORKS, *BLOCKS}
    assert torch.is_tensor(golden_networks.network("sew_7b_add").input)
