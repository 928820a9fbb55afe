"""The Mackey-Glass series, against the equation solved step by step."""

from __future__ import annotations

import pytest
import torch

from spikeloom.data import mackey_glass
from spikeloom.errors import UsageError


def step_by_step(points: int) -> list[float]:
    """Runge-Kutta of fourth order in steps of 1/75; values between grid points by Hermite's polynomials."""
    h, delay = 1 / 75, 1275
    values, slopes = [0.7206597], list[float]()

    def slope(x: float, late: float) -> float:
        return 0.2 * late / (1 + late**10) - 0.1 * x

    for i in range((points - 1) * 197):
        x, j = values[-1], i - delay
        first, last = (values[max(k, 0)] for k in (j, j + 1))
        middle = (first + last) / 2 + (h * (slopes[j] - slopes[j + 1]) / 8 if j >= 0 else 0.0)
        a = slope(x, first)
        b = slope(x + h / 2 * a, middle)
        c = slope(x + h / 2 * b, middle)
        slopes.append(a)
        values.append(x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, last)))
    return values[::197]


def test_it_solves_the_equation() -> None:
    series = mackey_glass(120)
    assert torch.allclose(series, torch.tensor(step_by_step(120), dtype=torch.float64), atol=1e-7, rtol=0)
    assert series[0] == 0.7206597


def test_longer_series_begin_alike() -> None:
    assert torch.equal(mackey_glass(700)[:5], mackey_glass(5))
    assert mackey_glass(1).shape == (1,)
    assert len(mackey_glass(1501)) == 1501
    late = mackey_glass(1501)[300:]
    assert 0.3 < late.min() < 0.5 < 1.3 < late.max() < 1.4


def test_no_points_are_an_error() -> None:
    with pytest.raises(UsageError, match="points"):
        mackey_glass(0)
