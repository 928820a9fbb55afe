"""Linear layers with delays: against the equation, step by step, and how their blur narrows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spikeloom.layers import DelayedLinear
from spikeloom.stream import Stream


def by_the_equation(layer: DelayedLinear, x: Tensor) -> Tensor:
    """Y[t, o] = sum_i w[o, i] sum_d g(d) X[t - d, i], one step at a time."""
    p, y = (100 * layer.delay).clamp(0, layer.steps - 1), torch.zeros(*x.shape[:2], layer.weight.shape[0]).to(x)
    d = torch.arange(layer.steps).to(x)
    if layer.training:
        g = torch.exp(-((d - p.unsqueeze(2)) ** 2) / (2 * layer.sigma.to(x) ** 2))
        g = g / g.sum(2, keepdim=True)
    else:
        g = torch.nn.functional.one_hot(p.round().long(), layer.steps).to(x)
    for t in range(len(x)):
        for back in range(min(t + 1, layer.steps)):
            y[t] += x[t - back] @ (layer.weight * g[:, :, back]).T
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T", [1, 3, 11])
def test_outputs_and_gradients_are_the_equation_s(T: int, training: bool) -> None:
    torch.manual_seed(T)
    layer = DelayedLinear(5, 7, steps=4).double().train(training)
    layer.start_epoch(1, 8)
    x = torch.randn(T, 3, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(T, 3, 7, dtype=torch.float64)
    inputs = [x, layer.weight, *([layer.delay] if training else [])]
    y, expected = layer(x), by_the_equation(layer, x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, inputs, grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_whole_is_stepwise() -> None:
    layer, x = DelayedLinear(5, 7, steps=4).eval(), torch.randn(9, 2, 5)
    stream = Stream(layer)
    parts = torch.cat([stream(x[:1]), stream(x[1:3]), stream(x[3:8]), stream(x[8:])])
    torch.testing.assert_close(parts, layer(x))
    with pytest.raises(ValueError, match="carries the inputs of a batch of 2, got 3: use a new Stream"):
        stream(torch.randn(1, 3, 5))


def test_a_delay_is_a_shift() -> None:
    layer, x = DelayedLinear(1, 1, steps=6).eval(), torch.randn(8, 1, 1)
    for delay, steps in ((0.0, 0), (2.4, 2), (2.6, 3), (5.0, 5), (-3.0, 0), (77.0, 5)):
        torch.nn.init.constant_(layer.weight, 2.0)
        torch.nn.init.constant_(layer.delay, delay / 100)
        expected = torch.cat([torch.zeros(steps, 1, 1), 2 * x[: 8 - steps]])
        torch.testing.assert_close(layer(x), expected)


def test_the_blur_narrows_over_the_first_quarter() -> None:
    layer = DelayedLinear(1, 1, steps=25)
    widths: list[float] = []
    for epoch in range(40):
        layer.start_epoch(epoch, 40)
        widths.append(layer.sigma.item())
    assert widths[0] == 12.5
    assert widths[10] == pytest.approx(0.23)
    assert widths[39] == widths[10]
    steps = [b / a for a, b in itertools.pairwise(widths[:11])]
    assert max(steps) == pytest.approx(min(steps))


def test_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"DelayedLinear takes \[T, N, 5\], got shape \(2, 3, 4\)"):
        DelayedLinear(5, 7, steps=4)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="steps"):
        DelayedLinear(5, 7, steps=0)
    assert repr(DelayedLinear(5, 7, steps=4)) == "DelayedLinear(in_features=5, out_features=7, steps=4)"
