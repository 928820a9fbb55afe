"""Forecasts of a chaotic series by a spiking network, and their error."""

from __future__ import annotations

import pytest
import torch

from spikeloom.analyse.papers.forecast import Forecaster, mackey_glass_forecast, smape
from spikeloom.data import mackey_glass


def test_smape_is_neurobenchs() -> None:
    workload = pytest.importorskip("neurobench.metrics.workload", reason="needs neurobench")
    torch.manual_seed(0)
    prediction, target = torch.rand(50, 1), torch.rand(50, 1)
    assert smape(prediction, target) == pytest.approx(workload.SMAPE()(None, prediction, (None, target)), rel=1e-6)
    assert smape(target, target) == 0
    assert smape(-target, target) == pytest.approx(200)


def test_it_learns_the_next_value() -> None:
    torch.manual_seed(0)
    series = mackey_glass(751).float()
    model = Forecaster(series[:750], width=32, T=4)
    x, y = series[:-1].unfold(0, 50, 1), series[50:]

    def error() -> float:
        with torch.no_grad():
            return smape(model(x), y)

    before = error()
    model.learn(series[:750], 60, 1e-2)
    assert error() < before / 2
    assert error() < smape(x[:, -1], y) / 2, "no better than the last value again"


def test_a_forecast_goes_on_from_its_own_values() -> None:
    torch.manual_seed(0)
    series = mackey_glass(100).float()
    model = Forecaster(series, width=8, T=2)
    three = model.continued(series, 3)
    second = model.continued(torch.cat((series, three[:1])), 1)
    assert three.shape == (3,)
    assert three[1] == pytest.approx(second[0].item(), rel=1e-6)


def test_figures_are_of_one_prediction() -> None:
    torch.manual_seed(0)
    values = mackey_glass_forecast(series=2, epochs=1, width=8, T=2).values
    assert values["effective MACs"] == pytest.approx(50 * 8, rel=0.01)
    assert 0 <= values["effective ACs"] <= 2 * (8 * 8 + 8)
    assert 0 < values["sMAPE of a constant, the mean"] < values["sMAPE"] * 10
    assert values["footprint"] == 4 * (50 * 8 + 8 + 8 * 8 + 8 + 8 + 1)
