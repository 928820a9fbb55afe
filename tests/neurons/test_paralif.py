"""ParaLIF and the leaky readout: what their documents demand of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spikeloom.errors import UsageError
from spikeloom.neurons import LeakyIntegrator, ParaLIF
from spikeloom.ops import backend, leaky_filter_fft, leaky_filter_reference
from spikeloom.ops.paralif_firing import FIRING
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, FastSigmoid

QUICK: dict[str, Any] = {"tau_mem": 0.004, "tau_syn": 0.002}
DETERMINISTIC = ["t", "st", "tt", "trt", "d", "sd", "td", "trd"]


def threshold_of(firing: str) -> float:
    """One that is reached: those of sigmoid and tanh lie below 1."""
    return 0.02 if firing.endswith("d") else {"t": 0.5, "st": 0.6}.get(firing, 0.3)


def make(firing: str, **settings: Any) -> ParaLIF:
    return ParaLIF(firing, **{**QUICK, "v_threshold": threshold_of(firing), "surrogate": ATan(), **settings})


# --- settings ---------------------------------------------------------------------------------------------------------


def test_public_defaults() -> None:
    neuron = ParaLIF()
    assert neuron.firing == "gs"
    assert neuron.surrogate == FastSigmoid(100.0)
    assert neuron.v_threshold == 1.0
    assert [d.item() for d in neuron.decays()] == pytest.approx([math.exp(-1 / 20)] * 2)
    for firing in FIRING:
        assert ParaLIF(firing).v_threshold == (0.1 if firing in ("d", "sd", "td", "trd") else 1.0)
    assert not list(neuron.parameters())
    assert not neuron.state_dict()


def test_decays_are_those_of_the_time_constants() -> None:
    neuron = LeakyIntegrator(0.01, 0.004, 0.002)
    alpha, beta = neuron.decays()
    assert beta.item() == pytest.approx(math.exp(-0.2))
    assert alpha.item() == pytest.approx(math.exp(-0.5))
    assert LeakyIntegrator(0.01, None).decays()[0].item() == 0


def test_learned_time_constants_begin_where_tau_says() -> None:
    """A departure: the release keeps the decay itself as the raw parameter and begins at its sigmoid."""
    neuron = LeakyIntegrator(0.02, 0.005, learn_tau=True)
    alpha, beta = neuron.decays()
    assert beta.item() == pytest.approx(math.exp(-1 / 20), rel=1e-6)
    assert alpha.item() == pytest.approx(math.exp(-1 / 5), rel=1e-6)
    assert beta.item() != pytest.approx(1 / (1 + math.exp(-math.exp(-1 / 20))), rel=0.1)
    assert {name for name, _ in neuron.named_parameters()} == {"alpha", "beta"}
    assert {name for name, _ in LeakyIntegrator(0.02, None, learn_tau=True).named_parameters()} == {"beta"}
    fixed = LeakyIntegrator(0.02, 0.005)
    x = torch.randn(9, 3, 4)
    torch.testing.assert_close(neuron(x), fixed(x), rtol=1e-5, atol=1e-6)


def test_learned_time_constants_get_their_gradients(tracks: Any) -> None:
    x, upstream = torch.randn(9, 3, 4, dtype=torch.float64), torch.randn(9, 3, 4, dtype=torch.float64)
    neuron = LeakyIntegrator([0.02, 0.004, 0.003, 0.001], [0.001, 0.002, 0.01, 0.03], learn_tau=True).double()
    neuron(x).backward(upstream)
    alpha, beta = (d.detach().requires_grad_() for d in neuron.decays())
    grads = torch.autograd.grad(leaky_filter_reference(x, alpha, beta)[0], [alpha, beta], upstream)
    for parameter, decay, grad in ((neuron.alpha, alpha, grads[0]), (neuron.beta, beta, grads[1])):
        assert parameter.grad is not None
        assert parameter.grad.shape == (4,)
        assert tracks(parameter.grad, grad * decay.detach() * (1 - decay.detach())) < 1e-10


def test_learned_threshold() -> None:
    neuron = make("t", learn_threshold=True, v_threshold=0.5)
    assert sum(p.numel() for p in neuron.parameters()) == 1
    x = torch.randn(8, 50) * 2
    out = neuron(x)
    out.sum().backward()
    threshold = neuron.v_threshold
    assert isinstance(threshold, Tensor)
    assert threshold.grad is not None
    expected = -ATan().derivative(neuron.potentials(x) - 0.5).sum()
    torch.testing.assert_close(threshold.grad, expected, rtol=1e-5, atol=0)
    # Clamped by a ReLU: below zero it acts as zero, and learns no more.
    threshold.data.fill_(-3.0)
    neuron.zero_grad()
    out = neuron(x)
    assert torch.equal(out, (neuron.potentials(x) > 0).float())
    out.sum().backward()
    assert threshold.grad is None or threshold.grad == 0


def test_time_constants_of_features() -> None:
    mem, syn = [0.002, 0.01, 0.03], [0.001, 0.02, 0.004]
    x = torch.randn(12, 5, 3)
    together = LeakyIntegrator(mem, syn)(x)
    for f in range(3):
        alone = LeakyIntegrator(mem[f], syn[f])(x[..., f])
        torch.testing.assert_close(together[..., f], alone, rtol=1e-6, atol=1e-7)


def test_constants_follow_the_precision_of_the_input() -> None:
    """In double precision the decays are those of the time constants to double precision."""
    x = torch.randn(50, 3, 4, dtype=torch.float64)
    for learn in (False, True):
        for neuron in (LeakyIntegrator(0.02, 0.005, learn_tau=learn), ParaLIF("t", 0.02, 0.005, learn_tau=learn)):
            exact, _ = leaky_filter_reference(x, math.exp(-1 / 5), math.exp(-1 / 20))
            got = neuron.double().potentials(x)
            assert (got - exact).abs().max() < (1e-5 if learn else 1e-12) * exact.abs().max()


def test_invalid_settings() -> None:
    with pytest.raises(UsageError, match=r"unknown firing function 'ts'; .*tt"):
        ParaLIF("ts")
    with pytest.raises(ValueError, match="time_step must be a positive number, got 0"):
        ParaLIF(time_step=0)
    for tau in (0.0, -1.0, [0.02, 0.0]):
        with pytest.raises(ValueError, match="a time constant must be a positive number, got"):
            LeakyIntegrator(tau)


# --- parallel = sequential --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize("tau_syn", [0.02, None])
def test_parallel_is_sequential(native: Any, tau_syn: float | None, T: int) -> None:
    x = torch.rand(T, 2, 5)
    neuron = LeakyIntegrator(0.02, tau_syn)
    alpha, beta = neuron.decays()
    stream = Stream(neuron)
    with torch.no_grad():
        steps = torch.cat([stream(x_t) for x_t in x.split(1)])
    bound = 2e-6 * steps.abs().max()
    for m in (neuron(x), leaky_filter_fft(x, alpha, beta), leaky_filter_reference(x, alpha, beta)[0]):
        assert (m - steps).abs().max() <= bound
    if T == 50 and tau_syn is not None:
        wrapped = leaky_filter_fft(x, alpha, beta, padding=2 * T)
        assert (wrapped - steps).abs().max() > 1e4 * bound, "the released padding wraps"


def test_without_a_synapse() -> None:
    x = torch.randn(20, 7)
    m, expected = torch.zeros(7), []
    beta = math.exp(-1 / 4)
    for x_t in x:
        m = beta * m + (1 - beta) * x_t
        expected.append(m)
    torch.testing.assert_close(LeakyIntegrator(0.004, None)(x), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("firing", DETERMINISTIC)
def test_causality(native: Any, firing: str, path: str) -> None:
    T = 7
    neuron = make(firing, learn_tau=True, learn_threshold=True)
    with backend(path):  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            x = (torch.randn(T, 2, 60) * 2 + 0.5).requires_grad_()
            out = neuron(x)
            assert 0 < out.sum() < out.numel()
            for t in range(T):
                (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
                assert not grad[t + 1 :].any()
                assert grad[t].any()
                later = x.detach().clone()
                later[t + 1 :] += 10
                assert torch.equal(neuron(later)[: t + 1], out[: t + 1])
            optimiser = torch.optim.SGD(neuron.parameters(), lr=1e-4)
            neuron.zero_grad()
            neuron(x).sum().backward()
            optimiser.step()


@pytest.mark.parametrize("firing", DETERMINISTIC)
def test_steps_are_the_whole(tracks: Any, firing: str) -> None:
    neuron = make(firing, learn_tau=True, learn_threshold=True)
    x, upstream = torch.randn(15, 3, 20) * 2, torch.randn(15, 3, 20)

    def run(sizes: list[int] | None) -> list[Tensor]:
        given = x.clone().requires_grad_()
        neuron.zero_grad()
        stream = Stream(neuron)
        out = neuron(given) if sizes is None else torch.cat([stream(part) for part in given.split(sizes)])
        out.backward(upstream)
        assert given.grad is not None
        return [out.detach(), given.grad, *(p.grad.clone() for p in neuron.parameters())]

    whole = run(None)
    for sizes in ([1] * 15, [4, 11], [1, 13, 1]):
        parts = run(sizes)
        assert torch.equal(parts[0], whole[0])
        for a, b in zip(parts[1:], whole[1:], strict=True):
            assert tracks(a, b) < 1e-4


def test_integrator_steps(tracks: Any) -> None:
    neuron = LeakyIntegrator()
    x = torch.randn(40, 3, 20)
    for sizes in ([1] * 40, [15, 25]):
        stream = Stream(neuron)
        assert tracks(torch.cat([stream(part) for part in x.split(sizes)]), neuron(x)) < 1e-6


# --- behaviour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("firing", "probability"),
    [
        ("gs", lambda m: 1 / (1 + math.exp(-2 * m))),
        ("sb", lambda m: 1 / (1 + math.exp(-m))),
        ("trb", lambda m: max(0.0, math.tanh(m))),
    ],
)
def test_firing_probability_at_a_constant_membrane(firing: str, probability: Any) -> None:
    neuron, n = ParaLIF(firing, tau_mem=0.001, tau_syn=None), 100_000
    for m in (-0.75, 0.5):
        # One step: M = (1 - beta) x.
        x = torch.full((1, n), m / (1 - neuron.decays()[1].item()))
        p = probability(m)
        assert abs(neuron(x).mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_sd_fires_at_first_on_silent_input() -> None:
    out = ParaLIF("sd")(torch.zeros(20, 2, 3))
    assert out[0].all()
    assert not out[1:].any()


def test_d_fires_at_an_onset_and_not_at_steady_state() -> None:
    x = torch.zeros(300, 1)
    x[20:] = 1.0
    out = ParaLIF("d", v_threshold=0.05)(x).flatten()
    assert not out[:21].any()
    assert out[21:50].sum() > 10
    assert not out[200:].any()


def test_the_default_threshold_of_st_is_out_of_reach() -> None:
    x = torch.rand(30, 50)
    for firing in ("st", "tt", "trt"):
        assert not ParaLIF(firing)(x).any()
        assert ParaLIF(firing, v_threshold=0.4)(x).any()


@pytest.mark.parametrize("firing", FIRING)
def test_gradient_reaches_the_input(firing: str) -> None:
    x = torch.rand(6, 2, 10, requires_grad=True)
    ParaLIF(firing, **QUICK, surrogate=ATan())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_difference_gradient_touches_two_membranes() -> None:
    m = torch.randn(5, 1, dtype=torch.float64)
    neuron = ParaLIF("d", tau_mem=1e-9, tau_syn=None, surrogate=ATan()).double()  # beta = 0: M is the input
    x = m.clone().requires_grad_()
    (grad,) = torch.autograd.grad(neuron(x)[3].sum(), x)
    assert grad[3] > 0 > grad[2]
    assert grad[3] == -grad[2]
    assert not grad[[0, 1, 4]].any()
