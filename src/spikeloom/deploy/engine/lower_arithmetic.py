"""Lowering of sums, differences, products, quotients and means: handlers of `lower`.

Constants are numbers, or tensors that are broadcast against the axes of one step of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Affine, Join, Mean, Value
from spikeloom.deploy.engine.lower_state import Lowering
from spikeloom.deploy.engine.views import View

Operand = View | Tensor | float | int | torch.SymInt | torch.SymFloat


def add(low: Lowering, x: Operand, y: Operand, alpha: float = 1) -> View:
    """`x + alpha y`"""
    alpha = _constant(low, alpha)
    if isinstance(x, View) and isinstance(y, View):
        return _join(low, "add", x, _scaled(low, y, alpha))
    if isinstance(x, View):
        return _plus(low, x, _constant(low, y) * alpha)
    return _plus(low, _scaled(low, y, alpha), x)


def sub(low: Lowering, x: Operand, y: Operand, alpha: float = 1) -> View:
    """`x - alpha y`; `a + b - a b` of 0/1 spikes is their OR, `1 - s` their complement."""
    alpha = _constant(low, alpha)
    if isinstance(x, View) and isinstance(y, View):
        found = _or(low, x, y) if alpha == 1 else None
        return found or _join(low, "add", x, _scaled(low, y, -alpha))
    if isinstance(y, View) and alpha == 1 and _number(low, y, x) == 1 and low.values[y.value].most == 1:
        return low.map("complement", y)
    return add(low, x, y, -alpha)


def rsub(low: Lowering, x: Operand, y: Operand, alpha: float = 1) -> View:
    """`y - alpha x`"""
    return sub(low, y, x, alpha)


def neg(low: Lowering, x: View) -> View:
    """`-x`"""
    return low.map("scale", x, high=-1.0)


def mul(low: Lowering, x: Operand, y: Operand) -> View:
    """`x y`"""
    if isinstance(x, View) and isinstance(y, View):
        return _join(low, "mul", x, y)
    if isinstance(y, View):
        x, y = y, x
    assert isinstance(x, View)
    number = _number(low, x, y)
    return _scaled(low, x, number) if number is not None else _with_tensor(low, "affine", x, weight=y)


def div(low: Lowering, x: Operand, y: Operand, *, rounding_mode: str | None = None) -> View:
    """`x / y`, y a constant."""
    if rounding_mode is not None:
        raise low.unsupported(f"a quotient that is rounded, rounding_mode={rounding_mode!r}")
    if not isinstance(x, View) or isinstance(y, View):
        raise low.unsupported("a quotient by what depends on the input; one by a constant is supported")
    return _with_tensor(low, "divide", x, weight=torch.as_tensor(_constant(low, y)))


def _constant(low: Lowering, constant: Any) -> Any:
    """A real constant that is the same for all inputs."""
    if isinstance(constant, (torch.SymInt, torch.SymFloat)):
        raise low.unsupported("a constant that depends on the number of images or steps")
    if isinstance(constant, Tensor) and constant.is_complex():
        raise low.unsupported("a complex constant; a real one is supported")
    return constant


def _number(low: Lowering, x: View, constant: Any) -> float | None:
    """A constant that is a number, or a tensor of one element that adds no axis to x."""
    constant = _constant(low, constant)
    if isinstance(constant, Tensor):
        alone = constant.numel() == 1 and constant.dim() <= low.lead(x) + x.rank
        return float(constant.detach()) if alone else None
    return float(constant)


def _finite(low: Lowering, number: Any) -> float:
    if not float("-inf") < float(number) < float("inf"):
        raise low.unsupported(f"the constant {number}; a finite one is supported")
    return float(number)


def _scaled(low: Lowering, x: Any, factor: Any) -> View:
    return x if factor == 1 else low.map("scale", x, high=_finite(low, factor))


def _plus(low: Lowering, x: View, constant: Any) -> View:
    number = _number(low, x, constant)
    if number is not None:
        return low.map("shift", x, high=_finite(low, number))
    return _with_tensor(low, "affine", x, bias=constant)


def _join(low: Lowering, op: str, x: View, y: View) -> View:
    if x.form != y.form:
        raise low.unsupported(f"operands of other axes, a {x.form} and a {y.form}")
    return replace(x, value=low.emit(Join, op=op, xs=(x.value, y.value)).value)


def _or(low: Lowering, x: View, y: View) -> View | None:
    made = {step.out[0]: step for step in low.steps if isinstance(step, Join)}
    both, product = made.get(x.value), made.get(y.value)
    if both is None or product is None or (both.op, product.op) != ("add", "mul") or x.form != y.form:
        return None
    if {*both.xs} != {*product.xs} or any(low.values[index].most != 1 for index in both.xs):
        return None
    return replace(x, value=low.emit(Join, op="or", xs=both.xs).value)


def _with_tensor(low: Lowering, op: str, x: View, **constants: Any) -> View:
    """A step with one constant tensor: `weight` or `bias`."""
    ((name, tensor),) = constants.items()
    made = low.constant(_as_map(low, x, tensor), name)
    return replace(x, value=low.emit(Affine, op=op, x=x.value, **{name: made}).value)


def _as_map(low: Lowering, x: View, constant: Tensor) -> Tensor:
    """A constant as [H or 1, W or 1, C or 1], where the graph broadcasts it against a tensor of x."""
    lead = low.lead(x)
    axes = lead + x.rank
    if constant.dim() > axes:
        raise low.unsupported(f"a constant of {constant.dim()} axes, more than the {axes} of the value")
    constant = constant.detach().float().reshape(*[1] * (axes - constant.dim()), *constant.shape)
    if any(side != 1 for side in constant.shape[:lead]):
        raise low.unsupported(
            f"a constant {list(constant.shape)} that differs from step to step, or from image to image"
        )
    constant = constant[(0,) * lead]
    sizes = x.sizes(low.values[x.value])
    spread = torch.broadcast_shapes(constant.shape, sizes)
    if spread != sizes and x.form not in ("map", "row", "vector"):
        raise low.unsupported(f"a constant of more elements, {list(spread)}, than the {x.form} {list(sizes)}")
    channels, *places = (*spread, 1, 1)[:3]
    height, width = (1, places[0]) if x.form == "row" else places
    value = low.values[x.value]
    if spread != sizes:
        value = low.part(Value, height=height, width=width, channels=channels)
    maps = x.to_map(constant.expand(spread), value)
    for axis in range(3):  # kept once where it is the same along an axis
        if torch.equal(maps, maps.narrow(axis, 0, 1).expand_as(maps)):
            maps = maps.narrow(axis, 0, 1)
    return maps


# --- over places, and over steps --------------------------------------------------------------------------------------


def mean(low: Lowering, x: View, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> View:
    """Over all places, all steps or both."""
    lead = low.lead(x)
    axes = {axis % (lead + x.rank) - lead for axis in dim or ()}
    steps = -lead in axes and low.all_steps(x)
    axes -= {-lead} if steps else set()
    places = {"map": {1, 2}, "tokens": {1}, "tokens.T": {0}, "row": {1}}.get(x.form)
    if axes and axes == places:
        x = low.emit(Mean, x.form if keepdim else "vector", x=x.value)
    elif axes or not steps:
        raise low.unsupported(_reduced("a mean", x, dim, "all places, all steps or both"))
    return low.time("time_mean", x) if steps and not low.values[x.value].static else x


def sum(low: Lowering, x: View, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> View:
    """Over all steps."""
    if dim is None or [axis % (x.rank + 2) for axis in dim] != [0] or not low.all_steps(x):
        raise low.unsupported(_reduced("a sum", x, dim, "all steps"))
    if low.values[x.value].static:
        return low.map("scale", x, high=float(_constant(low, low.length)))
    return low.time("time_sum", x)


def _reduced(what: str, x: View, dim: Sequence[int] | None, supported: str) -> str:
    axes = "all axes" if not dim else f"axes {list(dim)}"
    return f"{what} over {axes} of a {x.form}; over {supported} is supported"
