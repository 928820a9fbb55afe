"""From data to sequences [T, N, ...]."""

from __future__ import annotations

import torch
from torch import Tensor


class Frames(int):
    """T of a network for sequences: the frames into which its paper cuts a recording.

    A plain T says that a still image is repeated so many times. This one does not: of [8, C, H, W] nobody knows
    whether it is eight images or one recording of eight frames.
    """


def repeat(x: Tensor, T: int) -> Tensor:
    """The same input at every step ("direct encoding"): [N, ...] -> [T, N, ...], sharing memory.

    Layers without memory recognise the repetition and compute it once.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    return x.expand(T, *x.shape)


def as_sequence(x: Tensor, T: int, dims: int) -> Tensor:
    """A batch as a sequence: x with `dims` axes is repeated T times, x with one more axis is taken as it is.

    Integers and booleans, which counts of events are, become numbers of the default type.

    Raises:
        TypeError: x is no tensor.
        ValueError: any other number of axes, bytes, or a batch of images where T is `Frames`.
    """
    x = floating(x)
    if x.dim() == dims + 1:
        return x
    maps = {2: "features", 3: "C, L", 4: "C, H, W"}.get(dims, "...")
    if x.dim() != dims:
        raise ValueError(
            f"expected a batch of {dims} axes or a sequence of {dims + 1}, got shape {tuple(x.shape)}: give "
            f"[N, {maps}] or [T, N, {maps}], one input alone as x[None]"
        )
    if not isinstance(T, Frames):
        return repeat(x, T)
    raise ValueError(
        f"this network takes sequences [T, N, {maps}], got shape {tuple(x.shape)}: give one recording as "
        "x[:, None]; to show it images T times each, make it with create_model(..., T=...)"
    )


def floating(x: object) -> Tensor:
    """x as floating-point numbers.

    Raises:
        TypeError: x is no tensor.
        ValueError: x holds bytes or complex numbers.
    """
    if not isinstance(x, Tensor):
        kind = type(x)
        remedy = {"numpy": "torch.from_numpy(x).float()", "PIL": "torchvision.transforms.functional.to_tensor(x)[None]"}
        fix = remedy.get(kind.__module__.partition(".")[0], "torch.stack(...)" if isinstance(x, list | tuple) else "")
        raise TypeError(f"expected a tensor of floating-point numbers, got {kind.__name__}" + (fix and f": use {fix}"))
    if x.is_floating_point():
        return x
    if x.dtype == torch.uint8:
        raise ValueError(
            "expected floating-point numbers, got uint8: use x.float() for counts of events, and for images "
            "x.float() / 255, normalised as in training"
        )
    if x.is_complex():
        raise ValueError(f"expected floating-point numbers, got {x.dtype}")
    return x.to(torch.get_default_dtype())
