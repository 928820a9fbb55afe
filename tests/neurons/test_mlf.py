"""Multi-level firing: what its paper shows and what its equations imply."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spikeloom.neurons import LIF, MLF
from spikeloom.ops import scan
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, Rectangular

ALL = (0.6, 1.6, 2.6)


def gradient(neuron: MLF | LIF, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(neuron(x).sum(), x)
    return grad


def test_public_defaults() -> None:
    neuron = MLF()
    assert neuron.v_threshold == ALL
    assert neuron.decay == pytest.approx(0.25)
    assert neuron.surrogate == Rectangular(1.0)
    assert not neuron.detach_reset
    assert not neuron.strict
    assert neuron.v_reset == 0
    assert not list(neuron.parameters())
    assert MLF(v_threshold=[0.5, 1.5]).v_threshold == (0.5, 1.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_output_range(K: int) -> None:
    out = MLF(v_threshold=ALL[:K])(torch.randn(20, 4, 500) * 2 + 1)
    assert out.unique().tolist() == list(range(K + 1))


def test_the_equations_by_hand() -> None:
    """Row 003: u_k[t+1] = 0.25 u_k[t] (1 - o_k[t]) + x[t+1], in Python's double precision."""
    x = torch.randn(30, 200, dtype=torch.float64) * 1.5 + 0.5
    out, potentials = MLF()(x), MLF().potentials(x)
    for n in range(200):
        u, o = [0.0] * 3, [0.0] * 3
        for t in range(30):
            u = [0.25 * u[k] * (1 - o[k]) + x[t, n].item() for k in range(3)]
            o = [float(u[k] >= ALL[k]) for k in range(3)]
            assert potentials[t, :, n].tolist() == pytest.approx(u, rel=1e-12, abs=1e-12)
            assert out[t, n] == sum(o)


def test_one_level_is_lif() -> None:
    x = torch.randn(25, 3, 200) + 0.4
    for detach in (True, False):
        for strict in (True, False):
            mlf = MLF(4 / 3, (0.6,), detach_reset=detach, strict=strict)
            lif = LIF(4 / 3, False, 0.6, 0.0, Rectangular(), detach, strict)
            assert mlf(x).sum() > 100
            assert torch.equal(mlf(x), lif(x))
            torch.testing.assert_close(gradient(mlf, x), gradient(lif, x), rtol=1e-5, atol=1e-6)
            assert torch.equal(mlf.potentials(x)[:, 0], lif.potentials(x))


def test_strict_fires_above_the_threshold() -> None:
    x = torch.tensor([[0.5, 1.0, 1.5, 2.0]])
    assert MLF(v_threshold=(0.5, 1.0, 1.5))(x).flatten().tolist() == [1, 2, 3, 3]
    assert MLF(v_threshold=(0.5, 1.0, 1.5), strict=True)(x).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("K", [1, 2, 3])
def test_windows_tile(K: int) -> None:
    """At the first step the summed derivative is 1 on (0.1, K + 0.1) and 0 outside: no overlap, no gap."""
    x = torch.linspace(-1.003, 4.003, 4001)[None]
    grad = gradient(MLF(v_threshold=ALL[:K]), x)
    near_an_edge = torch.stack([(x - edge).abs() < 1e-5 for edge in (0.1, 1.1, 2.1, 3.1)]).any(0)
    expected = ((x > 0.1) & (x < K + 0.1)).float()
    assert torch.equal(grad[~near_an_edge], expected[~near_an_edge])


def test_a_large_input_has_no_gradient() -> None:
    x = torch.tensor([[3.2, 10.0, 100.0]])
    assert MLF()(x).flatten().tolist() == [3, 3, 3]
    assert not gradient(MLF(), x).any()


def dormant(K: int, x: Tensor) -> Tensor:
    """Units whose surrogate's derivative is 0 at all steps and levels."""
    neuron = MLF(v_threshold=ALL[:K])
    u = neuron.potentials(x) - torch.tensor(ALL[:K]).view(1, -1, *(1,) * (x.dim() - 1))
    return ~(Rectangular().derivative(u) > 0).flatten(0, 1).any(0)


def test_fewer_units_are_dormant_with_more_levels() -> None:
    x = torch.randn(1, 5000) * 2
    share = [dormant(K, x).float().mean().item() for K in (1, 2, 3)]
    assert share[0] > share[1] > share[2] > 0
    # At the first step a unit that is awake at one level stays so with more.
    assert (dormant(3, x) <= dormant(2, x)).all()
    assert (dormant(2, x) <= dormant(1, x)).all()
    # At any T, level by level: the levels of a smaller K are among those of a larger one.
    x = torch.randn(8, 5000) * 2
    assert (dormant(3, x) <= dormant(1, x)).all()


def levels(x: Tensor, decay: float = 0.25, thresholds: tuple[float, ...] = ALL) -> list[Tensor]:
    return [scan(x, None, decay, 1.0, level, 0.0, ATan(), True)[0] for level in thresholds]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-4, 6, width=32), min_size=40, max_size=40))
def test_nested_firing(values: list[float]) -> None:
    """o_1 >= o_2 >= o_3 at every step: the output is a thermometer code, for k_tau = 0.25 and these thresholds."""
    x = torch.tensor(values).view(40, 1)
    first, second, third = levels(x)
    assert (first >= second).all()
    assert (second >= third).all()
    assert torch.equal(MLF()(x), first + second + third)


def test_nested_firing_of_many() -> None:
    first, second, third = levels(torch.randn(40, 50_000) * 2 + 0.7)
    assert (first >= second).all()
    assert (second >= third).all()
    assert third.sum() > 1000


def test_firing_is_not_nested_for_other_constants() -> None:
    x = torch.rand(40, 2000)
    first, second = levels(x, decay=0.9, thresholds=(0.9, 1.0))
    assert (first < second).any()


def test_stepwise_state_is_a_potential_a_level() -> None:
    neuron, x = MLF(), torch.randn(6, 2, 5) + 1
    stream = Stream(neuron)
    out = torch.cat([stream(x_t) for x_t in x.split(1)])
    assert torch.equal(out, neuron(x))
    assert stream.state(neuron).shape == (3, 2, 5)


@pytest.mark.parametrize("thresholds", [(), (0.0, 1.0), (-0.5,), (0.6, 0.6), (1.6, 0.6)])
def test_invalid_thresholds(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"v_threshold must be (a positive number|positive and ascending), got"):
        MLF(v_threshold=thresholds)


def test_invalid_time_constant() -> None:
    with pytest.raises(ValueError, match=r"tau must be greater than 1, got 1\.0"):
        MLF(tau=1.0)
