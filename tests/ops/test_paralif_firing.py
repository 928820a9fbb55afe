"""ParaLIF's firing functions: how often they fire, and the gradient rules of the paper's table by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spikeloom.ops.paralif_firing import FIRING, MAPS, bernoulli, fire_by, gumbel
from spikeloom.surrogates import ATan, FastSigmoid

DRAWS = 200_000
STOCHASTIC = [name for name, (_, rule) in FIRING.items() if rule in ("gumbel", "bernoulli")]
THRESHOLD = [name for name, (_, rule) in FIRING.items() if rule == "threshold"]
DIFFERENCE = [name for name, (_, rule) in FIRING.items() if rule == "difference"]


def fire(name: str, m: Tensor, threshold: float = 0.25) -> Tensor:
    return fire_by(name, m, threshold, ATan())[0]


def slope(name: str, m: float) -> tuple[float, float]:
    """The map of a firing function at m, and its derivative, in Python's double precision."""
    kind = FIRING[name][0]
    if kind == "s":
        y = 1 / (1 + math.exp(-m))
        return y, y * (1 - y)
    if kind in ("t", "tr"):
        y = math.tanh(m)
        return (max(y, 0.0), (1 - y * y) * (m > 0)) if kind == "tr" else (y, 1 - y * y)
    return m, 1.0


def atan_slope(u: float) -> float:
    return 1 / (1 + (math.pi * u) ** 2)


def test_the_table() -> None:
    assert STOCHASTIC == ["gs", "sb", "trb"]
    assert THRESHOLD == ["t", "st", "tt", "trt"]
    assert DIFFERENCE == ["d", "sd", "td", "trd"]
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(MAPS["tr"](x), torch.tanh(x).clamp_min(0))


# --- how often --------------------------------------------------------------------------------------------------------

PROBABILITY = {
    "gs": lambda m: 1 / (1 + math.exp(-2 * m)),
    "sb": lambda m: 1 / (1 + math.exp(-m)),
    "trb": lambda m: max(0.0, math.tanh(m)),
}


def within_binomial(fired: float, p: float) -> bool:
    """Five standard deviations of the share of `DRAWS` draws."""
    return abs(fired - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS) + 1e-12


@pytest.mark.parametrize("m", [-1.5, -0.25, 0.0, 0.25, 1.5])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_firing_probability(name: str, m: float) -> None:
    spikes = fire(name, torch.full((2, DRAWS // 2), m))
    assert torch.equal(spikes, spikes.round())
    p = PROBABILITY[name](m)
    assert within_binomial(spikes.mean().item(), p)
    if name == "trb" and m <= 0:
        assert not spikes.any()
    else:
        # Draws of one call do not repeat over steps or neurons.
        assert within_binomial((spikes[0] == spikes[1]).float().mean().item(), p * p + (1 - p) ** 2) or m == 0


def test_gumbel_with_given_numbers_fires_as_often() -> None:
    for m in (-0.5, 0.75):
        spikes = gumbel(torch.full((DRAWS,), m)[None], torch.rand(1, DRAWS, 2).clamp_min(1e-7))
        assert within_binomial(spikes.mean().item(), PROBABILITY["gs"](m))


def test_silent_input_is_not_silent_output() -> None:
    silence = torch.zeros(50, 400)
    assert fire("sb", silence).mean() == pytest.approx(0.5, abs=0.02)
    assert fire("gs", silence).mean() == pytest.approx(0.5, abs=0.02)
    for name in ("trb", "t", "st", "tt", "trt", "d", "td", "trd"):
        assert not fire(name, silence, 0.6 if name == "st" else 0.25).any()


def test_the_seed_decides_the_draws() -> None:
    m = torch.randn(4, 500)
    for name in STOCHASTIC:
        torch.manual_seed(1)
        first, other = fire(name, m), fire(name, m)
        torch.manual_seed(1)
        assert torch.equal(fire(name, m), first)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FIRING)
def test_precision(name: str, dtype: torch.dtype) -> None:
    m = torch.linspace(-40, 40, 4001).to(dtype)[None].requires_grad_()
    spikes = fire(name, m)
    assert spikes.dtype == dtype
    spikes.sum().backward()
    assert m.grad is not None
    assert m.grad.dtype == dtype
    assert m.grad.isfinite().all()


# --- gradient rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [-1.0, -0.125, 0.5, 2.0])
def test_gumbel_gradient_is_the_soft_samples(m: float) -> None:
    """y = softmax((m + g0, -m + g1))[0], ds/dm := dy/dm = 2 y (1 - y); s = 1 where y > 1/2."""
    uniform = torch.rand(1, 30, 2, dtype=torch.float64)
    x = torch.full((1, 30), m, dtype=torch.float64, requires_grad=True)
    spikes = gumbel(x, uniform)
    upstream = torch.randn(1, 30, dtype=torch.float64)
    spikes.backward(upstream)
    assert x.grad is not None
    for n in range(30):
        g0, g1 = (-math.log(-math.log(u)) for u in uniform[0, n].tolist())
        a, b = math.exp(m + g0), math.exp(-m + g1)
        y = a / (a + b)
        assert spikes[0, n].item() == (y > 0.5)
        assert x.grad[0, n].item() == pytest.approx(upstream[0, n].item() * 2 * y * (1 - y), rel=1e-9)


@pytest.mark.parametrize("m", [-1.0, -0.125, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", ["sb", "trb"])
def test_bernoulli_gradient(name: str, m: float) -> None:
    """The probability stands in for the draw's derivative: dL/dm = dL/ds p p'(m), whatever was drawn."""
    x = torch.full((1, 20), m, dtype=torch.float64, requires_grad=True)
    fire(name, x).sum().backward()
    p, derivative = slope(name, m)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x.grad, p * derivative), rtol=1e-12, atol=1e-15)
    if name == "sb":
        assert x.grad[0, 0].item() == pytest.approx(p * p * (1 - p))
    elif m <= 0:
        assert not x.grad.any()


def test_bernoulli_passes_the_probability() -> None:
    p = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    spikes = bernoulli(p)
    assert spikes[0] == 0
    assert spikes[2] == 1
    spikes.backward(torch.tensor([1.0, -2.0, 3.0]))
    assert p.grad is not None
    assert p.grad.tolist() == [0.0, -0.5, 3.0]


@pytest.mark.parametrize("m", [-1.0, 0.125, 0.5, 2.0])
@pytest.mark.parametrize("name", THRESHOLD)
def test_threshold_gradient(name: str, m: float) -> None:
    x = torch.tensor([[m]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    spikes, last = fire_by(name, x, threshold, ATan())
    assert last is None
    spikes.sum().backward()
    y, derivative = slope(name, m)
    assert spikes.item() == (y > 0.25)
    assert x.grad is not None
    assert threshold.grad is not None
    assert x.grad.item() == pytest.approx(atan_slope(y - 0.25) * derivative, rel=1e-9)
    assert threshold.grad.item() == pytest.approx(-atan_slope(y - 0.25), rel=1e-9)


@pytest.mark.parametrize("name", DIFFERENCE)
def test_difference_gradient_reaches_two_steps(name: str) -> None:
    """s[n] = 1 where y[n] - y[n-1] > D: dL/dm[n] and dL/dm[n-1] have opposite signs."""
    values = [0.25, 0.75, 0.5, 1.5]
    for n in range(4):
        m = torch.tensor(values, dtype=torch.float64).view(4, 1).requires_grad_()
        spikes, last = fire_by(name, m, 0.1, ATan())
        y, before = slope(name, values[n]), slope(name, values[n - 1]) if n else (0.0, 0.0)
        assert spikes[n].item() == (y[0] - before[0] > 0.1)
        assert last is not None
        assert last.item() == pytest.approx(slope(name, values[3])[0])
        (grad,) = torch.autograd.grad(spikes[n].sum(), m)
        surrogate = atan_slope(y[0] - before[0] - 0.1)
        expected = [0.0] * 4
        expected[n] = surrogate * y[1]
        if n:
            expected[n - 1] = -surrogate * before[1]
            assert grad[n] > 0 > grad[n - 1]
        assert grad.flatten().tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", DIFFERENCE)
def test_difference_carries_the_potential(name: str) -> None:
    m = torch.randn(7, 40, dtype=torch.float64)
    whole, last = fire_by(name, m, 0.1, ATan())
    first, middle = fire_by(name, m[:3], 0.1, ATan())
    second, end = fire_by(name, m[3:], 0.1, ATan(), middle)
    assert torch.equal(torch.cat([first, second]), whole)
    assert last is not None
    assert end is not None
    assert torch.equal(end, last)


def test_ties_do_not_fire() -> None:
    for name in ("t", "d"):
        assert fire(name, torch.tensor([[0.25], [0.5]])).flatten().tolist() == ([0, 1] if name == "t" else [0, 0])


def test_sd_fires_at_first_on_silent_input() -> None:
    """sigmoid(0) = 1/2 rises from 0 by more than D; so does any input above logit(D)."""
    spikes = fire("sd", torch.zeros(5, 3), 0.1)
    assert spikes[0].all()
    assert not spikes[1:].any()
    at = math.log(0.1 / 0.9)
    assert at == pytest.approx(-2.197, abs=1e-3)
    first = fire("sd", torch.tensor([[at - 1e-3, at + 1e-3]]), 0.1)
    assert first.tolist() == [[0.0, 1.0]]


def test_d_fires_while_the_potential_climbs() -> None:
    """Constant input after an onset: spikes while the potential climbs faster than D, none at steady state."""
    t = torch.arange(200, dtype=torch.float64)
    m = (2 * (1 - 0.95 ** (t - 20).clamp_min(0))).view(-1, 1)
    spikes = fire("d", m, 0.01).flatten()
    rise = torch.diff(m.flatten(), prepend=torch.zeros(1))
    assert torch.equal(spikes, (rise > 0.01).double())
    assert not spikes[:21].any()
    assert spikes[21:50].all()
    assert not spikes[100:].any()


@pytest.mark.parametrize("name", ["st", "tt", "trt"])
def test_those_below_one_never_reach_the_released_threshold(name: str) -> None:
    m = torch.linspace(-20, 8, 500)[None]
    assert not fire(name, m, 1.0).any()
    assert fire(name, m, 0.9).any()


def test_fast_sigmoid() -> None:
    x = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)
    fire_by("t", x, 1.0, FastSigmoid())[0].sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(1 / (100 * 0.5 + 1) ** 2)
