"""Surrogates: primitive against derivative, published values, and the kernels' own formulas."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spikeloom.neurons import LIF, PSN
from spikeloom.ops import backend, scan
from spikeloom.surrogates import (
    SURROGATES,
    ATan,
    ConstantOne,
    FastSigmoid,
    FlatATan,
    PiecewiseLinear,
    QuadraticGate,
    Rectangular,
    Sigmoid,
    Surrogate,
    Triangle,
)

VARIANTS = [
    *(SURROGATES[name]() for name in SURROGATES if name != "PiecewiseLinear"),
    ATan(3.0),
    ATan(0.5),
    Sigmoid(1.0),
    Sigmoid(25.0),
    Rectangular(0.5),
    Rectangular(2.0, closed=True),
    Triangle(0.5),
    Triangle(3.0),
    QuadraticGate(2.0),
    FastSigmoid(2.0),
]


def grid(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-6, 6, 2401, dtype=dtype)


@pytest.mark.parametrize("surrogate", VARIANTS, ids=str)
def test_derivative_is_that_of_the_primitive(surrogate: Surrogate) -> None:
    # Away from the corners of the piecewise ones.
    x = (torch.rand(500, dtype=torch.float64) * 8 - 4).requires_grad_()
    (expected,) = torch.autograd.grad(surrogate.primitive(x).sum(), x)
    torch.testing.assert_close(surrogate.derivative(x.detach()), expected, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(surrogate.primitive, x[:40], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("surrogate", VARIANTS, ids=str)
def test_forward_is_the_step_and_backward_the_derivative(surrogate: Surrogate) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.cat([grid(dtype), torch.tensor([0.0, -0.0, 1e-38, -1e-38, math.inf, -math.inf], dtype=dtype)])
        x.requires_grad_()
        s = surrogate(x)
        assert s.dtype == dtype
        assert torch.equal(s, (x >= 0).to(dtype))
        upstream = torch.randn_like(s)
        s.backward(upstream)
        assert x.grad is not None
        assert torch.equal(x.grad, upstream * surrogate.derivative(x.detach()))


@pytest.mark.parametrize("surrogate", VARIANTS, ids=str)
def test_derivative_is_even_and_the_primitive_odd_around_a_half(surrogate: Surrogate) -> None:
    x = grid()
    torch.testing.assert_close(surrogate.derivative(x), surrogate.derivative(-x), rtol=0, atol=1e-14)
    middle = surrogate.primitive(torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(surrogate.primitive(x) - middle, middle - surrogate.primitive(-x), rtol=0, atol=1e-12)
    assert (surrogate.derivative(x) >= 0).all()


@pytest.mark.parametrize(
    ("surrogate", "x", "value"),
    [
        (ATan(2.0), 0.0, 1.0),
        (ATan(2.0), -1.0, 1 / (1 + math.pi**2)),
        (ATan(2.0), -1.0, 0.0920),
        (ATan(2.0), 0.5, 1 / (1 + math.pi**2 / 4)),
        (ATan(2.0), -0.5, 0.2884),
        (ATan(3.0), 0.0, 1.5),
        (ATan(3.0), -1.0, 1.5 / (1 + 2.25 * math.pi**2)),
        (ATan(3.0), -1.0, 0.0646),
        (FlatATan(), 0.0, 1 + math.pi**2 / 4),
        (FlatATan(), 0.5, 1.0),
        (FlatATan(), -0.5, 1.0),
        (Rectangular(), 0.0, 1.0),
        (Rectangular(), 0.4999, 1.0),
        (Rectangular(), 0.5, 0.0),
        (Rectangular(), -0.5, 0.0),
        (Rectangular(closed=True), 0.5, 1.0),
        (Rectangular(closed=True), 0.5001, 0.0),
        (Rectangular(2.0), 0.9, 0.5),
        (ConstantOne(), -50.0, 1.0),
        (Sigmoid(4.0), 0.0, 1.0),
        (Sigmoid(1.0), 0.0, 0.25),
        (Sigmoid(4.0), 0.5, 4 * math.exp(2) / (1 + math.exp(2)) ** 2),
        (Triangle(), 0.0, 1.0),
        (Triangle(), 0.25, 0.75),
        (Triangle(), 1.0, 0.0),
        (Triangle(0.5), 0.0, 2.0),
        (QuadraticGate(2.0), 0.0, 2.0),
        (QuadraticGate(2.0), 0.25, 1.0),
        (QuadraticGate(2.0), 0.5, 0.0),
        (FastSigmoid(100.0), 0.0, 1.0),
        (FastSigmoid(100.0), 0.01, 0.25),
        (FastSigmoid(2.0), -0.5, 0.25),
    ],
    ids=str,
)
def test_published_values(surrogate: Surrogate, x: float, value: float) -> None:
    got = surrogate.derivative(torch.tensor([x], dtype=torch.float64)).item()
    assert got == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("surrogate", "integral"),
    [
        (ATan(2.0), 1.0),
        (ATan(3.0), 1.0),
        (Sigmoid(4.0), 1.0),
        (Rectangular(), 1.0),
        (Rectangular(2.0), 1.0),
        (Triangle(), 1.0),
        (Triangle(0.5), 1.0),
        (QuadraticGate(2.0), 1.0),
        (FlatATan(), 1 + math.pi**2 / 4),
        (FastSigmoid(10.0), 2 / 10),
    ],
    ids=str,
)
def test_integrals(surrogate: Surrogate, integral: float) -> None:
    # x = u / (1 - u^2) brings the whole line into (-1, 1).
    u = torch.linspace(-1, 1, 400_002, dtype=torch.float64)[1:-1]
    jacobian = (1 + u**2) / (1 - u**2) ** 2
    got = torch.trapezoid(surrogate.derivative(u / (1 - u**2)) * jacobian, u).item()
    assert got == pytest.approx(integral, abs=1e-3)


def test_flat_atan_integral_as_printed() -> None:
    assert 1 + math.pi**2 / 4 == pytest.approx(3.467, abs=1e-3)


def test_constant_one_has_no_integral() -> None:
    assert torch.equal(ConstantOne().derivative(grid()), torch.ones(2401, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ATan, "alpha"),
        (Sigmoid, "alpha"),
        (Rectangular, "width"),
        (Triangle, "gamma"),
        (QuadraticGate, "alpha"),
        (FastSigmoid, "scale"),
    ],
)
def test_invalid_constants(make: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
        make(value)


@pytest.mark.parametrize("name", [n for n in SURROGATES if SURROGATES[n] not in (FlatATan, ConstantOne)])
def test_constants_are_numbers(name: str) -> None:
    """A parameter would be read once, as a number, and get no gradient."""
    for value, shown in ((torch.nn.Parameter(torch.tensor(2.0)), "a Parameter"), ("2", "'2'"), (None, "None")):
        with pytest.raises(ValueError, match=f"must be a positive number, got {shown}$"):
            SURROGATES[name](value)  # pyright: ignore[reportCallIssue]


def test_frozen_and_equal_by_value() -> None:
    surrogate = ATan(2.0)
    with pytest.raises(FrozenInstanceError):
        surrogate.alpha = 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert surrogate == ATan()
    assert surrogate != ATan(3.0)
    assert hash(surrogate) == hash(ATan())


def test_names() -> None:
    assert {
        "ATan",
        "Sigmoid",
        "Rectangular",
        "PiecewiseLinear",
        "Triangle",
        "ConstantOne",
        "FlatATan",
        "FastSigmoid",
        "QuadraticGate",
    } <= set(SURROGATES)
    assert PiecewiseLinear is Triangle is SURROGATES["PiecewiseLinear"]


@pytest.mark.parametrize("surrogate", VARIANTS, ids=str)
def test_formula_is_the_derivative(native: Any, surrogate: Surrogate) -> None:
    # IF at T = 1: the gradient of the current is the kernel's derivative of (current - threshold).
    assert surrogate.formula is not None
    edges = torch.tensor([0.5, 0.25, 1.0, 2.0, 1e-3, 1e-8, 3e4])
    u = torch.cat([grid(torch.float32), edges, -edges, torch.nextafter(edges, torch.zeros(7)), torch.zeros(1)])
    for level in native.levels():
        native.set_level(level)
        x = u.clone()[None].requires_grad_()
        with backend("native"):
            scan(x, torch.zeros_like(u), 1.0, 1.0, 0.0, None, surrogate, True)[0].sum().backward()
        assert x.grad is not None
        expected = surrogate.derivative(u.double())
        torch.testing.assert_close(x.grad[0].double(), expected, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class _Given(Surrogate):
    """Gives as its derivative what it was told."""

    value: Any

    def derivative(self, x: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.ones(3), None])
@pytest.mark.parametrize("make", [lambda s: s, lambda s: LIF(surrogate=s), lambda s: PSN(4, surrogate=s)])
def test_a_derivative_that_is_no_tensor_of_the_shape(make: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=r"^_Given.derivative must give a tensor of x's shape \(.*\), got "):
        make(_Given(value))(torch.randn(4, 2, 5, requires_grad=True)).sum().backward()


def test_methods_that_are_not_there() -> None:
    @dataclass(frozen=True)
    class Half(Surrogate):
        pass

    with pytest.raises(NotImplementedError, match=r"^Half has no method primitive\(x\)$"):
        Half().primitive(torch.zeros(1))
    with pytest.raises(NotImplementedError, match=r"^Half has no method derivative\(x\)$"):
        Half()(torch.zeros(1, requires_grad=True)).sum().backward()
