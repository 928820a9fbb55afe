"""The PSN family of SpikingJelly 2.0 with the same weights: the same spikes and gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from spikeloom.neurons import PSN, MaskedPSN, Neuron, SlidingPSN
from spikeloom.ops import backend
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, Sigmoid, Surrogate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of its optional parts
    sj: Any = pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed: no comparison with it"
    )
    from spikingjelly.activation_based import functional, surrogate  # pyright: ignore

SURROGATES: dict[str, tuple[Surrogate, Any]] = {
    "ATan": (ATan(2.0), lambda: surrogate.ATan(alpha=2.0)),
    "Sigmoid": (Sigmoid(4.0), lambda: surrogate.Sigmoid(alpha=4.0)),
}


def eighths(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape) / 8


def pair(kind: str, T: int, order: int, name: str, lam: float = 1.0, step_mode: str = "m") -> tuple[Any, Any]:
    """Ours and theirs, with the same weights on the binary grid."""
    own, other = SURROGATES[name][0], SURROGATES[name][1]()
    if kind == "PSN":
        a, b = PSN(T, own), sj.PSN(T, surrogate_function=other)
    elif kind == "MaskedPSN":
        a = MaskedPSN(T, order, lam, own)
        b = sj.MaskedPSN(order, T, lambda_init=lam, surrogate_function=other, step_mode=step_mode)
    else:
        a = SlidingPSN(order, surrogate=own)
        b = sj.SlidingPSN(order, surrogate_function=other, step_mode=step_mode)
    weight, bias = eighths(*a.weight.shape), -eighths(*a.bias.shape).abs() / 2
    (weight if weight.dim() == 1 else weight.diagonal())[-1:] = 1.0
    a.weight.data, a.bias.data = weight, bias
    b.weight.data = weight.clone().view_as(b.weight)
    b.bias.data = bias.clone().view_as(b.bias)
    return a, b


def run(neuron: Any, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = neuron(x)
    out.backward(upstream)
    assert x.grad is not None
    return [out.detach(), x.grad, neuron.weight.grad.clone().flatten(), neuron.bias.grad.clone().flatten()]


CASES = [
    ("PSN", 1, 1.0),
    *(("MaskedPSN", k, lam) for k in (1, 3, 8) for lam in (0.0, 0.25, 1.0)),
    *(("SlidingPSN", k, 1.0) for k in (1, 3, 8, 11)),
]


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(("kind", "order", "lam"), CASES)
def test_whole_sequences(
    native: Any, dyadic: Any, tracks: Any, kind: str, order: int, lam: float, name: str, path: str
) -> None:
    T = max(8, order)  # theirs takes no order above T
    ours, theirs = pair(kind, T, order, name, lam)
    for shape in ((T, 4, 50), (T, 3, 2, 5, 7)):
        x, upstream = dyadic(*shape), torch.randn(shape)
        ours.zero_grad()
        theirs.zero_grad()
        functional.reset_net(theirs)
        with backend(path):  # pyright: ignore[reportArgumentType]
            got = run(ours, x, upstream)
        expected = run(theirs, x, upstream)
        assert 0 < expected[0].sum() < expected[0].numel()
        assert torch.equal(got[0], expected[0])
        assert tracks(got[1], expected[1]) < 1e-5
        # Sums over all neurons, whose terms cancel: rounding is relative to the terms.
        terms = upstream.abs().flatten(1) @ x.abs().flatten(1).T
        for a, b in zip(got[2:], expected[2:], strict=True):
            assert (a - b).abs().max() <= 1e-6 * terms.sum()


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize(
    ("kind", "order"),
    [("MaskedPSN", 1), ("MaskedPSN", 3), ("MaskedPSN", 8), ("SlidingPSN", 1), ("SlidingPSN", 3), ("SlidingPSN", 8)],
)
def test_step_by_step(dyadic: Any, kind: str, order: int, name: str) -> None:
    T = 8
    ours, theirs = pair(kind, T, order, name, step_mode="s")
    for _ in range(2):
        x = dyadic(T, 3, 40)
        functional.reset_net(theirs)  # theirs must be told; ours starts from rest in a new Stream
        stream = Stream(ours)
        with torch.no_grad():
            got = torch.cat([stream(x_t) for x_t in x.split(1)])
            expected = torch.stack([theirs(x_t) for x_t in x])
        assert 0 < expected.sum() < expected.numel()
        assert torch.equal(got, expected)
        assert torch.equal(ours(x), got)


@pytest.mark.parametrize("T", [1, 4, 32])
def test_same_number_of_parameters(T: int) -> None:
    pairs: list[tuple[Neuron, Any]] = [
        (PSN(T), sj.PSN(T)),
        (MaskedPSN(T, 2), sj.MaskedPSN(2, T)),
        (SlidingPSN(2), sj.SlidingPSN(2)),
    ]
    for ours, theirs in pairs:
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
