"""Surrogate gradients: the step function forward, a smooth function's derivative backward.

Each surrogate is a `primitive` whose `derivative` replaces that of the step function
`Theta(x) = 1 if x >= 0 else 0` at `x = membrane potential - threshold` (Neftci et al. 2019).
Instances are frozen, so one may be shared by all neurons and used as a default argument.

A surrogate of your own is a subclass with these two methods; it runs on the fused scans through
its derivative. `formula` names the built-in derivatives that the native kernels compute themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikeloom.checks import number
from spikeloom.errors import UsageError
from spikeloom.modes import tracing, transformed
from spikeloom.registry import Registry


class Formula(NamedTuple):
    """A derivative the kernels know: a name of `Surrogate` in `native/kernels.hpp`, with its two constants."""

    kind: str
    p: float
    q: float


SLOPE = Formula("slope", 0.0, 0.0)
"""Stands for a derivative that kernels read from a tensor, of a surrogate that they do not know."""


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return _theta(x, strict)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.checked_derivative(x), None, None


class _TransformedSpike(torch.autograd.Function):
    """`_Spike` in the form that transforms of `torch.func` want; a call takes three times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate, strict: bool) -> Tensor:
        return _theta(x, strict)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate, bool], output: Tensor) -> None:
        x, ctx.surrogate, _ = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    backward = _Spike.backward

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangents[0] * ctx.surrogate.checked_derivative(x)


def _theta(x: Tensor, strict: bool) -> Tensor:
    return (x > 0 if strict else x >= 0).to(x.dtype)


@dataclass(frozen=True)
class Surrogate:
    """Base of the surrogates: call it on `potential - threshold` to get spikes in {0, 1} of the same shape.

    With `strict` a potential at the threshold does not fire, as in several released codes.
    """

    def __call__(self, x: Tensor, strict: bool = False) -> Tensor:
        if torch.compiler.is_compiling():
            return _Spike.apply(x, self, strict)  # pyright: ignore[reportReturnType]
        if tracing() and not torch.is_grad_enabled():
            return _theta(x, strict)  # a trace with Python functions in it cannot be saved
        function = _TransformedSpike if transformed() else _Spike
        return function.apply(x, self, strict)  # pyright: ignore[reportReturnType]

    def primitive(self, x: Tensor) -> Tensor:
        """The smooth function that stands in for the step, for any x."""
        raise NotImplementedError(f"{type(self).__name__} has no method primitive(x)")

    def derivative(self, x: Tensor) -> Tensor:
        """The derivative of `primitive`, of the shape and dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} has no method derivative(x)")

    def checked_derivative(self, x: Tensor) -> Tensor:
        """`derivative`, as a backward pass reads it: what it gives is checked.

        Raises:
            TypeError: it gives no tensor of the shape of x.
        """
        found: Any = self.derivative(x)
        if isinstance(found, Tensor) and found.shape == x.shape:
            return found
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TypeError(
            f"{type(self).__name__}.derivative must give a tensor of x's shape {tuple(x.shape)}, got {given}"
        )

    @cached_property
    def formula(self) -> Formula | None:
        """The kernels' name of `derivative`, or None for one they do not know."""
        return None


SURROGATES: Registry[type[Surrogate]] = Registry("surrogate")


def as_surrogate(value: Any) -> Surrogate:
    """The surrogate of a neuron: a `Surrogate` as it is, or a name in `SURROGATES`, in letters of any case.

    Raises:
        UsageError: an unknown name, something that is no surrogate, or one with values to train. A surrogate is a
            constant of the backward pass: nothing would train them.
    """
    if isinstance(value, str):
        names = {name.lower(): name for name in SURROGATES}
        return SURROGATES[names.get(value.lower(), value)]()
    if not isinstance(value, Surrogate):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise UsageError(
            f"surrogate must be a name such as 'ATan', or an instance of spikeloom.surrogates.Surrogate such as "
            f"ATan(alpha=2.0), got {given}"
        )
    learned = [name for name, held in _held(value) if _is_learned(held)]
    if learned:
        raise UsageError(
            f"surrogate {type(value).__name__} has values to train ({', '.join(learned)}), and they would get no "
            "gradient: a surrogate is a constant of the backward pass; give it numbers"
        )
    return value


def _held(surrogate: Surrogate) -> Iterable[tuple[str, Any]]:
    """What a surrogate holds, by name."""
    own = surrogate.named_parameters() if isinstance(surrogate, nn.Module) else ()
    of_class = [entry for kind in type(surrogate).__mro__ for entry in vars(kind).items()]
    return (*vars(surrogate).items(), *of_class, *own)


def _is_learned(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return any(p.requires_grad for p in value.parameters())
    return isinstance(value, Tensor) and value.requires_grad


@SURROGATES.register
@dataclass(frozen=True)
class ATan(Surrogate):
    """`arctan(pi/2 alpha x) / pi + 1/2`; peak alpha/2 (Fang et al. 2021, PLIF; SEW ResNet Sec. 3.1)."""

    alpha: float = 2.0

    def __post_init__(self) -> None:
        number("alpha", self.alpha, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * x) / math.pi + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * x).square())

    @cached_property
    def formula(self) -> Formula:
        return Formula("rational", self.alpha / 2, math.pi / 2 * self.alpha)


@SURROGATES.register
@dataclass(frozen=True)
class FlatATan(Surrogate):
    """`(1 + pi^2/4) (arctan(pi x) / pi + 1/2)`: derivative 1 at x = -1/2 and 1/2 (SEW ResNet, A.5, corrected)."""

    def primitive(self, x: Tensor) -> Tensor:
        return (1 + math.pi**2 / 4) * (torch.atan(math.pi * x) / math.pi + 0.5)

    def derivative(self, x: Tensor) -> Tensor:
        return (1 + math.pi**2 / 4) / (1 + (math.pi * x).square())

    @cached_property
    def formula(self) -> Formula:
        return Formula("rational", 1 + math.pi**2 / 4, math.pi)


@SURROGATES.register
@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """`1 / (1 + exp(-alpha x))`; peak alpha/4 (Spikformer family)."""

    alpha: float = 4.0

    def __post_init__(self) -> None:
        number("alpha", self.alpha, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.alpha * x)

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.alpha * x)
        return self.alpha * s * (1 - s)

    @cached_property
    def formula(self) -> Formula:
        return Formula("sigmoid", self.alpha, self.alpha)


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
        number("width", self.width, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        return torch.clamp(x / self.width + 0.5, 0, 1)

    def derivative(self, x: Tensor) -> Tensor:
        inside = x.abs() <= self.width / 2 if self.closed else x.abs() < self.width / 2
        return inside.to(x.dtype) / self.width

    @cached_property
    def formula(self) -> Formula:
        half = self.width / 2
        ends = torch.tensor([half, math.inf], dtype=torch.float32, device="cpu")
        edge = torch.nextafter(ends[0], ends[1]).item() if self.closed else half
        return Formula("rectangle", 1 / self.width, edge)


@SURROGATES.register
@dataclass(frozen=True)
class ConstantOne(Surrogate):
    """`x + 1/2`, derivative 1 everywhere (SEW ResNet, A.5)."""

    def primitive(self, x: Tensor) -> Tensor:
        return x + 0.5

    def derivative(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    @cached_property
    def formula(self) -> Formula:
        return Formula("rectangle", 1.0, math.inf)


@SURROGATES.register
@dataclass(frozen=True)
class Triangle(Surrogate):
    """Derivative `max(0, gamma - |x|) / gamma^2`, peak 1/gamma (TET, SLTT; the PSU papers' PWL)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        number("gamma", self.gamma, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        y = torch.clamp(x / self.gamma, -1, 1)
        return 0.5 + y - y * y.abs() / 2

    def derivative(self, x: Tensor) -> Tensor:
        return torch.clamp(self.gamma - x.abs(), min=0) / self.gamma**2

    @cached_property
    def formula(self) -> Formula:
        return Formula("triangle", 1 / self.gamma, 1 / self.gamma**2)


# The same function under the name it has in the PSU notes.
PiecewiseLinear = Triangle
SURROGATES.register(Triangle, "PiecewiseLinear")


@SURROGATES.register
@dataclass(frozen=True)
class QuadraticGate(Surrogate):
    """Derivative `max(0, alpha - alpha^2 |x|)`: a triangle of peak alpha (released PSU code)."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        number("alpha", self.alpha, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.alpha * x, -1, 1)
        return 0.5 + y - y * y.abs() / 2

    def derivative(self, x: Tensor) -> Tensor:
        return torch.clamp(self.alpha - self.alpha**2 * x.abs(), min=0)

    @cached_property
    def formula(self) -> Formula:
        return Formula("triangle", self.alpha, self.alpha**2)


@SURROGATES.register
@dataclass(frozen=True)
class FastSigmoid(Surrogate):
    """Derivative `1 / (scale |x| + 1)^2`, peak 1 (SuperSpike; ParaLIF)."""

    scale: float = 100.0

    def __post_init__(self) -> None:
        number("scale", self.scale, above=0)

    def primitive(self, x: Tensor) -> Tensor:
        return 0.5 + x / (self.scale * x.abs() + 1)

    def derivative(self, x: Tensor) -> Tensor:
        return 1 / (self.scale * x.abs() + 1).square()

    @cached_property
    def formula(self) -> Formula:
        return Formula("fast_sigmoid", 1.0, self.scale)
