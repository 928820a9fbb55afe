"""Audits of averaged spikes: how many were pooled, counted by brute force, whatever the windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikeloom
from spikeloom.analyse import Layer, audit
from spikeloom.analyse.audit.value_types import merge_summaries, summarise

Map = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Spikes of a layer, what is between, and a layer that is linear in everything that enters it."""

    def __init__(self, between: Map, x: Tensor, head: nn.Module | None = None) -> None:
        super().__init__()
        self.between = between
        self.first = nn.Conv2d(x.shape[1], x.shape[1], 1, groups=x.shape[1], bias=False)
        nn.init.ones_(self.first.weight)
        with torch.no_grad():
            width = between(x[:1]).numel()
        self.head = nn.Linear(width, 3, bias=False) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        y = self.between((self.first(x) > 0.5).to(x.dtype))
        return self.head(y.flatten(1) if isinstance(self.head, nn.Linear) else y)


def spikes(*shape: int, rate: float = 0.3) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < rate).float()


def pooled(between: Map, x: Tensor) -> float:
    """Spikes in all windows: one by one each place of the input says to which outputs it contributes."""
    total, flat = 0.0, x.double().flatten(1)
    for place in range(flat.shape[1]):
        alone = torch.zeros(1, flat.shape[1], dtype=torch.float64)
        alone[0, place] = 1.0
        reached = between(alone.view(1, *x.shape[1:])) != 0
        total += float(flat[:, place].sum()) * int(reached.sum())
    return total


def behind(between: Map, x: Tensor, **options: Any) -> Layer:
    torch.manual_seed(0)
    return audit(Net(between, x, **options), [x]).rows[1]


def lines(pool: Map) -> Map:
    return lambda s: pool(s.flatten(2))


def volumes(pool: Map) -> Map:
    return lambda s: pool(s.unflatten(2, (3, 3)))


POOLS: dict[str, Map] = {
    "equal": nn.AvgPool2d(2),
    "padding counts": nn.AvgPool2d(3, 2, 1),
    "padding does not count": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "ceil_mode": nn.AvgPool2d(2, ceil_mode=True),
    "ceil_mode and padding": nn.AvgPool2d(4, 3, 1, ceil_mode=True),
    "ceil_mode without padding": nn.AvgPool2d((3, 2), (3, 2), (1, 0), ceil_mode=True, count_include_pad=False),
    "divisor": nn.AvgPool2d(3, 2, 1, count_include_pad=False, divisor_override=5),
    "adaptive": nn.AdaptiveAvgPool2d(5),
    "adaptive, equal": nn.AdaptiveAvgPool2d(4),
    "adaptive, wide": nn.AdaptiveAvgPool2d((7, 2)),
    "all": nn.AdaptiveAvgPool2d(1),
    "area": lambda s: F.interpolate(s, size=(5, 4), mode="area"),
    "one axis": lines(nn.AvgPool1d(4, 3, 2, count_include_pad=False)),
    "one axis, adaptive": lines(nn.AdaptiveAvgPool1d(10)),
    "three axes": volumes(nn.AvgPool3d(2, (2, 1, 2), 1, ceil_mode=True, count_include_pad=False)),
    "three axes, adaptive": volumes(nn.AdaptiveAvgPool3d((2, 4, 4))),
    "twice": nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(3)),
    "mean of unequal": lambda s: F.avg_pool2d(s, 2, ceil_mode=True).mean((2, 3)),
    "pyramid": lambda s: torch.cat([F.adaptive_avg_pool2d(s, n).flatten(1) for n in (1, 2, 4)], 1),
    "beside spikes": lambda s: torch.cat([s, F.avg_pool2d(s, 3, 1, 1)], 1),
    "padded": lambda s: F.pad(F.avg_pool2d(s, 2, ceil_mode=True), (1, 2, 0, 1)),
    "flipped": lambda s: F.avg_pool2d(s, 2, ceil_mode=True).flip(2).roll(1, 3)[:, :, [0, 3, 4]],
    "scaled": lambda s: -0.7 * F.avg_pool2d(s, 2, ceil_mode=True) / 3,
    "of scaled spikes": lambda s: F.avg_pool2d(s * 0.3, 2, ceil_mode=True),
    "views": lambda s: F.adaptive_avg_pool2d(s, 5).permute(0, 2, 3, 1)[:, 1:, ::2].transpose(1, 3),
    "channels last": lambda s: F.adaptive_avg_pool2d(s.contiguous(memory_format=torch.channels_last), 4),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_spikes_that_were_pooled(name: str, inference: bool) -> None:
    x = spikes(2, 2, 9, 9)
    with torch.inference_mode(inference):
        row = behind(POOLS[name], x)
    assert row.input == "scaled"
    assert row.acs == pytest.approx(pooled(POOLS[name], x) / 2 * 3, rel=1e-4)  # an image; each to three outputs
    assert not row.breaks  # a factor a place belongs to the classifier's weights
    assert row.rate == pytest.approx(POOLS[name](x).abs().mean().item(), rel=1e-5)


def written(s: Tensor) -> Tensor:
    """Poolings of different windows, written into one piece of memory."""
    out = s.new_zeros(len(s), 4, *s.shape[1:2])
    out[:, 0] = s.mean((2, 3))
    out[:, 1:3].copy_(F.adaptive_avg_pool2d(s, (1, 2)).flatten(2).transpose(1, 2))
    out[:, 3] = s[:, :, 0, 0]
    return out


def test_sums_and_memory_that_is_written_in_parts() -> None:
    x = spikes(2, 2, 9, 9)
    assert behind(written, x).acs == pytest.approx(pooled(written, x) / 2 * 3, rel=1e-4)

    def pool(s: Tensor) -> Tensor:
        return F.avg_pool2d(s, 3, 1, 1, count_include_pad=False)

    # A spike arrives once through the shortcut and once through each window that it lies in.
    expected = (x.sum().item() + pooled(pool, x)) / 2 * 3
    assert behind(lambda s: s + pool(s), x).acs == pytest.approx(expected, rel=1e-4)
    assert behind(lambda s: pool(s) + s, x).acs == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_between_layers(dtype: torch.dtype) -> None:
    x = spikes(3, 2, 9, 9).to(dtype)
    pool = nn.AdaptiveAvgPool2d(5)
    head = nn.Conv2d(2, 5, 1, bias=False)
    torch.manual_seed(0)
    row = audit(Net(pool, x.float(), head).to(dtype), [x]).rows[1]
    assert row.acs == pytest.approx(pooled(pool, x) / 3 * 5, rel=1e-4)
    assert row.breaks
    assert row.why == "average pooling in between"


def test_batches_and_a_layer_behind_several_windows() -> None:
    x = spikes(6, 2, 9, 9)

    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            s = (self.first(x) > 0.5).to(x.dtype)
            return torch.stack([self.head(F.adaptive_avg_pool2d(s, n)).mean((2, 3)) for n in (1, 5, 9)])

    model = Both(nn.AdaptiveAvgPool2d(5), x, nn.Conv2d(2, 5, 1, bias=False))
    whole, parts = audit(model, [x]).rows[1], audit(model, [x[:1], x[1:3], x[3:]]).rows[1]
    expected = sum(pooled(nn.AdaptiveAvgPool2d(n), x) for n in (1, 5, 9)) / 6 * 5
    assert whole.acs == pytest.approx(expected, rel=1e-4)
    assert parts.acs == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "between",
    [
        lambda s: F.adaptive_avg_pool2d(s * torch.linspace(0.1, 0.9, 9).sqrt(), 4),
        lambda s: F.max_pool2d(F.avg_pool2d(s, 2, ceil_mode=True), 2),
        lambda s: F.adaptive_avg_pool2d(s, 5).square(),
        lambda s: torch.view_as_complex(F.adaptive_avg_pool2d(s, (5, 2))).real.sqrt(),
    ],
)
def test_what_cannot_be_counted_is_real(between: Map) -> None:
    row = behind(between, spikes(2, 2, 9, 9))
    assert (row.input, row.acs, row.macs) == ("real", 0.0, row.operations)


def test_neurons_behind_unequal_windows_spike_again() -> None:
    x = spikes(2, 2, 9, 9)

    def between(s: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(s, 5)
        return F.avg_pool2d(spikeloom.neurons.IF(v_threshold=0.3)(y[None])[0], 2)

    def by_hand(s: Tensor) -> Tensor:
        return F.avg_pool2d((F.adaptive_avg_pool2d(s, 5) >= 0.3).float(), 2)

    for form in (between, by_hand):
        row = behind(form, x)
        assert row.input == "scaled"
        assert row.acs == pytest.approx(form(x).sum().item() * 4 / 2 * 3, rel=1e-4)


def test_merged_looks_of_known_windows() -> None:
    windows = torch.tensor([[4.0, 6.0, 9.0]])
    known = summarise(torch.tensor([[1.0, 2.0, 3.0]]) / windows, True, True, windows)
    whole = summarise(torch.tensor([[1.0, 0.0, 1.0]]), True, True)
    halves = summarise(torch.tensor([[0.5, 0.0, 1.5]]), True, True)
    real = summarise(torch.rand(1, 64), False, True)
    assert merge_summaries([known, whole, halves]).spikes == pytest.approx(6 + 2 + 4)
    found = merge_summaries([known, whole]).operand()
    assert (found.input, found.rate / found.scale) == ("scaled", pytest.approx(8 / 6))
    assert merge_summaries([replace(known, channels=None), real]).operand().input == "real"
