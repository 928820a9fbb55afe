"""Costs by layout: the published figures to their printed digits, and the two rules on small networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spikeloom.analyse import count_cost
from spikeloom.layers import AvgPool2d, Conv2d, Flatten, GlobalAvgPool, Linear, MaxPool2d, NormSpike
from spikeloom.models import create_model
from spikeloom.neurons import LIF

RESNETS = ("report_vanilla_resnet34", "report_sew_resnet34", "report_ms_resnet34")


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(
    ("channels", "parameters", "macs", "flops"), [(3, 464_154, "68.863", "72.50"), (1, 463_866, "68.568", "72.20")]
)
def test_resnets_of_the_report(name: str, channels: int, parameters: int, macs: str, flops: str) -> None:
    cost = count_cost(create_model(name, in_channels=channels), (channels, 32, 32), 6)
    assert cost.parameters == parameters
    assert f"{cost.macs / 1e6:.3f}" == macs
    assert f"{cost.flops_s0 / 1e6:.2f}" == flops


@pytest.mark.parametrize(("channels", "parameters", "flops"), [(3, 14_790_090, "316.98"), (1, 14_788_938, "315.80")])
def test_vgg_of_the_report(channels: int, parameters: int, flops: str) -> None:
    cost = count_cost(create_model("report_vgg16", in_channels=channels), (channels, 32, 32), 6)
    assert cost.parameters == parameters
    assert f"{cost.flops_s0 / 1e6:.2f}" == flops


@pytest.mark.parametrize(
    ("name", "options", "macs", "flops"),
    [
        ("ghostnet_snn", {}, 5_530_672, "6.413"),
        ("ghostnet_dfc", {}, 7_817_968, "9.722"),
        ("ghostnet_channel_mlp", {}, 6_263_856, "7.146"),
        # The places of the gate that the published figures, 4.9 M parameters and 9.7 M FLOPs, exclude.
        ("ghostnet_dfc", {"first": 0}, 8_243_952, "10.737"),
        ("ghostnet_dfc", {"where": "gm2", "first": 0}, 7_514_224, "8.807"),
        ("ghostnet_dfc", {"where": "both", "first": 0}, 10_227_504, "13.132"),
    ],
)
def test_ghostnets_of_the_report_and_other_gates(name: str, options: dict[str, Any], macs: int, flops: str) -> None:
    cost = count_cost(create_model(name, **options), (3, 32, 32), 6)
    assert cost.macs == macs
    assert f"{cost.flops_s0 / 1e6:.3f}" == flops


def test_the_stem_is_all_the_difference_of_one_channel() -> None:
    three, one = (count_cost(create_model("report_vgg16", in_channels=c), (c, 32, 32), 6) for c in (3, 1))
    assert three.macs - one.macs == three.flops_s0 - one.flops_s0 == 2 * 9 * 64 * 32 * 32


@pytest.mark.parametrize("T", [1, 4, 6])
def test_the_rules_on_a_small_network(T: int) -> None:
    model = nn.Sequential(
        Conv2d(4, 6, 3, padding=1),  # bias; 6x8x8 outputs of 36 weights
        NormSpike(6, LIF),
        MaxPool2d(2),
        Conv2d(6, 6, 3, padding=1, groups=3, bias=False),  # 6x4x4 outputs of 18 weights
        AvgPool2d(2),
        GlobalAvgPool(),  # has no window: not counted
        Flatten(),
        Linear(6, 10),
    )
    cost = count_cost(Repeated(model, T), (4, 8, 8), T)
    assert cost.parameters == (6 * 36 + 6) + 12 + 6 * 18 + 70
    assert cost.macs == 6 * 64 * 36 + 6 * 16 * 18 + 6 * 10
    assert cost.flops_s0 == cost.macs + 2 * T * (6 * 64) + 6 * 64 + (6 * 64 + 6 * 16)


class Repeated(nn.Module):
    """A model that takes sequences, on images."""

    def __init__(self, model: nn.Module, T: int):
        super().__init__()
        self.model, self.T = model, T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x if x.dim() == 5 else x.expand(self.T, *x.shape))


def test_macs_are_of_one_step() -> None:
    costs = [count_cost(create_model("report_sew_resnet34", T=T), (3, 32, 32), T) for T in (1, 6)]
    assert costs[0].macs == costs[1].macs
    assert costs[0].parameters == costs[1].parameters
    norms = (costs[1].flops_s0 - costs[0].flops_s0) / 10
    assert costs[0].flops_s0 == costs[0].macs + 2 * norms


def test_frozen_parameters_are_not_counted() -> None:
    model = create_model("colored_mnist_net", in_channels=1)
    before = count_cost(model, (1, 28, 28), 8).parameters
    model.head[0].weight.requires_grad_(False)
    assert count_cost(model, (1, 28, 28), 8).parameters == before - 500 * 800


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training: bool) -> None:
    model = create_model("report_sew_resnet34", T=2).train(training)
    model.blocks[0].eval()  # one part apart
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_cost(model, (3, 16, 16), 2)
    assert model.training is training
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = create_model("report_sew_resnet34", T=2).train()
    with pytest.raises(RuntimeError):
        count_cost(model, (5, 16, 16), 2)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_convolutions_of_every_kind() -> None:
    cases = (
        (nn.Conv3d(2, 4, 3, groups=2), (2, 5, 5, 5), 4 * 27 * 27),  # outputs times what each reads
        (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 6), 3 * 24 * 5 * 4),  # inputs times what each writes
        (nn.ConvTranspose1d(4, 6, 4, groups=2), (4, 7), 4 * 7 * 3 * 4),
    )
    for layer, shape, macs in cases:
        assert count_cost(nn.Sequential(nn.Flatten(0, 1), layer), shape, 1).macs == macs
