"""Surrogate gradients: the step function forward, a smooth function's derivative backward.

Each surrogate is a `primitive` whose `derivative` replaces that of the step function
`Theta(x) = 1 if x >= 0 else 0` at `x = membrane potential - threshold` (Neftci et al. 2019).
Instances are frozen, so one may be shared by all neurons and used as a default argument.

A surrogate of your own is a subclass with these two methods; it runs on the fused scans through
its derivative. `formula` names the built-in derivatives that the native kernels compute themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.registry import Registry


class Formula(NamedTuple):
    """A derivative the kernels know: `kind` of `native/kernels.hpp`, with its two constants."""

    kind: int
    p: float
    q: float


_RATIONAL, _RECTANGLE, _TRIANGLE, _FAST_SIGMOID, _SIGMOID, SLOPE = range(6)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0 if strict else x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(x), None, None


@dataclass(frozen=True)
class Surrogate:
    """Base of the surrogates: call it on `potential - threshold` to get spikes in {0, 1} of the same shape.

    With `strict` a potential at the threshold does not fire, as in several released codes.
    """

    def __call__(self, x: Tensor, strict: bool = False) -> Tensor:
        return _Spike.apply(x, self, strict)

    def primitive(self, x: Tensor) -> Tensor:
        """The smooth function that stands in for the step, for any x."""
        raise NotImplementedError

    def derivative(self, x: Tensor) -> Tensor:
        """The derivative of `primitive`, of the shape and dtype of x."""
        raise NotImplementedError

    @property
    def formula(self) -> Formula | None:
        """The kernels' name of `derivative`, or None for one they do not know."""
        return None


def _positive(name: str, value: float) -> None:
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{name} must be a positive number, got {value}")


SURROGATES: Registry[type[Surrogate]] = Registry("surrogate")


@SURROGATES.register
@dataclass(frozen=True)
class ATan(Surrogate):
    """`arctan(pi/2 alpha x) / pi + 1/2`; peak alpha/2 (Fang et al. 2021, PLIF; SEW ResNet Sec. 3.1)."""

    alpha: float = 2.0

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * x) / math.pi + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * x).square())

    @property
    def formula(self) -> Formula:
        return Formula(_RATIONAL, self.alpha / 2, math.pi / 2 * self.alpha)


@SURROGATES.register
@dataclass(frozen=True)
class FlatATan(Surrogate):
    """`(1 + pi^2/4) (arctan(pi x) / pi + 1/2)`: derivative 1 at x = -1/2 and 1/2 (SEW ResNet, A.5, corrected)."""

    def primitive(self, x: Tensor) -> Tensor:
        return (1 + math.pi**2 / 4) * (torch.atan(math.pi * x) / math.pi + 0.5)

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + math.pi**2 / 4) / (1 + (math.pi * x).square())

    @property
    def formula(self) -> Formula:
        return Formula(_RATIONAL, 1 + math.pi**2 / 4, math.pi)


@SURROGATES.register
@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """`1 / (1 + exp(-alpha x))`; peak alpha/4 (Spikformer family)."""

    alpha: float = 4.0

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * x)

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * x)
        return self.alpha * s * (1 - s)

    @property
    def formula(self) -> Formula:
        return Formula(_SIGMOID, self.alpha, self.alpha)


@SURROGATES.register
@dataclass(frozen=True)
class Rectangular(Surrogate):
    """`x / width + 1/2` within [0, 1]; derivative 1/width where |x| < width/2 (STBP, tdBN, MLF, MS-ResNet).

    Args:
        width: of the window, in the unit of the potential.
        closed: include the edges |x| = width/2, as the released SLTT code does.
    """

    width: float = 1.0
    closed: bool = False

    def __post_init__(self) -> None:
        _positive("width", self.width)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.clamp(x / self.width + 0.5, 0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        inside = x.abs() <= self.width / 2 if self.closed else x.abs() < self.width / 2
        return inside.to(x.dtype) / self.width

    @property
    def formula(self) -> Formula:
        half = self.width / 2
        edge = float(torch.nextafter(torch.tensor(half), torch.tensor(math.inf))) if self.closed else half
        return Formula(_RECTANGLE, 1 / self.width, edge)


@SURROGATES.register
@dataclass(frozen=True)
class ConstantOne(Surrogate):
    """`x + 1/2`, derivative 1 everywhere (SEW ResNet, A.5)."""

    def primitive(self, x: Tensor) -> Tensor:
        return x + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    @property
    def formula(self) -> Formula:
        return Formula(_RECTANGLE, 1.0, math.inf)


@SURROGATES.register
@dataclass(frozen=True)
class Triangle(Surrogate):
    """Derivative `max(0, gamma - |x|) / gamma^2`, peak 1/gamma (TET, SLTT; the PSU papers' PWL)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def primitive(self, x: Tensor) -> Tensor:
        y = torch.clamp(x / self.gamma, -1, 1)
        return 0.5 + y - y * y.abs() / 2

    def derivative(self, x: Tensor) -> Tensor:
        return torch.clamp(self.gamma - x.abs(), min=0) / self.gamma**2

    @property
    def formula(self) -> Formula:
        return Formula(_TRIANGLE, 1 / self.gamma, 1 / self.gamma**2)


# The same function under the name it has in the PSU notes.
PiecewiseLinear = Triangle
SURROGATES.register(Triangle, "PiecewiseLinear")


@SURROGATES.register
@dataclass(frozen=True)
class QuadraticGate(Surrogate):
    """Derivative `max(0, alpha - alpha^2 |x|)`: a triangle of peak alpha (released PSU code)."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.alpha * x, -1, 1)
        return 0.5 + y - y * y.abs() / 2

    def derivative(self, x: Tensor) -> Tensor:
        return torch.clamp(self.alpha - self.alpha**2 * x.abs(), min=0)

    @property
    def formula(self) -> Formula:
        return Formula(_TRIANGLE, self.alpha, self.alpha**2)


@SURROGATES.register
@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """Derivative `1 / (scale |x| + 1)^2`, peak 1 (SuperSpike; ParaLIF)."""

    scale: float = 100.0

    def __post_init__(self) -> None:
        _positive("scale", self.scale)

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 + x / (self.scale * x.abs() + 1)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / (self.scale * x.abs() + 1).square()

    @property
    def formula(self) -> Formula:
        return Formula(_FAST_SIGMOID, 1.0, self.scale)
