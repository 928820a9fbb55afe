"""From data to sequences [T, N, ...]."""

from __future__ import annotations

from torch import Tensor


def repeat(x: Tensor, T: int) -> Tensor:
    """The same input at every step ("direct encoding"): [N, ...] -> [T, N, ...], sharing memory.

    Layers without memory recognise the repetition and compute it once.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    return x.expand(T, *x.shape)


def as_sequence(x: Tensor, T: int, dims: int) -> Tensor:
    """A batch as a sequence: x with `dims` axes is repeated T times, x with one more axis is taken as it is.

    Raises:
        ValueError: any other number of axes.
    """
    if x.dim() == dims:
        return repeat(x, T)
    if x.dim() == dims + 1:
        return x
    raise ValueError(f"expected a batch of {dims} axes or a sequence of {dims + 1}, got shape {tuple(x.shape)}")
