"""GhostNet, DS-ResNet, SynA-ResNet, ResNet-19 and VGGSNN against the released code: the same weights, the same outputs.

GhostNets are compared as the authors' ordinary networks: with ReLU for neurons.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from helpers.golden_vectors import Golden
from torch import Tensor, nn

from spikeloom.layers import BatchNorm, NormSpike, SynapticAttention, VanillaBlock, basic_branch, conv_shortcut
from spikeloom.models import create_model
from spikeloom.models.ds_resnet import ds_block
from spikeloom.models.ghostnet import GhostBuilder, GhostModule, dfc_gate
from spikeloom.models.tet import tet_lif
from spikeloom.neurons import LIF, MLF

released_mlf = functools.partial(MLF, strict=True)

NETWORKS = {
    "ds_resnet20": functools.partial(create_model, "ds_resnet20", neuron=released_mlf),
    "ds_resnet20_gesture": functools.partial(create_model, "ds_resnet20_gesture", neuron=released_mlf),
    "syna_resnet18": functools.partial(create_model, "syna_resnet18"),
    "tdbn_resnet19": functools.partial(create_model, "tdbn_resnet19", norm="batch"),
    "vggsnn": functools.partial(create_model, "vggsnn", T=4),
    "ghostnet_t_ann": functools.partial(create_model, "ghostnet_snn", neuron=nn.ReLU, literal=True, T=1),
    "ghostnetv2_ann": functools.partial(create_model, "ghostnet_dfc", neuron=nn.ReLU, literal=True, variant="H", T=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(golden_networks: Golden, name: str) -> None:
    case, model = golden_networks.network(name), NETWORKS[name]().eval()
    if name == "ghostnetv2_ann":
        pool_the_gates(model)
    tet = name in ("tdbn_resnet19", "vggsnn")
    # The TET code puts the batch before time.
    x = case.input.transpose(0, 1).contiguous() if tet and case.input.dim() == 5 else case.input
    to_theirs: Callable[[Tensor], Tensor] = (
        (lambda y: y.transpose(0, 1)) if tet else (lambda y: y) if name == "syna_resnet18" else (lambda y: y.mean(0))
    )
    case.load(model, lambda: model(x))
    case.check(model, lambda x: to_theirs(model(x)), x)


# --- blocks of spiking networks ---------------------------------------------------------------------------------------


def ds(channels: int, width: int, stride: int, vanilla: bool) -> nn.Module:
    return ds_block(channels, width, stride, released_mlf, vanilla)


def tet(channels: int, width: int, stride: int, vanilla: bool) -> nn.Module:
    branch = basic_branch(channels, width, stride, tet_lif)
    return VanillaBlock(branch, NormSpike(width, tet_lif), conv_shortcut(channels, width, stride))


DS_BLOCKS = [
    "ds_block",
    "ds_block_down",
    "ds_block_down_train",
    "ds_block_small_var",
    "ds_block_train",
    "ds_block_vanilla_down",
]
TET_BLOCKS = ["tet_block", "tet_block_down", "tet_block_train"]


@pytest.mark.parametrize("name", [*DS_BLOCKS, *TET_BLOCKS])
def test_block(golden_networks: Golden, name: str) -> None:
    case = golden_networks.network(name)
    numbers = re.match(r"BasicBlock\((\d+), (\d+), (?:stride=)?(\d)", case.row["constructor"])
    assert numbers
    channels, width, stride = map(int, numbers.groups())
    make, batch_first = (ds, False) if name in DS_BLOCKS else (tet, True)
    block = make(channels, width, stride, "modified=False" in case.row["constructor"]).eval()

    def run(x: Tensor) -> Tensor:
        return block(x.transpose(0, 1)).transpose(0, 1) if batch_first else block(x).flatten(0, 1)

    case.load(block, lambda: run(case.input))
    case.check(block, run, case.input)


@pytest.mark.parametrize("axis", ["time", "channel", "space"])
@pytest.mark.parametrize("kind", ["ma", "ia"])
def test_attention(golden_networks: Golden, kind: str, axis: str) -> None:
    row = golden_networks.rows[f"syna_{kind}_{axis}"]
    case = golden_networks.arrays(row)
    x = torch.from_numpy(case["input"])
    attention = SynapticAttention(axis, nn.Sigmoid() if kind == "ma" else LIF(), T=8, channels=16).eval()  # pyright: ignore
    weights = [torch.from_numpy(case[f"param/{name}"]) for name in case["param_order"]]
    with torch.no_grad():
        for own, theirs in zip(attention.parameters(), weights, strict=True):
            own.copy_(theirs.view_as(own))
        out = attention(x)
        torch.testing.assert_close(out, torch.from_numpy(case["output"]), rtol=0, atol=float(row["logit_atol"]))
        if kind == "ia":
            gate = attention.gate(attention.score(x)[None])[0]
            # Theirs has the batch first; ours the axis of time.
            assert torch.equal(gate.transpose(0, 1), torch.from_numpy(case["gate"]).view_as(gate.transpose(0, 1)))


# --- parts of GhostNets -----------------------------------------------------------------------------------------------


class PooledGate(nn.Module):
    """The original's DFC gate: pooled before, upsampled after."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(nn.functional.avg_pool2d(x.flatten(0, 1), 2)[None])
        return nn.functional.interpolate(torch.sigmoid(gate[0]), size=x.shape[-2:], mode="nearest")[None]


def pool_the_gates(model: nn.Module) -> None:
    """Replaces our gates by the original's: the last norm's sigmoid in place of the neuron."""
    for module in model.modules():
        if isinstance(module, GhostModule) and module.gate is not None:
            last = module.gate[-1]  # pyright: ignore
            module.gate[-1] = last.norm  # pyright: ignore
            module.gate = PooledGate(module.gate)


def relu_unit(channels: int) -> NormSpike:
    return NormSpike(channels, nn.ReLU)


def ghost_part(constructor: str) -> nn.Module:
    """Our part for the released constructor's call."""
    kind, arguments = re.match(r"(\w+)\((.*)\)", constructor).groups()  # pyright: ignore
    numbers = [int(word) for word in re.findall(r"(?<![\w=.])\d+(?![\w.])", arguments)]
    squeeze = "se_ratio=0.25" in arguments or numbers[5:] == [1]
    if kind.startswith("GhostModule"):
        gate = dfc_gate(*numbers, BatchNorm) if "attn" in arguments else None
        unit = BatchNorm if "relu=False" in arguments else relu_unit
        return GhostModule(numbers[0], numbers[1], unit, gate=gate and PooledGate(gate))
    channels, expanded, out_channels, kernel, stride = numbers[:5]
    port = len(numbers) == 6
    ghost = GhostBuilder(nn.ReLU, "T" if port else "H", literal=True, spiking_se=False)
    gated = kind.endswith("V2") and "layer_id=2" in arguments
    gate = PooledGate(dfc_gate(channels, expanded, BatchNorm)) if gated else None
    return ghost.bottleneck(channels, (kernel, expanded, out_channels, squeeze, stride), gates=(gate, None))


GHOST_PARTS = [
    "dfc_module",
    "dfc_module_train",
    "ghost_bottleneck_t_s2_se1_train",
    "ghost_bottleneck_v2_s1_first",
    "ghost_bottleneck_v2_s2_se1",
    "ghost_module_h_norelu_odd",
    "ghost_module_t_even",
    "ghost_module_t_odd",
    *(f"ghost_bottleneck_{v}_s{s}_se{e}" for v in "ht" for s in (1, 2) for e in (0, 1)),
]


@pytest.mark.parametrize("name", GHOST_PARTS)
def test_ghost_part(golden_networks: Golden, name: str) -> None:
    case = golden_networks.network(name)
    part = ghost_part(case.row["constructor"]).eval()

    def run(x: Tensor) -> Tensor:
        return part(x[None])[0]

    case.load(part, lambda: run(case.input))
    case.check(part, run, case.input)


def test_no_vector_is_left_out(golden_networks: Golden) -> None:
    theirs = {n for n in golden_networks.rows if n.startswith(("ghost", "dfc", "ds_", "syna_", "tet_", "tdbn", "vgg"))}
    attentions = {f"syna_{kind}_{axis}" for kind in ("ma", "ia") for axis in ("time", "channel", "space")}
    assert theirs == {*NETWORKS, *DS_BLOCKS, *TET_BLOCKS, *GHOST_PARTS} | attentions
