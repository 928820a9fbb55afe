"""Recurrent LIF and recurrent ParaLIF: their equations, and the two forms of each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.neurons import LeakyIntegrator, ParaLIF, RecurrentLIF, RecurrentParaLIF, SynapticLIF
from spikeloom.ops import backend, leaky_filter_reference
from spikeloom.ops.paralif_firing import fire_by
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, FastSigmoid

QUICK: dict[str, Any] = {"tau_mem": 0.004, "tau_syn": 0.002}
F = 12


def grads(neuron: nn.Module, x: Tensor, upstream: Tensor, sizes: list[int] | None = None) -> dict[str, Tensor]:
    """The output and every gradient: whole, or in chunks of a Stream."""
    x = x.detach().clone().requires_grad_()
    neuron.zero_grad()
    stream = Stream(neuron)
    out = neuron(x) if sizes is None else torch.cat([stream(part) for part in x.split(sizes)])
    out.backward(upstream)
    assert x.grad is not None
    results = {"out": out.detach(), "x": x.grad}
    for name, parameter in neuron.named_parameters():
        assert parameter.grad is not None, name
        results[name] = parameter.grad.clone()
    return results


@pytest.mark.parametrize("make", [RecurrentLIF, RecurrentParaLIF])
def test_weights(make: Any) -> None:
    """Kaiming-uniform, fan-in, linear gain: bound sqrt(3 / fan-in); no bias at first."""
    neuron = make(64)
    assert {name: tuple(p.shape) for name, p in neuron.named_parameters()} == {
        "recurrent.weight": (64, 64),
        "recurrent.bias": (64,),
    }
    bound = math.sqrt(3 / 64)
    assert 0.95 * bound < neuron.recurrent.weight.abs().max() <= bound
    assert not neuron.recurrent.bias.any()
    assert neuron.surrogate == FastSigmoid(100.0)
    assert neuron.feedback == "spikes"
    with pytest.raises(ValueError, match="feedback must be 'spikes' or 'relu', got 'both'"):
        make(3, feedback="both")


def test_parameters_of_the_published_networks() -> None:
    """SHD: Linear(700, 256), recurrent 256, Linear(256, 20); N-TIDIGITS: 64 inputs and 11 classes."""
    recurrent = sum(p.numel() for p in RecurrentLIF(256).parameters())
    assert (700 * 256 + 256) + recurrent + (256 * 20 + 20) == 250_388
    assert (64 * 256 + 256) + recurrent + (256 * 11 + 11) == 85_259


# --- recurrent LIF ----------------------------------------------------------------------------------------------------


def recurrent_lif(feedback: str, **settings: Any) -> RecurrentLIF:
    neuron = RecurrentLIF(F, **QUICK, v_threshold=0.5, surrogate=ATan(), feedback=feedback, **settings)
    neuron.recurrent.bias.data = torch.randn(F) * 0.2
    return neuron


@pytest.mark.parametrize("feedback", ["spikes", "relu"])
def test_recurrent_lif_by_hand(feedback: str) -> None:
    neuron = recurrent_lif(feedback).double()
    alpha, beta = (d.item() for d in neuron.decays())
    weight, bias = neuron.recurrent.weight.detach(), neuron.recurrent.bias.detach()
    x = torch.randn(15, 4, F, dtype=torch.float64) * 1.5 + 0.5
    out, potentials, stream = neuron(x), neuron.potentials(x), Stream(neuron)
    synapse = m = fed = torch.zeros(4, F, dtype=torch.float64)
    for t in range(15):
        synapse = alpha * synapse + x[t] + fed @ weight.T + bias
        m = beta * m + (1 - beta) * synapse
        s = (m > 0.5).double()
        assert torch.equal(out[t], s)
        torch.testing.assert_close(potentials[t], m)
        torch.testing.assert_close(neuron.potentials(x[t : t + 1], stream.state(neuron))[0], m)
        stream(x[t : t + 1])
        m = m * (1 - s)
        fed = s if feedback == "spikes" else m.clamp_min(0)
    assert out.sum() > 50


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("feedback", ["spikes", "relu"])
def test_recurrent_lif_steps(native: Any, tracks: Any, feedback: str, path: str) -> None:
    neuron = recurrent_lif(feedback)
    x, upstream = torch.randn(14, 5, F) * 1.5 + 0.5, torch.randn(14, 5, F)
    with backend(path):  # pyright: ignore[reportArgumentType]
        whole = grads(neuron, x, upstream)
        assert whole["out"].sum() > 50
        for sizes in ([1] * 14, [5, 9]):
            parts = grads(neuron, x, upstream, sizes)
            assert torch.equal(parts["out"], whole["out"])
            for key in whole.keys() - {"out"}:
                assert tracks(parts[key], whole[key]) < 1e-4, key


@pytest.mark.parametrize("feedback", ["spikes", "relu"])
def test_recurrent_lif_fast_and_reference(native: Any, tracks: Any, feedback: str) -> None:
    neuron = recurrent_lif(feedback)
    x, upstream = torch.randn(33, 5, F) * 1.5 + 0.5, torch.randn(33, 5, F)
    results = []
    for path in ("native", "reference"):
        with backend(path):
            results.append(grads(neuron, x, upstream))
    assert torch.equal(results[0]["out"], results[1]["out"])
    for key in results[1].keys() - {"out"}:
        assert tracks(results[0][key], results[1][key]) < 5e-5, key


def test_without_weights_it_is_the_synaptic_lif() -> None:
    neuron = RecurrentLIF(F, **QUICK, v_threshold=0.5)
    neuron.recurrent.weight.data.zero_()
    plain = SynapticLIF(**QUICK, v_threshold=0.5)
    x = torch.randn(20, 5, F, dtype=torch.float64) * 1.5 + 0.5
    assert torch.equal(neuron.double()(x), plain.double()(x))


def test_the_bias_acts_from_the_first_step() -> None:
    neuron = RecurrentLIF(2, 0.001, None, v_threshold=0.5)
    neuron.recurrent.bias.data = torch.tensor([5.0, 0.0])
    assert neuron(torch.zeros(1, 1, 2)).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("make", [RecurrentLIF, lambda n, **s: RecurrentParaLIF(n, "t", **s)])
def test_causality(make: Any) -> None:
    neuron = make(F, **QUICK, v_threshold=0.5, surrogate=ATan())
    x = (torch.randn(7, 5, F) * 2).requires_grad_()
    out = neuron(x)
    for t in range(7):
        (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
        assert not grad[t + 1 :].any()
        assert grad[t].any()
        later = x.detach().clone()
        later[t + 1 :] += 10
        assert torch.equal(neuron(later)[: t + 1], out[: t + 1])


@pytest.mark.parametrize("make", [RecurrentLIF, lambda n: RecurrentParaLIF(n, "t")])
def test_another_number_of_features(make: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        make(F)(torch.zeros(3, 2, F + 1))


# --- recurrent ParaLIF ------------------------------------------------------------------------------------------------


def two_passes(neuron: RecurrentParaLIF, x: Tensor) -> Tensor:
    """M as its document prints it, step by step."""
    alpha, beta = neuron.decays()
    hidden, _ = leaky_filter_reference(x, alpha, beta)
    h = (
        torch.relu(hidden)
        if neuron.feedback == "relu"
        else fire_by(neuron.firing, hidden, neuron.threshold(), neuron.surrogate)[0]
    )
    fed = [torch.zeros_like(x[0]), *h[:-1]]
    rows = [x_t + h_t @ neuron.recurrent.weight.T + neuron.recurrent.bias for x_t, h_t in zip(x, fed, strict=True)]
    out, _ = leaky_filter_reference(torch.stack(rows), alpha, beta)
    return hidden + out if neuron.add_hidden else out


@pytest.mark.parametrize("add_hidden", [True, False])
@pytest.mark.parametrize("feedback", ["spikes", "relu"])
@pytest.mark.parametrize("firing", ["t", "d", "tt", "sd"])
def test_recurrent_paralif(native: Any, tracks: Any, firing: str, feedback: str, add_hidden: bool) -> None:
    neuron = RecurrentParaLIF(
        F,
        firing,
        **QUICK,
        v_threshold=0.3,
        learn_threshold=True,
        learn_tau=True,
        surrogate=ATan(),
        feedback=feedback,
        add_hidden=add_hidden,
    ).double()
    neuron.recurrent.bias.data.normal_()
    x, upstream = torch.randn(9, 5, F, dtype=torch.float64) * 2, torch.randn(9, 5, F, dtype=torch.float64)
    got = grads(neuron, x, upstream)

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = neuron

        def forward(self, x: Tensor) -> Tensor:
            m = two_passes(neuron, x)
            return fire_by(neuron.firing, m, neuron.threshold(), neuron.surrogate)[0]

    expected = grads(ByHand(), x, upstream)
    assert got["out"].sum() > 20
    assert torch.equal(got["out"], expected["out"])
    assert tracks(got["x"], expected["x"]) < 1e-9
    for name, _ in neuron.named_parameters():
        assert tracks(got[name], expected[f"neuron.{name}"]) < 1e-8, name
    torch.testing.assert_close(neuron.potentials(x), two_passes(neuron, x).detach())


def test_the_hidden_potential_is_added_again() -> None:
    x = torch.randn(9, 5, F)
    twice, once = (RecurrentParaLIF(F, "t", **QUICK, add_hidden=add) for add in (True, False))
    once.load_state_dict(twice.state_dict())
    hidden = LeakyIntegrator(**QUICK)(x)
    torch.testing.assert_close(twice.potentials(x) - once.potentials(x), hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("firing", ["sb", "gs", "sd", "st"])
def test_nothing_comes_back_at_the_first_step(firing: str) -> None:
    """Phi(0) may fire (a fair coin, or always); H[0] is 0 all the same."""
    neuron = RecurrentParaLIF(F, firing, **QUICK, v_threshold=0.1, add_hidden=False)
    x = torch.randn(1, 5, F)
    torch.testing.assert_close(neuron.potentials(x), LeakyIntegrator(**QUICK)(x))


def test_without_weights_it_is_paralif() -> None:
    neuron = RecurrentParaLIF(F, "t", **QUICK, v_threshold=0.5, add_hidden=False)
    neuron.recurrent.weight.data.zero_()
    x = torch.randn(20, 5, F) * 2
    assert torch.equal(neuron(x), ParaLIF("t", **QUICK, v_threshold=0.5)(x))


def test_recurrent_paralif_cannot_step() -> None:
    with pytest.raises(RuntimeError, match=r"RecurrentParaLIF needs the whole sequence at once; RecurrentLIF can step"):
        Stream(RecurrentParaLIF(F))(torch.zeros(3, 2, F))
