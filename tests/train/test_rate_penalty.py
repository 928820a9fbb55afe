"""The penalty on firing rates: its value, its gradient, and what it does to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import SMALL, Told, equal, run_of, weights

from spikeloom.errors import UsageError
from spikeloom.layers import Linear
from spikeloom.neurons import LIF, LeakyIntegrator
from spikeloom.record import RateMeter
from spikeloom.stream import Stream
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.losses import sdt
from spikeloom.train.rate_penalty import RatePenalty

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        Linear(5, 7), LIF(v_threshold=0.2), Linear(7, 4), LIF(v_threshold=0.1), LeakyIntegrator()
    )


@pytest.mark.parametrize("target", [None, 0.25])
def test_the_value(target: float | None) -> None:
    model, x, y = network(), torch.randn(3, 6, 5), torch.randint(4, (6,))
    with RateMeter(model) as meter, torch.no_grad():
        model(x)
    rates = list(meter.rates().values())
    assert len(rates) == 2  # a readout does not fire
    assert min(rates) > 0.05
    loss = RatePenalty(model, sdt, 0.3, target)
    with loss:
        logits = model(x)
        found = loss(logits, y)
    penalty = sum(rates) / 2 if target is None else sum((rate - target) ** 2 for rate in rates) / 2
    torch.testing.assert_close(found, sdt(logits, y) + 0.3 * penalty)
    assert loss.take() == pytest.approx(sum(rates) / 2)
    assert loss.take() == 0.0
    found.backward()
    first: Any = model[0]
    assert first.weight.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_is_that_of_the_mean_spikes() -> None:
    model, x, y = network(), torch.randn(3, 6, 5), torch.randint(4, (6,))
    loss = RatePenalty(model, lambda logits, y: logits.sum() * 0.0, 1.0, None)
    with loss:
        loss(model(x), y).backward()
    first: Any = model[0]
    got = first.weight.grad.clone()
    model.zero_grad()
    spikes = model[1](model[0](x))
    ((spikes.mean() + model[3](model[2](spikes)).mean()) / 2).backward()
    torch.testing.assert_close(got, first.weight.grad)


def test_a_network_without_neurons_that_fire() -> None:
    with pytest.raises(UsageError, match=r"train\.rate_penalty needs neurons that fire, and Sequential has none"):
        RatePenalty(torch.nn.Sequential(Linear(5, 4), LeakyIntegrator()), sdt, 1.0, None)


def test_one_step_at_a_time() -> None:
    model, x, y = network(), torch.randn(3, 6, 5), torch.randint(4, (6,))
    loss = RatePenalty(model, sdt, 1.0, None)
    means = []
    stream = Stream(model)
    with loss:
        for step in x.split(1):
            loss(stream(step), y)
            means.append(loss.take())
    with RateMeter(model) as meter, torch.no_grad():
        model(x)
    assert sum(means) / 3 == pytest.approx(sum(meter.rates().values()) / 2)


def test_fewer_spikes_in_a_run_that_resumes_to_the_same_weights(tmp_path: Path) -> None:
    settings = {"epochs": 2, "rate_penalty": {"weight": 20.0}}
    free, penalised = Told(), Told()
    train(run_of(tmp_path / "free", SMALL, train={"epochs": 2, "rate_penalty": {"weight": 1e-9}}), free)
    whole = run_of(tmp_path / "whole", SMALL, train=settings)
    train(whole, penalised)
    assert penalised.records[-1]["train_rate"] < 0.8 * free.records[-1]["train_rate"]
    parts = run_of(tmp_path / "parts", SMALL, train=settings)
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        train(parts, Told(), lambda: next(calls) == 5)
    train(parts, Told())
    assert equal(weights(parts), weights(whole))
    assert parts.metrics()[-1]["train_rate"] == penalised.records[-1]["train_rate"]
