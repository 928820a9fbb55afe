"""A soft reset that comes a step after the spike, against its equation in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spikeloom.neurons import DelayedResetLIF
from spikeloom.ops import backend
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, Sigmoid, Surrogate


def loop(x: Tensor, beta: float, threshold: float, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """`U[t] = beta U[t-1] + X[t] - V_th S[t-1]`, with no gradient through S."""
    u, s = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    spikes, trace = list[Tensor](), list[Tensor]()
    for x_t in x:
        u = beta * u + x_t - threshold * s.detach()
        s = surrogate(u - threshold, True)
        spikes.append(s)
        trace.append(u)
    return torch.stack(spikes), torch.stack(trace)


@pytest.mark.parametrize("surrogate", [ATan(2.0), Sigmoid(4.0)], ids=["ATan", "Sigmoid"])
@pytest.mark.parametrize(("beta", "threshold"), [(0.3, 1.0), (0.5, 0.5), (0.9, 0.75), (0.99, 1.5), (1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_equation(beta: float, threshold: float, surrogate: Surrogate, dtype: torch.dtype, tracks: Any) -> None:
    x = torch.randn(20, 4, 25, dtype=dtype, requires_grad=True)
    neuron = DelayedResetLIF(beta, threshold, surrogate)
    spikes, (expected, trace) = neuron(x), loop(x, beta, threshold, surrogate)
    assert expected.sum() > 50
    assert torch.equal(spikes, expected)  # none of 2,000
    torch.testing.assert_close(neuron.potentials(x), trace.detach(), rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(x)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (spikes, expected)]
    assert tracks(*grads) < 1e-4


def test_to_the_bit_on_the_binary_grid(dyadic: Any) -> None:
    x = dyadic(16, 3, 40)
    for name in ("reference", "native"):
        with backend(name):  # pyright: ignore
            assert torch.equal(DelayedResetLIF(0.5)(x), loop(x, 0.5, 1.0, ATan())[0])


def test_a_potential_far_above_the_threshold_is_lowered_once_a_step() -> None:
    x = torch.zeros(6, 1, 1)
    x[0] = 3.25
    # U = 3.25, 2.25, 1.25, 0.25: a spike for each but the last, without leak.
    assert DelayedResetLIF(1.0)(x).flatten().tolist() == [1, 1, 1, 0, 0, 0]
    assert DelayedResetLIF(1.0).potentials(x).flatten().tolist() == [3.25, 2.25, 1.25, 0.25, 0.25, 0.25]


def test_bfloat16_keeps_small_currents() -> None:
    x = (torch.rand(16, 4, 50) / 64).bfloat16()
    neuron = DelayedResetLIF(0.5, 0.01)
    spikes = neuron(x)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), loop(x.float(), 0.5, 0.01, ATan())[0])


def test_a_stream_carries_the_reset() -> None:
    x = torch.randn(12, 2, 30)
    neuron = DelayedResetLIF(0.9)
    stream = Stream(neuron)
    assert torch.equal(torch.cat([stream(part) for part in x.split(5)]), neuron(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a positive number, got 0.0"),
        ({"beta": 1.5}, "beta must be at most 1, got 1.5"),
        ({"v_threshold": 0.0}, "v_threshold must be a positive number, got 0.0"),
    ],
)
def test_constants(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DelayedResetLIF(**options)
