"""Steps without weights of convolutions as calls of kernels: the same ones that the runtime calls (native/runtime)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Affine, Attention, Flatten, Join, Map, Mean, PadChannels, Pool, Step, Time
from spikeloom.ops import _dispatch


class Bound(NamedTuple):
    """Calls that fill what a step makes, and what must live as long as they do."""

    calls: list[Callable[[], None]]
    kept: list[Tensor]


def bind_step(step: Step, xs: Sequence[Tensor], y: Tensor, tensors: Mapping[str, Tensor], threads: int) -> Bound:
    """The calls of a step.

    Args:
        step: not one with weights of a convolution, nor neurons.
        xs: what it reads, [T or 1, N, H, W, C].
        y: what it makes.
        tensors: constants of the plan.
        threads: of the kernels.
    """
    x = xs[0]
    if isinstance(step, Pool):
        if step.kernel == 1:
            chosen = x[:, :, :: step.stride, :: step.stride][:, :, : y.shape[2], : y.shape[3]]
            return _elements("copy", y, chosen, threads=threads)
        return Bound([_pool(step, x, y, threads)], [])
    if isinstance(step, Attention):
        return Bound([_attention(step, xs, y, threads)], [])
    if isinstance(step, Join):
        if step.op != "cat":
            names = {"add": "add", "mul": "mul", "or": "largest"}
            return _elements(names[step.op], y, *xs, threads=threads)
        parts = y.split([part.shape[-1] for part in xs], -1)
        bound = [_elements("copy", to, part, threads=threads) for to, part in zip(parts, xs, strict=True)]
        return Bound([call for one in bound for call in one.calls], [kept for one in bound for kept in one.kept])
    if isinstance(step, PadChannels):  # y is zero already
        return _elements("copy", y[..., step.before : step.before + x.shape[-1]], x, threads=threads)
    if isinstance(step, Flatten):
        return _elements("copy", y, x.flatten(2).view_as(y), threads=threads)
    if isinstance(step, Map):
        return _elements(step.op, y, x, low=step.low, high=step.high, threads=threads)
    if isinstance(step, Affine):
        weight, bias = (None if name is None else tensors[name] for name in (step.weight, step.bias))
        given = [constant for constant in (weight, bias) if constant is not None]
        name = "divide" if step.op == "divide" else ("copy", "mul" if bias is None else "add", "affine")[len(given)]
        return _elements(name, y, x, *given, threads=threads)
    if isinstance(step, Time) and step.op == "time_last":
        return _elements("copy", y, x[-1:], threads=threads)
    assert isinstance(step, Time | Mean)
    T, N, *places, C = x.shape
    axes = (1, T, x[0].numel()) if isinstance(step, Time) else (T * N, places[0] * places[1], C)
    return Bound([_reduce(x, y, axes, step.op != "time_sum", threads)], [])


def _elements(
    element: str, y: Tensor, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, *, threads: int, **more: float
) -> Bound:
    sizes = torch.tensor(y.shape, dtype=torch.int64)
    strides = torch.zeros(4, y.dim(), dtype=torch.int64)
    for row, operand in enumerate((y, a, b, c)):
        if operand is not None:
            strides[row] = torch.tensor(operand.expand(y.shape).stride())
    pointers = (0 if operand is None else operand.data_ptr() for operand in (y, a, b, c))
    fields = {
        "element": _dispatch.enum_number("Element", element),
        "sizes": sizes.data_ptr(),
        "strides": strides.data_ptr(),
        **dict(zip("yabc", pointers, strict=True)),
        "y_bytes": y.dtype == torch.uint8,
        "a_bytes": a.dtype == torch.uint8,
        "b_bytes": b is not None and b.dtype == torch.uint8,
        "low": more.get("low", 0.0),
        "high": more.get("high", 0.0),
        "threads": threads,
    }
    return Bound([_dispatch.native.bound_engine_elements(fields, [])], [sizes, strides])


def input_fields(x: Tensor) -> dict[str, int]:
    """The kernels' fields of an input, which is bytes or float32."""
    spikes = x.dtype == torch.uint8
    return {"x": 0 if spikes else x.data_ptr(), "x_bytes": x.data_ptr() if spikes else 0}


def _reduce(x: Tensor, y: Tensor, axes: tuple[int, int, int], mean: bool, threads: int) -> Callable[[], None]:
    outer, count, inner = axes
    fields = {"outer": outer, "count": count, "inner": inner, "mean": mean, "y": y.data_ptr(), "threads": threads}
    return _dispatch.native.bound_engine_reduce(fields | input_fields(x), [])


def _pool(step: Pool, x: Tensor, y: Tensor, threads: int) -> Callable[[], None]:
    fields: dict[str, Any] = {
        "images": x.shape[0] * x.shape[1],
        "height": x.shape[2],
        "width": x.shape[3],
        "channels": x.shape[4],
        "kernel": step.kernel,
        "stride": step.stride,
        "padding": step.padding,
        "y": y.data_ptr(),
        "threads": threads,
    }
    if y.dtype == torch.uint8:
        return _dispatch.native.bound_engine_max_pool(fields | {"x": x.data_ptr()}, [])
    mean = step.op == "avg_pool"
    fields |= {"out_height": y.shape[2], "out_width": y.shape[3], "mean": mean, "count_padding": step.count_padding}
    return _dispatch.native.bound_engine_windows(fields | input_fields(x), [])


def _attention(step: Attention, xs: Sequence[Tensor], y: Tensor, threads: int) -> Callable[[], None]:
    q, k, v = xs
    fields = {
        "maps": q.shape[0] * q.shape[1],
        "tokens": q.shape[2] * q.shape[3],
        "channels": q.shape[4],
        "heads": step.heads,
        "scale": step.scale,
        "q": q.data_ptr(),
        "k": k.data_ptr(),
        "v": v.data_ptr(),
        "y": y.data_ptr(),
        "threads": threads,
    }
    return _dispatch.native.bound_engine_attention(fields, [])
