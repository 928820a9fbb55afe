"""From data to sequences [T, N, ...]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Frames(int):
    """T of a network for sequences: the frames into which its paper cuts a recording.

    A plain T says that a still image is repeated so many times. This one does not: of [8, C, H, W] nobody knows
    whether it is eight images or one recording of eight frames.
    """


# What makes a tensor of something else, by the name of its type.
_CONVERSIONS = {
    "ndarray": ": use torch.from_numpy(x).float()",
    "Image": ": use torchvision.transforms.functional.to_tensor(x)[None]",
    "list": ": use torch.stack(x) for tensors, torch.tensor(x) for numbers",
    "tuple": ": use torch.stack(x) for tensors, torch.tensor(x) for numbers",
}


def floating(x: Any, owner: object = None) -> Tensor:
    """x as layers and neurons take it: integers (counts of events) and booleans become the default float type.

    Args:
        x: a real tensor.
        owner: what takes x, for the message.

    Raises:
        TypeError: x is no tensor, or complex.
    """
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    taker = "a network" if owner is None else type(owner).__name__
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise TypeError(f"{taker} takes a tensor, got {kind}{_CONVERSIONS.get(kind, '')}")
    if x.is_complex():
        raise TypeError(f"{taker} takes real numbers, got {x.dtype}: split x into x.real and x.imag")
    return x.to(torch.get_default_dtype())


def network_input(x: Any) -> Tensor:
    """x as networks take it: as `floating`, but bytes are refused.

    Pictures of 0 to 255 are not what a network was trained on.

    Raises:
        TypeError: x is no tensor, or complex.
        ValueError: bytes.
    """
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        raise ValueError(
            "a network takes floating-point numbers, got uint8: use x.float() for counts of events, and for images "
            "x.float() / 255, normalised as in training"
        )
    return floating(x)


def repeat(x: Tensor, T: int) -> Tensor:
    """The same input at every step ("direct encoding"): [N, ...] -> [T, N, ...], sharing memory.

    Layers without memory recognise the repetition and compute it once.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    return x.expand(T, *x.shape)


def as_sequence(x: Tensor, T: int, dims: int) -> Tensor:
    """A batch as a sequence: x with `dims` axes is repeated T times, x with one more axis is taken as it is.

    Integers and booleans become numbers, and bytes are refused (`network_input`).

    Raises:
        TypeError: x is no real tensor.
        ValueError: any other number of axes, bytes, or a batch of images where T is `Frames`.
    """
    x = network_input(x)
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


def poisson(x: Tensor, T: int, generator: torch.Generator | None = None) -> Tensor:
    """Rate code: at each of T steps a spike with probability x.

    Args:
        x: probabilities [N, ...], from 0 to 1.
        T: steps.
        generator: of the random numbers; None for PyTorch's own.

    Returns:
        Spikes [T, N, ...] of x's type.

    Raises:
        ValueError: x is not within 0 and 1.
    """
    _check_unit("poisson", x)
    return torch.bernoulli(repeat(x, T), generator=generator)


def latency(x: Tensor, T: int) -> Tensor:
    """Time-to-first-spike code: one spike, at step `round((T - 1) (1 - x))`; the largest values fire first.

    Args:
        x: intensities [N, ...], from 0 to 1.
        T: steps.

    Returns:
        Spikes [T, N, ...] of x's type.

    Raises:
        ValueError: x is not within 0 and 1.
    """
    _check_unit("latency", x)
    first = ((T - 1) * (1 - x)).round()
    steps = torch.arange(T, device=x.device).view(-1, *(1,) * x.dim())
    return (steps == first).to(x.dtype)


def delta(x: Tensor, threshold: float, off_spikes: bool = False) -> Tensor:
    """Delta modulation: a spike where a signal has risen by at least a threshold since the step before.

    Args:
        x: signals [T, N, ...]; before the first step they are 0.
        threshold: above 0, in the unit of x.
        off_spikes: also -1 where it has fallen by as much.

    Returns:
        Spikes [T, N, ...] of x's type.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    change = x.diff(dim=0, prepend=torch.zeros_like(x[:1]))
    rises = (change >= threshold).to(x.dtype)
    return rises - (change <= -threshold).to(x.dtype) if off_spikes else rises


def _check_unit(code: str, x: Tensor) -> None:
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"{code} takes numbers from 0 to 1, got {_range(x)}: scale x first, as in x / 255")


def _range(x: Tensor) -> str:
    return f"{x.dtype} from {x.min().item():.4g} to {x.max().item():.4g}"
