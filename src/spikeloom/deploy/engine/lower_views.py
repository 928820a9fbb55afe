"""Lowering of operations that give the same numbers in other axes: handlers of `lower`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from spikeloom.deploy.engine.ir import Join
from spikeloom.deploy.engine.lower_state import Lowering, Product, Spikes
from spikeloom.deploy.engine.views import View, plain


def alias(low: Lowering, x: View | Product, *_: Any, **__: Any) -> View | Product:
    """Copies, and other orders of memory."""
    return x


def dropout(low: Lowering, x: View | Product, p: float, train: bool) -> View | Product:
    """Nothing, as in eval mode."""
    if train and p > 0:
        raise low.unsupported(f"random zeros, p={p}; dropout in eval mode is supported")
    return x


def to(low: Lowering, x: View | Product, *_: Any, **__: Any) -> View | Product:
    """The type that x has already."""
    dtype = low.node.meta["val"].dtype
    if dtype != torch.float32:
        raise low.unsupported(f"numbers of {dtype}; torch.float32 is supported")
    return x


def getitem(low: Lowering, x: Spikes, index: int) -> View | None:
    """The spikes, the first result of a scan."""
    if index == 0:
        return x.view
    if low.node.users:
        raise low.unsupported("the neurons' potentials; their spikes are supported")
    return None


# --- steps and images -------------------------------------------------------------------------------------------------


def expand(low: Lowering, x: View, size: Sequence[Any], *, implicit: bool = False) -> View:
    """A static image, T times."""
    return _repeated(low, x)


def repeat(low: Lowering, x: View, repeats: Sequence[Any]) -> View:
    """A static image, T times."""
    if any(count != 1 for count in repeats[1:]) or len(repeats) != x.rank + 2 or low.all_steps(x):
        raise low.unsupported(f"repetitions {list(repeats)}; those of a static image along a first axis are supported")
    return _repeated(low, x)


def stack(low: Lowering, tensors: Sequence[View], dim: int = 0) -> View:
    """A static image, T times."""
    if dim != 0 or len(set(tensors)) != 1 or low.lead(tensors[0], low.node.all_input_nodes[0]) != 1:
        raise low.unsupported("a stack of what is not one image; that of one static image along axis 0 is supported")
    return _repeated(low, tensors[0])


def cat(low: Lowering, tensors: Sequence[View], dim: int = 0) -> View:
    """Channels side by side, or a static image, T times."""
    first = tensors[0]
    if dim == 0 and len(set(tensors)) == 1:
        return _repeated(low, first)
    forms = [x.form for x in tensors]
    if dim != low.lead(first, low.node.all_input_nodes[0]) or len(set(forms)) != 1:
        raise low.unsupported(f"axis {dim} of {', '.join(forms)}; channels of values of the same axes are supported")
    return replace(first, value=low.emit(Join, op="cat", xs=tuple(x.value for x in tensors)).value)


def _repeated(low: Lowering, x: View) -> View:
    """A static image that stands T times one behind the other, in the node's output."""
    shape = low.node.meta["val"].shape
    if low.values[x.value].static and len(shape) == x.rank + 2 and low.length is None:
        low.length = plain(shape[0]) if isinstance(plain(shape[0]), int) else None
    return x


def select(low: Lowering, x: View, dim: int, index: Any) -> View:
    """The last step, or any of steps that are the same."""
    if dim == 0 and low.lead(x) == 2:
        if low.values[x.value].static:
            return x
        if (index == -1 or low.length == 1) and low.all_steps(x):
            return low.time("time_last", x)
    raise low.unsupported(f"a part of a sequence or a map, {index} of axis {dim}; the last of all steps is supported")


def slice(low: Lowering, x: View, *_: Any, **__: Any) -> View:
    """All that is there; of a part of it the axes do not fit."""
    return x


# --- axes of one step of one image ------------------------------------------------------------------------------------


def reshape(low: Lowering, x: View, *_: Any, **__: Any) -> View:
    """Other axes in the same order: channels before places, or tokens before channels."""
    shape, value = low.node.meta["val"].shape, low.values[x.value]
    first = ("map", "vector", "tokens", "flat", "heads", "row")
    for form in (x.form, *(("tokens.T", "tokens.heads") if x.form in ("tokens.T", "tokens.heads") else first)):
        axis = {"heads": -3, "tokens.heads": -2}.get(form, 0)
        heads = shape[axis] if len(shape) > -axis > 0 else 1
        if isinstance(heads, int) and value.channels % heads == 0:
            view = View(x.value, form, x.heads if form == x.form else heads)
            if low.fits(view, low.node):
                return view
    raise low.unsupported(f"these axes: {low.shown()} of a {x.form} {list(x.sizes(value))}")


def mT(low: Lowering, x: View) -> View:
    """The last two axes swapped."""
    return _swapped(low, x, {"tokens": "tokens.T", "tokens.T": "tokens", "heads": "heads.T", "heads.T": "heads"})


def transpose(low: Lowering, x: View, dim0: int, dim1: int) -> View:
    """Two axes of one step of one image swapped."""
    lead = low.lead(x)
    first, second = sorted(dim % (lead + x.rank) - lead for dim in (dim0, dim1))
    if (first, second) == (x.rank - 2, x.rank - 1):
        return mT(low, x)
    if (first, second) != (0, 1):
        raise low.unsupported(f"axes {dim0} and {dim1} of a {x.form}; neighbours behind steps and images are supported")
    return _swapped(low, x, {"tokens.heads": "heads.T", "heads.T": "tokens.heads"})


def _swapped(low: Lowering, x: View, forms: Mapping[str, str]) -> View:
    if x.form not in forms:
        raise low.unsupported(f"these axes of a {x.form}; those of {', '.join(forms)} are supported")
    return replace(x, form=forms[x.form])
