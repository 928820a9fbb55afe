"""Folded norms: the same functions, unit by unit and in every registered network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import EVENTS, SHAPES, SMALL, Graph
from torch import Tensor, nn

from spikeloom.deploy import fold
from spikeloom.deploy.exchange.fold import affine
from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv1d, Conv2d, Flatten, Linear, TdBN
from spikeloom.layers.stateless import each_step
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
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 3.0)
                nn.init.uniform_(module.bias, -1.0, 1.0)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 1e-4, 3.0)
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_pair(layer: str, norm: str) -> None:
    make, shape = LAYERS[layer]
    unit = shaken(nn.Sequential(make(), NORMS[norm](6)))
    x = torch.randn(3, 2, *shape)
    folded = fold(unit, x)
    with torch.no_grad():
        expected, got = unit(x), folded(x)
    assert type(folded[1]) is nn.Identity
    assert isinstance(unit[1], BatchNorm), "the model itself is not changed"
    assert (got - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def conv() -> Conv2d:
    return Conv2d(4, 4, 3, padding=1)


# Registered so that a convolution stands before its norm; how they are called is another matter.
KEPT: dict[str, Callable[[], nn.Module]] = {
    "before a padded convolution": lambda: Graph(lambda m, x: m.conv(m.norm(x)), conv=conv(), norm=BatchNorm(4)),
    "behind a neuron": lambda: Graph(
        lambda m, x: m.last(m.norm(m.lif(m.conv(x)))), conv=conv(), norm=BatchNorm(4), lif=LIF(), last=conv()
    ),
    "beside another reader": lambda: Graph(lambda m, x: (y := m.conv(x)) + m.norm(y), conv=conv(), norm=BatchNorm(4)),
    "beside the network's output": lambda: Graph(
        lambda m, x: ((y := m.conv(x)), m.norm(y)), conv=conv(), norm=BatchNorm(4)
    ),
    "of one of two calls": lambda: Graph(lambda m, x: m.norm(m.conv(x)) + m.conv(x), conv=conv(), norm=BatchNorm(4)),
    "of a weight that is used again": lambda: Graph(
        lambda m, x: m.norm(m.conv(x)) + F.conv2d(x[0], m.conv.weight, padding=1), conv=conv(), norm=BatchNorm(4)
    ),
    "for every step": lambda: Graph(
        lambda m, x: torch.cat([norm(y) for norm, y in zip(m.norms, m.conv(x).split(1), strict=True)]),
        conv=conv(),
        norms=nn.ModuleList([BatchNorm(4), BatchNorm(4)]),
    ),
    "called at every step": lambda: Graph(
        lambda m, x: torch.cat([m.norm(y) for y in m.conv(x).split(1)]), conv=conv(), norm=BatchNorm(4)
    ),
    "on other axes": lambda: Graph(lambda m, x: m.norm(m.conv(x).transpose(2, 3)), conv=conv(), norm=BatchNorm(4)),
    "of batch statistics": lambda: Graph(
        lambda m, x: each_step(m.norm, m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "behind a layer with a forward of its own": lambda: nn.Sequential(_Rectified(4, 4, 3, padding=1), BatchNorm(4)),
    "behind a parametrised layer": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(conv()), BatchNorm(4)
    ),
}


class _Rectified(Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("case", KEPT)
def test_a_norm_that_cannot_be_folded_stays(case: str) -> None:
    model, x = shaken(KEPT[case]()), torch.randn(2, 3, 4, 4, 4)
    with torch.no_grad():
        folded, expected = fold(model, x), model(x)
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=0)
    assert norms_of(folded) == norms_of(model)


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "torch.nn's on each step": lambda: Graph(
        lambda m, x: each_step(m.norm, m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4)
    ),
    "without weights": lambda: Graph(
        lambda m, x: each_step(m.norm, m.conv(x)), conv=conv(), norm=nn.BatchNorm2d(4, affine=False)
    ),
    "of an image that is repeated": lambda: Graph(
        lambda m, x: m.norm(m.conv(x[0].expand(2, *x[0].shape))), conv=conv(), norm=BatchNorm(4)
    ),
    "of a copy": lambda: Graph(
        lambda m, x: m.norm(m.conv(x[0].expand(2, *x[0].shape)).flatten(0, 1)), conv=conv(), norm=nn.BatchNorm2d(4)
    ),
    "registered twice": lambda: Graph(lambda m, x: m.same(m.conv(x)), conv=conv(), norm=(n := BatchNorm(4)), same=n),
    "of one of two layers of one weight": lambda: _tied(),
    "registered in another order": lambda: Graph(
        lambda m, x: m.a(m.first(m.lif(m.b(m.second(x))))),
        a=BatchNorm(4),
        b=BatchNorm(4),
        lif=LIF(),
        first=conv(),
        second=conv(),
    ),
}


def _tied() -> nn.Module:
    model = Graph(
        lambda m, x: m.other(m.lif(m.norm(m.conv(x)))), conv=conv(), norm=BatchNorm(4), other=conv(), lif=LIF()
    )
    model.other.weight = model.conv.weight  # pyright: ignore
    return model


@pytest.mark.parametrize("case", FOLDED)
def test_a_norm_is_folded_by_the_graph(case: str) -> None:
    model, x = shaken(FOLDED[case]()).double(), torch.randn(2, 3, 4, 4, 4).double()
    folded = fold(model, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert norms_of(folded) == 0


def test_the_folded_network_is_compared() -> None:
    """A norm that the network reaches past its registration cannot be replaced: the difference is noticed."""
    model = shaken(Graph(lambda m, x: m.hidden[0](m.conv(x)), conv=conv(), norm=BatchNorm(4)))
    model.hidden = (model.norm,)  # pyright: ignore
    with pytest.raises(UsageError, match=r"Graph: folding its norms \(norm ...\) changes what it says"):
        fold(model, torch.randn(2, 3, 4, 4, 4))


def test_a_wrong_fold_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(norm: Any, axis: int) -> tuple[Tensor, Tensor]:
        scale, shift = affine(norm, axis)
        return scale * 1.001, shift

    monkeypatch.setitem(fold.__globals__, "affine", wrong)
    model = shaken(nn.Sequential(conv(), BatchNorm(4), LIF(), conv(), BatchNorm(4)))
    with pytest.raises(UsageError, match=r"^0: folding 1 into it changes its output by .* rounding explains"):
        fold(model, torch.randn(2, 3, 4, 4, 4))


# Of norms behind a Ghost module's concatenation, on the input itself, or on visible places alone.
# `cifar10_net` pools between a convolution and its norm.
NOT_ALL = {"delay_net", "cifar10_net", "report_sew_resnet34_ghost", "ds_resnet20_gesture", "masked_autoencoder"}


# Networks whose blocks a smaller network of their family has too: slow tests.
DEEP = (
    *("ms_resnet34", "ms_resnet44", "ms_resnet56", "ms_resnet104", "ms_resnet110", "ms_resnet482"),
    *("ds_resnet32", "ds_resnet44", "ds_resnet68", "sew_resnet34", "spiking_vgg16", "spiking_vgg19"),
    *("sew_7b", "plain_7b", "sew_wide_7b", "sew_resnet_cifar", "ghostnet_channel_mlp", "report_sew_resnet34_ghost"),
    *list_models("*_resnet1[05]*"),
)

# Networks that take no smaller images; all others get 16x16, of which float64 convolutions compute a quarter.
OF_32 = (
    "report_vgg16",
    "psn_cifar_net",
    "masked_autoencoder",
    *list_models("*_probe"),
    *list_models("spiking_vgg*"),
    *list_models("spik*former*"),
)
INPUTS = SHAPES | EVENTS | dict.fromkeys(OF_32, (3, 32, 32))
INPUTS |= dict.fromkeys(("ds_resnet14_dvs", "ds_resnet20_gesture"), (2, 16, 16))
INPUTS |= {name: EVENTS[name] for name in list_models("spik*_dvs")}
OPTIONS: dict[str, dict[str, Any]] = SMALL | {"ds_resnet20_gesture": {"T": 8}}


def test_without_an_example() -> None:
    """Linear layers behind a flattened map depend on the size of the images, which nobody says here."""
    layers = [Conv2d(2, 4, 3, padding=1), BatchNorm(4), LIF(), Flatten(), Linear(4 * 7 * 9, 6), BatchNorm(6)]
    model = shaken(nn.Sequential(*layers)).double()
    folded = fold(model)
    assert norms_of(folded) == 0
    x = torch.randn(3, 2, 2, 7, 9).double()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if name not in DEEP])
def test_every_network_without_an_example(name: str) -> None:
    folded = fold(create_model(name, **SMALL.get(name, {})))
    assert (norms_of(folded) > 0) == (name in NOT_ALL)


def test_a_network_that_takes_no_usual_input() -> None:
    model = Graph(lambda m, x: m.norm(m.conv(x)) if x.shape[-1] == 5 else 1 / 0, conv=conv(), norm=BatchNorm(4))
    with pytest.raises(UsageError, match=r"Graph takes none of \[2, 1, 4, 32, 32\], .* give fold an input"):
        fold(model)
    assert norms_of(fold(model, torch.rand(2, 1, 4, 5, 5))) == 0


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in DEEP else []) for name in list_models()],
)
def test_every_network(name: str) -> None:
    """In float64 the folded network is the network: norms behind convolutions go, and not one spike changes."""
    torch.manual_seed(1)
    model = create_model(name, **OPTIONS.get(name, {})).train()
    x = torch.randn(int(getattr(model, "T", 2)), 1, *INPUTS.get(name, (3, 16, 16)))
    x, batch = (x[0], 0) if name == "masked_autoencoder" else (x, 1)  # pre-training takes images alone
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            nn.init.uniform_(norm.weight, 1.5, 3.0)
            norm.momentum = 1.0
        if norms:
            model(torch.cat([x, torch.randn_like(x)], batch))
    model = model.double().eval()
    folded = fold(model, x.double())
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
