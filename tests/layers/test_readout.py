"""Readouts behind the last layer, by hand."""

from __future__ import annotations

import pytest
import torch

from spikeloom.layers import MaxOverSteps, PopulationSum
from spikeloom.train.losses import sdt


def test_a_population_is_added_up() -> None:
    x = torch.tensor([[[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]]])
    assert PopulationSum(3)(x).tolist() == [[[1.0, 2.0, 0.0]]]
    assert PopulationSum(2)(x).tolist() == [[[2.0, 1.0]]]
    with pytest.raises(ValueError, match="6 outputs do not divide among 4 classes"):
        PopulationSum(4)(x)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        PopulationSum(0)


def test_the_maximum_over_time() -> None:
    x = torch.tensor([[[1.0, 5.0]], [[3.0, -1.0]]], requires_grad=True)
    y = MaxOverSteps()(x)
    assert y.tolist() == [[[3.0, 5.0]]]
    sdt(y, torch.tensor([0])).backward()  # cross-entropy of the maxima: only they receive a gradient
    assert x.grad is not None
    assert (x.grad != 0).tolist() == [[[False, True]], [[True, False]]]
