"""What is in a tensor: spikes, integers, a scaled version of them, or real values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from spikeloom.analyse.audit.layer import Input, Operand

_LEVELS = 4096  # more multiples of a common factor than this are real values
_PARTS = 64  # of the smallest value, which may be the sum of that many pooled spikes
_TOLERANCE = 0.01  # how far from a multiple a value may be, in factors
_CHUNK = 1 << 16  # elements of a pass that stay in the cache
_SAMPLE = 1 << 14
SILENT, REAL, MIXED = 0.0, math.nan, math.inf  # in place of a scale


@dataclass
class TensorSummary:
    """What one tensor, or several, held.

    Attributes:
        elements: how many.
        minimum, maximum: of all.
        scale: the factor of which every value is a multiple: 1 for integers; SILENT without values; REAL without one;
            MIXED where each value has its own, the mean of a window of spikes.
        total, magnitude, nonzero: sums of the values and of their absolute values, and how many are not 0.
        rows: mean absolute value in each index of the first axis.
        channels: how many are not 0 in each channel; None without channels.
        spikes: how many spikes were averaged, where windows differ in size; None elsewhere.
    """

    elements: int
    minimum: float
    maximum: float
    scale: float
    total: float
    magnitude: float
    nonzero: float
    rows: Tensor
    channels: Tensor | None
    spikes: float | None = None

    def operand(self) -> Operand:
        """The summary that a layer carries."""
        kind, scale = self._kind(), self.scale if self.scale > 0 else 1.0
        if self.scale == MIXED:
            scale = self.magnitude / (self.spikes or 1.0)
        density = self.nonzero / self.elements
        rate = density if kind == "real" else self.magnitude / self.elements
        return Operand(kind, scale, self.minimum, self.maximum, self.total / self.elements, rate, density)

    def _kind(self) -> Input:
        if self.scale == SILENT:
            return "silent"
        if self.scale != 1.0:
            return "real" if math.isnan(self.scale) else "scaled"
        if self.minimum < -1 or self.maximum > 1:
            return "integer"
        return "binary" if self.minimum >= 0 else "ternary"


def merge_summaries(summaries: Iterable[TensorSummary]) -> TensorSummary:
    """Several summaries of one place as one, without their rows."""
    summaries = list(summaries)
    spikes = None
    if all(o.spikes is None for o in summaries):
        scale = functools.reduce(_merge_scales, (o.scale for o in summaries))
    else:
        scale, spikes = _merge_spikes(summaries)
    low, high = min(o.minimum for o in summaries), max(o.maximum for o in summaries)
    if scale > 0 and max(-low, high) / scale > _LEVELS:
        scale = REAL
    channels = [o.channels for o in summaries if o.channels is not None]
    return TensorSummary(
        sum(o.elements for o in summaries),
        low,
        high,
        scale,
        sum(o.total for o in summaries),
        sum(o.magnitude for o in summaries),
        sum(o.nonzero for o in summaries),
        torch.empty(0),
        torch.stack(channels).sum(0) if channels else None,
        spikes,
    )


def _merge_spikes(summaries: list[TensorSummary]) -> tuple[float, float]:
    scales = {o.scale for o in summaries}
    scale = REAL if any(map(math.isnan, scales)) else 1.0 if scales <= {SILENT, 1.0} else MIXED
    return scale, sum(o.magnitude / (o.scale or 1.0) if o.spikes is None else o.spikes for o in summaries)


def _merge_scales(a: float, b: float) -> float:
    if SILENT in (a, b):
        return a + b
    if math.isnan(a + b):
        return REAL
    return a if a == b else _common_factor(torch.tensor([a, b], dtype=torch.float64))


def summarise(x: Tensor, channels: bool, may_scale: bool, windows: Tensor | None = None) -> TensorSummary:
    """Summarises every element of a tensor, in about four passes that are read from the cache.

    Args:
        x: of at least two axes, not empty. With `channels`, axis 1 holds them.
        channels: count what is not 0 in each channel.
        may_scale: look for a common factor of values that are no integers.
        windows: of x's shape, over how many spikes each value is a mean, where that differs.
    """
    x = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    flat = _flat(x)
    low, high = (value.item() for value in torch.aminmax(flat))
    if low == high == 0:
        silent = x.new_zeros(x.shape[1]) if channels else None
        return TensorSummary(x.numel(), 0.0, 0.0, SILENT, 0.0, 0.0, 0.0, x.new_zeros(len(x)), silent)
    scale = _scale(flat, low, high, may_scale and windows is None)
    spikes = _spikes(x * windows) if may_scale and windows is not None else None
    if spikes is not None and math.isnan(scale):
        scale = MIXED
    per_row, per_channel = _sums(x)
    total = magnitude = per_row.sum(dtype=torch.float64).item()
    if low < 0:
        per_row, _ = _sums(x, torch.abs)
        magnitude = per_row.sum(dtype=torch.float64).item()
    if not (scale == 1.0 and low >= 0 and high <= 1):  # of spikes the sums are the counts
        _, per_channel = _sums(x, torch.sign if low >= 0 else _nonzero)
    return TensorSummary(
        x.numel(),
        low,
        high,
        scale,
        total,
        magnitude,
        per_channel.sum(dtype=torch.float64).item(),
        per_row / (x.numel() // len(x)),
        per_channel if channels else None,
        spikes,
    )


def _spikes(sums: Tensor) -> float | None:
    """How many spikes these sums count, of spikes or of spikes times a factor; None if of neither."""
    flat = sums.flatten()
    low, high = (value.item() for value in torch.aminmax(flat))
    whole = math.isfinite(low + high) and _multiples(flat, 1.0, _TOLERANCE)
    scale = 1.0 if whole else _scale(flat, low, high, True)
    return None if math.isnan(scale) else flat.abs().sum(dtype=torch.float64).item() / scale


def _nonzero(x: Tensor) -> Tensor:
    return torch.sign(x).abs_()


def _flat(x: Tensor) -> Tensor:
    """All elements on one axis, in the order in which they lie: a view, unless x has holes."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)


def _sums(x: Tensor, of: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Sums, of a function of x, over all axes but the first, and over all but the second."""
    parts: list[tuple[Tensor, Tensor]] = []
    for part in x.split(max(1, _CHUNK * len(x) // x.numel())):
        values = part if of is None else of(part)
        if x.dim() > 2:
            values = values.sum(tuple(range(2, x.dim())))
        parts.append((values.sum(1), values.sum(0)))
    if len(parts) == 1:
        return parts[0]
    rows, channels = zip(*parts, strict=True)
    return torch.cat(rows), torch.stack(channels).sum(0)


def _scale(flat: Tensor, low: float, high: float, may_scale: bool) -> float:
    if not math.isfinite(low) or not math.isfinite(high):
        return REAL
    # A few elements tell most real tensors; what they do not tell, all elements do.
    sample = flat[:: max(1, flat.numel() // _SAMPLE) | 1]
    if _multiples(sample, 1.0, 0.0) and (len(sample) == len(flat) or _multiples(flat, 1.0, 0.0)):
        return 1.0
    if not may_scale:
        return REAL
    factor = _common_factor(torch.cat([sample, flat.new_tensor([low, high])]))
    return factor if not math.isnan(factor) and _multiples(flat, factor, _TOLERANCE) else REAL


def _multiples(flat: Tensor, factor: float, tolerance: float) -> bool:
    """Whether every element is a multiple of a factor, up to a share of it."""
    buffer = flat.new_empty(min(_CHUNK, flat.numel()))
    for chunk in flat.split(_CHUNK):
        rest = buffer[: len(chunk)]
        if tolerance == 0:
            torch.frac(chunk, out=rest)
        else:
            levels = chunk / factor
            torch.sub(levels, levels.round(), out=rest)
        low, high = torch.aminmax(rest)
        if max(-low.item(), high.item()) > tolerance:
            return False
    return True


def _common_factor(values: Tensor) -> float:
    """The largest number of which all values are multiples, if it is among the smallest one's first `_PARTS` parts."""
    values = values.abs()
    values = values[values > 0]
    smallest, largest = values.min(), values.max()
    levels = torch.round(largest * torch.arange(1, _PARTS + 1) / smallest)
    factors = (largest / levels)[levels <= _LEVELS]
    # A few values rule out most factors at once.
    counts = values[:: max(1, len(values) // 64)] / factors[:, None]
    possible = (counts - counts.round()).abs().amax(1) <= _TOLERANCE
    for factor in factors[possible].tolist():
        if _multiples(values, factor, _TOLERANCE):
            return factor
    return REAL
