"""The networks of the parallel neurons: counts, shapes, state, export. Small widths where the paper's are large."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.models import create_model
from spikeloom.neurons import GLIF, IF, PSN, PSU, LeakyIntegrator, MaskedPSN, ParaLIF, RecurrentLIF, SlidingPSN
from spikeloom.stream import Stream

# Name -> shape of one input at one step, overrides that make it small.
MODELS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "sequential_cifar_net": ((3, 32), {"channels": 16}),
    "psn_cifar_net": ((3, 32, 32), {"channels": 8}),
    "shd_net": ((700,), {}),
    "delay_net": ((140,), {"dropout": 0.0}),
    "paralif_shd": ((700,), {}),
    "paralif_ntidigits": ((64,), {}),
    "paralif_nmnist": ((1, 34, 34), {}),
    "paralif_gesture": ((2, 64, 64), {}),
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("sequential_cifar_net", {}, 513_418),
        ("sequential_cifar_net", {"num_classes": 100}, 536_548),
        ("sequential_cifar_net", {"neuron": functools.partial(PSN, T=32)}, 520_810),
        ("sequential_cifar_net", {"neuron": functools.partial(MaskedPSN, T=32, order=4), "num_classes": 100}, 543_940),
        ("sequential_cifar_net", {"neuron": functools.partial(SlidingPSN, order=32)}, 513_649),
        ("psn_cifar_net", {}, 70_113_174),
        ("psn_cifar_net", {"neuron": IF}, 70_113_034),
        ("cifarnet", {}, 19_489_546),
        ("shd_net", {}, 125_332),
        ("delay_net", {}, 214_016),
        ("paralif_shd", {}, 125_332),
        ("paralif_shd", {"recurrent": True}, 250_388),
        ("paralif_ntidigits", {}, 42_763),
        ("paralif_ntidigits", {"recurrent": True}, 85_259),
        ("paralif_nmnist", {}, 165_898),
        ("paralif_nmnist", {"recurrent": True}, 165_898),
        ("paralif_gesture", {}, 1_066_506),
        ("paralif_gesture", {"recurrent": True}, 1_066_506),
    ],
)
def test_parameter_counts(name: str, overrides: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert parameters(create_model(name, **overrides)) == count


def test_seven_neuron_layers() -> None:
    neuron = functools.partial(GLIF, T=32)
    with torch.device("meta"):
        model = create_model("sequential_cifar_net", neuron=neuron)
        layers = [m for m in model.modules() if isinstance(m, GLIF)]
        assert [m.channels for m in layers] == [128] * 6 + [256]
        plain = parameters(create_model("sequential_cifar_net"))
        assert parameters(model) == plain + sum(7 * c + 32 * c for c in [128] * 6 + [256])


def sequence(name: str, T: int, n: int) -> Tensor:
    return torch.rand(T, n, *MODELS[name][0]) * 2


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name: str, T: int) -> None:
    model = create_model(name, T=T, num_classes=7, **MODELS[name][1])
    out = model(sequence(name, T, 2))
    assert out.shape == (T, 2, 7)
    out.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


def test_cifarnet_at_two_sizes() -> None:
    model = create_model("cifarnet", T=2, neuron=PSU).eval()
    with torch.no_grad():
        for side in (16, 32):
            assert model(torch.rand(1, 3, side, side)).shape == (2, 1, 10)


@pytest.mark.parametrize("name", MODELS)
def test_two_calls_are_one(name: str) -> None:
    model = create_model(name, T=4, **MODELS[name][1]).eval()
    x = sequence(name, 4, 3)
    with torch.no_grad():
        torch.manual_seed(5)
        first = model(x)
        model(sequence(name, 4, 2))
        torch.manual_seed(5)
        assert torch.equal(model(x), first)


@pytest.mark.parametrize("name", ["sequential_cifar_net", "shd_net", "paralif_shd", "paralif_nmnist"])
def test_whole_is_stepwise(name: str) -> None:
    overrides = dict(MODELS[name][1])
    if name.startswith("paralif"):
        overrides["neuron"] = functools.partial(ParaLIF, firing="t", v_threshold=0.3)
    model = create_model(name, **overrides).double().eval()
    x = sequence(name, 6, 2).double()
    with torch.no_grad():
        whole = model(x)
        stream = Stream(model)
        parts = torch.cat([stream(x[:1]), stream(x[1:4]), stream(x[4:])])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str) -> None:
    overrides = dict(MODELS[name][1])
    if name.startswith("paralif"):
        overrides["neuron"] = functools.partial(ParaLIF, firing="sd")
    model = create_model(name, T=3, **overrides).eval()
    x = sequence(name, 3, 2)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))


def test_readout_does_not_fire() -> None:
    model = create_model("paralif_shd")
    assert type(list(model.modules())[-1]) is LeakyIntegrator


def test_recurrent_net_with_the_serial_baseline() -> None:
    model = create_model("paralif_ntidigits", recurrent=True, neuron=functools.partial(RecurrentLIF, v_threshold=0.1))
    out = model(torch.rand(9, 2, 64))
    out.sum().backward()
    assert out.shape == (9, 2, 11)
    recurrent = [m for m in model.modules() if isinstance(m, RecurrentLIF)]
    assert recurrent[0].recurrent.weight.shape == (256, 256)
