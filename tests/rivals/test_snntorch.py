"""snnTorch's Leaky: the same spikes and gradients by neurons of ours, for each of its resets."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom import encode
from spikeloom.errors import UsageError
from spikeloom.layers import Linear, MaxOverSteps, PopulationSum
from spikeloom.models import copy_weights
from spikeloom.neurons import LIF, DelayedResetLIF, Neuron
from spikeloom.surrogates import ATan
from spikeloom.train import losses

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of its optional parts
    snn: Any = pytest.importorskip("snntorch", reason="snnTorch is NOT installed: no comparison with it")

BETAS = (0.5, 0.8, 0.9, 0.95)
OURS: dict[str, Callable[[float, float], Neuron]] = {
    "subtract": lambda beta, threshold: DelayedResetLIF(beta, threshold),
    "zero": lambda beta, threshold: LIF(1 / (1 - beta), decay_input=False, v_threshold=threshold, strict=True),
}


def theirs(reset: str, beta: float, threshold: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and potentials, step by step as its users write them."""
    layer = snn.Leaky(beta=beta, threshold=threshold, reset_mechanism=reset).to(x.dtype)
    mem, spikes, trace = layer.reset_mem(), list[Tensor](), list[Tensor]()
    for x_t in x:
        spike, mem = layer(x_t, mem)
        spikes.append(spike)
        trace.append(mem)
    return torch.stack(spikes), torch.stack(trace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reset", OURS)
def test_none_of_2000_spikes_differs(reset: str, beta: float, dtype: torch.dtype, tracks: Any) -> None:
    x = torch.randn(20, 4, 25, dtype=dtype, requires_grad=True)
    ours = OURS[reset](beta, 0.75)
    spikes, (expected, trace) = ours(x), theirs(reset, beta, 0.75, x)
    assert spikes.numel() == 2000
    assert 200 < expected.sum() < 1500
    assert torch.equal(spikes, expected.to(dtype))
    torch.testing.assert_close(ours.potentials(x), trace.detach(), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(spikes)
    [grad] = torch.autograd.grad(spikes, x, upstream)
    if reset == "subtract":  # its reset to zero is detached as well: the potential's own gradient is kept here
        [other] = torch.autograd.grad(expected, x, upstream.to(expected))
        assert tracks(grad, other) < 1e-4


def test_gradients_of_the_reset_to_zero(tracks: Any) -> None:
    x = torch.randn(20, 4, 25, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    [grad] = torch.autograd.grad(OURS["zero"](0.9, 0.75)(x), x, upstream)
    [other] = torch.autograd.grad(theirs("zero", 0.9, 0.75, x)[0], x, upstream)
    assert tracks(grad, other) < 1e-5  # its beta is float32


def test_the_immediate_soft_reset_is_another_neuron() -> None:
    """What a user would write first: the difference that the page on snnTorch warns of."""
    x = torch.randn(20, 4, 25)
    expected = theirs("subtract", 0.9, 0.75, x)[0]
    immediate = LIF(10.0, decay_input=False, v_threshold=0.75, v_reset=None, strict=True)(x)
    assert (immediate != expected).sum() > 20


@pytest.mark.parametrize("alpha", [1.0, 2.0, 5.0])
def test_the_surrogate(alpha: float) -> None:
    u = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    snn.surrogate.atan(alpha=alpha)(u).sum().backward()
    torch.testing.assert_close(u.grad, ATan(alpha).derivative(u.detach()))


@pytest.mark.parametrize("off_spikes", [False, True])
def test_delta_modulation(off_spikes: bool) -> None:
    x = torch.randn(10, 4, 6)
    from snntorch import spikegen  # pyright: ignore

    assert torch.equal(encode.delta(x, 0.5, off_spikes), spikegen.delta(x, threshold=0.5, off_spike=off_spikes))


def test_losses_and_populations() -> None:
    functional: Any = importlib.import_module("snntorch.functional")
    spikes, y = (torch.rand(8, 5, 12) > 0.6).float(), torch.randint(3, (5,))
    summed = PopulationSum(3)(spikes)
    population = {"population_code": True, "num_classes": 3}
    pairs = [
        (losses.ce_count(spikes, y), functional.ce_count_loss()(spikes, y)),
        (losses.ce_count(summed, y), functional.ce_count_loss(**population)(spikes, y)),
        (losses.tet(spikes, y), functional.ce_rate_loss()(spikes, y)),
        (losses.sdt(MaxOverSteps()(spikes), y), functional.ce_max_membrane_loss()(spikes, y)),
        (losses.mse_count(spikes, y, 0.8, 0.2), functional.mse_count_loss(0.8, 0.2)(spikes, y)),
    ]
    for ours, other in pairs:
        torch.testing.assert_close(ours, other.squeeze())


class Trained(nn.Module):
    """A network as snnTorch's tutorials write it."""

    def __init__(self, beta: float = 0.9, **options: Any):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(20, 30), snn.Leaky(beta=beta, **options)
        self.fc2, self.lif2 = nn.Linear(30, 4), snn.Leaky(beta=beta, **options)

    def forward(self, x: Tensor) -> Tensor:
        first, second, spikes = self.lif1.reset_mem(), self.lif2.reset_mem(), list[Tensor]()
        for x_t in x:
            spike, first = self.lif1(self.fc1(x_t), first)
            spike, second = self.lif2(self.fc2(spike), second)
            spikes.append(spike)
        return torch.stack(spikes)


@pytest.mark.parametrize("reset", OURS)
def test_a_network_with_its_weights(reset: str) -> None:
    theirs = Trained(beta=0.8, reset_mechanism=reset)
    ours = nn.Sequential(Linear(20, 30), OURS[reset](0.8, 1.0), Linear(30, 4), OURS[reset](0.8, 1.0))
    assert len(copy_weights(theirs.state_dict(), ours).matched) == 4
    x = torch.randn(16, 8, 20) * 8 + 1
    with torch.no_grad():
        expected = theirs(x)
        assert 10 < expected.sum() < 400
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize(
    ("options", "neuron", "message"),
    [
        (
            {},
            lambda: DelayedResetLIF(0.8),
            r"lif1 of the source is Leaky\(beta=0.9, .*make it DelayedResetLIF\(beta=0.9",
        ),
        (
            {},
            lambda: LIF(10.0, decay_input=False, strict=True),
            r"reset_mechanism='subtract'\), and 1 of the model is LIF",
        ),
        ({"reset_mechanism": "zero"}, lambda: LIF(10.0, decay_input=False), r"make it LIF\(tau=10, decay_input=False"),
        ({"threshold": 0.5}, lambda: DelayedResetLIF(0.9), r"make it DelayedResetLIF\(beta=0.9, v_threshold=0.5\)"),
        ({"graded_spikes_factor": 2.0}, lambda: DelayedResetLIF(0.9), "lif1 of the source has graded spikes"),
        ({"beta": torch.rand(30)}, lambda: DelayedResetLIF(0.9), "lif1 of the source is no Leaky with one beta"),
        ({}, nn.Identity, "the source has 2 layers of snnTorch's neurons, the model 0"),
    ],
)
def test_other_neurons_are_an_error(options: dict[str, Any], neuron: Any, message: str) -> None:
    ours = nn.Sequential(Linear(20, 30), neuron(), Linear(30, 4), neuron())
    with pytest.raises(UsageError, match=message) as found:
        copy_weights(Trained(**options), ours)
    assert "\n" not in str(found.value)
    assert len(copy_weights(Trained(**options), ours, strict=False).matched) == 4
