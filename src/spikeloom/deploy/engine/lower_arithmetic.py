"""Lowering of sums, differences, products and quotients of the engine's values and constants: handlers of `lower`.

Constants are numbers, or tensors that are broadcast against the axes of one step of one image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Affine, Join, Value
from spikeloom.deploy.engine.lower_state import Lowering
from spikeloom.deploy.engine.views import View


def add(low: Lowering, x: Any, y: Any, alpha: float = 1) -> View:
    """`x + alpha y`"""
    if isinstance(x, View) and isinstance(y, View):
        return _join(low, "add", x, _scaled(low, y, alpha))
    if isinstance(x, View):
        return _plus(low, x, y * alpha)
    return _plus(low, _scaled(low, y, alpha), x)


def sub(low: Lowering, x: Any, y: Any, alpha: float = 1) -> View:
    """`x - alpha y`; `a + b - a b` of 0/1 spikes is their OR, `1 - s` their complement."""
    if isinstance(x, View) and isinstance(y, View):
        found = _or(low, x, y) if alpha == 1 else None
        return found or _join(low, "add", x, _scaled(low, y, -alpha))
    if isinstance(y, View) and alpha == 1 and _number(low, y, x) == 1 and low.values[y.value].most == 1:
        return low.map("complement", y)
    return add(low, x, y, -alpha)


def rsub(low: Lowering, x: Any, y: Any, alpha: float = 1) -> View:
    """`y - alpha x`"""
    return sub(low, y, x, alpha)


def neg(low: Lowering, x: View) -> View:
    """`-x`"""
    return low.map("scale", x, high=-1.0)


def mul(low: Lowering, x: Any, y: Any) -> View:
    """`x y`"""
    if isinstance(x, View) and isinstance(y, View):
        return _join(low, "mul", x, y)
    view, constant = (x, y) if isinstance(x, View) else (y, x)
    number = _number(low, view, constant)
    return _scaled(low, view, number) if number is not None else _with_tensor(low, "affine", view, weight=constant)


def div(low: Lowering, x: Any, y: Any, *, rounding_mode: str | None = None) -> View:
    """`x / y`, y a constant."""
    if rounding_mode is not None or not isinstance(x, View) or isinstance(y, (View, torch.SymInt)):
        raise TypeError("a quotient that is rounded, or by what depends on the input")
    return _with_tensor(low, "divide", x, weight=torch.as_tensor(y))


def _scaled(low: Lowering, x: View, factor: Any) -> View:
    return x if factor == 1 else low.map("scale", x, high=_finite(factor))


def _plus(low: Lowering, x: View, constant: Any) -> View:
    number = _number(low, x, constant)
    if number is not None:
        return low.map("shift", x, high=_finite(number))
    return _with_tensor(low, "affine", x, bias=constant)


def _number(low: Lowering, x: View, constant: Any) -> float | None:
    """A constant that is a number, or a tensor of one element that adds no axis to x."""
    if isinstance(constant, (torch.SymInt, torch.SymFloat)):
        raise TypeError("a constant that depends on the number of images or steps")
    if isinstance(constant, Tensor):
        alone = constant.numel() == 1 and constant.dim() <= low.lead(x) + x.rank
        return float(constant.detach()) if alone else None
    return float(constant)


def _finite(number: Any) -> float:
    if not float("-inf") < float(number) < float("inf"):
        raise TypeError(f"the constant {number}")
    return float(number)


def _join(low: Lowering, op: str, x: View, y: View) -> View:
    if x.form != y.form:
        raise TypeError("operands of other axes")
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
    if constant.dim() > axes or constant.is_complex():
        raise TypeError("a constant of more axes")
    constant = constant.detach().float().reshape(*[1] * (axes - constant.dim()), *constant.shape)
    if any(side != 1 for side in constant.shape[:lead]):
        raise TypeError("a constant that differs from step to step, or from image to image")
    constant = constant[(0,) * lead]
    sizes = x.sizes(low.values[x.value])
    spread = torch.broadcast_shapes(constant.shape, sizes)
    if spread != sizes and x.form not in ("map", "row", "vector"):
        raise TypeError("a constant of more elements")
    channels, *places = (*spread, 1, 1)[:3]
    height, width = (1, places[0]) if x.form == "row" else places
    value = low.values[x.value]
    if spread != sizes:
        value = Value(height=height, width=width, channels=channels)
    maps = x.to_map(constant.expand(spread), value)
    for axis in range(3):  # kept once where it is the same along an axis
        if torch.equal(maps, maps.narrow(axis, 0, 1).expand_as(maps)):
            maps = maps.narrow(axis, 0, 1)
    return maps
