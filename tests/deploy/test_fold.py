"""Folded norms: the same functions, unit by unit and in every registered network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import EVENTS, SHAPES, SMALL
from torch import nn

from spikeloom.deploy import fold
from spikeloom.deploy.fold import pairs
from spikeloom.layers import BatchNorm, Conv1d, Conv2d, Linear, NormSpike, TdBN
from spikeloom.models import create_model, list_models
from spikeloom.neurons import LIF
from spikeloom.record import Recorder

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv2d": (lambda: Conv2d(4, 6, 3, padding=1, bias=False), (4, 5, 7)),
    "conv2d with bias": (lambda: Conv2d(4, 6, 3, stride=2), (4, 5, 7)),
    "grouped": (lambda: Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 7)),
    "conv1d": (lambda: Conv1d(4, 6, 3, padding=1), (4, 9)),
    "linear": (lambda: Linear(4, 6), (4,)),
}
NORMS: dict[str, Any] = {
    "batch norm": BatchNorm,
    "tdBN": lambda c: TdBN(c, 0.6, 0.7),
    "affine tdBN": lambda c: TdBN(c, 0.6, form="affine"),
    "eps outside": lambda c: TdBN(c, 0.6, eps_outside=True),
}


def shaken(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 3.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 1e-4, 3.0)
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_pair(layer: str, norm: str) -> None:
    make, shape = LAYERS[layer]
    unit = shaken(nn.Sequential(make(), NORMS[norm](6)))
    folded = fold(unit)
    x = torch.randn(3, 2, *shape)
    with torch.no_grad():
        expected, got = unit(x), folded(x)
    assert type(folded[1]) is nn.Identity
    assert isinstance(unit[1], BatchNorm), "the model itself is not changed"
    assert (got - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_what_does_not_stand_behind_a_convolution_stays() -> None:
    model = nn.Sequential(
        BatchNorm(3), Conv2d(3, 4, 1), LIF(), BatchNorm(4), Conv2d(4, 4, 1), BatchNorm(8), Conv2d(4, 4, 1),
        nn.Sequential(NormSpike(4, LIF)),
    )  # fmt: skip
    assert pairs(model) == [("6", "7.0.norm")]
    assert sum(isinstance(m, BatchNorm) for m in fold(model).modules()) == 3


# A norm behind a Ghost module's concatenation, or on the input itself, stands behind no convolution.
NOT_ALL = {"report_sew_resnet34_ghost", "ds_resnet20_gesture"}


DEEP = ("ms_resnet482", "ms_resnet110", "ms_resnet104", "ds_resnet68", "ds_resnet44", *list_models("*_resnet1[05]*"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in DEEP else []) for name in list_models()],
)
def test_every_network(name: str) -> None:
    """In float64 the folded network is the network: norms behind convolutions go, and not one spike changes."""
    torch.manual_seed(1)
    model = create_model(name, **SMALL.get(name, {})).train()
    x = torch.randn(int(getattr(model, "T", 2)), 1, *(SHAPES | EVENTS).get(name, (3, 32, 32)))
    x, batch = (x[0], 0) if name == "masked_autoencoder" else (x, 1)  # pre-training takes images alone
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            nn.init.uniform_(norm.weight, 1.5, 3.0)
            norm.momentum = 0.5
        for _ in range(3 if norms else 0):
            model(torch.cat([x, torch.randn_like(x)], batch))
    model, folded = model.double().eval(), fold(model.double())
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == (name in NOT_ALL)
    with torch.no_grad(), Recorder(model) as one, Recorder(folded) as other:
        torch.manual_seed(2)
        expected = model(x.double())
        torch.manual_seed(2)
        got = folded(x.double())
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert one.spikes.keys() == other.spikes.keys()
    assert all(torch.equal(a, b) for n in one.spikes for a, b in zip(one.spikes[n], other.spikes[n], strict=True))


@pytest.mark.parametrize("name", ["spikformer_2_384", "spikingformer_2_384", "spikformer_v2_2_64"])
def test_float32(name: str) -> None:
    """Rounding may move a membrane that lies on its threshold: 99.99 % of the spikes stay, and all predictions."""
    torch.manual_seed(1)
    model = create_model(name, **SMALL[name], scale=0.5).train()
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 1.5, 3.0)
            norm.momentum = None  # pyright: ignore
            norm.momentum = 1.0
        model(x)
        model.eval()
        folded = fold(model)
        with Recorder(model) as one, Recorder(folded) as other:
            same = model(x).mean(0).argmax(1) == folded(x).mean(0).argmax(1)
    assert same.all()
    wrong = sum((one.spikes[n][0] != other.spikes[n][0]).sum().item() for n in one.spikes)
    assert wrong <= 1e-4 * sum(s[0].numel() for s in one.spikes.values())
