"""Weights of classes, clipped gradients, and runs that end when they stop getting better."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.small_runs import SMALL, Told, equal, resolved, run_of, weights

from spikeloom.errors import UsageError
from spikeloom.train.build import build_model
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.losses import LOSSES, class_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["sdt", "tet", "mse_onehot"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_weight_of_two_is_a_second_copy(name: str, mixed: bool) -> None:
    loss, logits, y = LOSSES[name], torch.randn(3, 7, 4), torch.tensor([0, 1, 2, 3, 1, 0, 2])
    again = torch.cat([torch.arange(7), (y == 1).nonzero().flatten()])
    target: Any = torch.nn.functional.one_hot(y, 4).float() if mixed else y
    weighted = loss(logits, target, class_weights=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    # PyTorch divides by the sum of weights for labels alone, by the number of samples for shares of classes.
    by = 9 / 7 if mixed and name != "mse_onehot" else 1.0
    torch.testing.assert_close(weighted, loss(logits[:, again], target[again]) * by)
    torch.testing.assert_close(loss(logits, target, class_weights=torch.ones(4)), loss(logits, target))


def test_balanced_classes_weigh_the_same() -> None:
    part: Any = SimpleNamespace(labels=torch.tensor([0, 0, 0, 1, 2, 2]), classes=["a", "b", "c"], title="it")
    t = resolved(SMALL, train={"class_weights": "balanced"}).train
    found = class_weights(t, part)
    assert found is not None
    torch.testing.assert_close(found * torch.tensor([3.0, 1.0, 2.0]), torch.full((3,), 2.0))
    assert class_weights(resolved(SMALL).train, part) is None
    given = class_weights(resolved(SMALL, train={"class_weights": [1.0, 2.0, 0.5]}).train, part)
    assert given is not None
    assert given.tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": [1.0, 2.0]}, r"train\.class_weights must be 3 numbers above 0, one for each class of it"),
        ({"class_weights": [1.0, 2.0, 0.0]}, "must be 3 numbers above 0"),
        ({"class_weights": "balanced"}, "it has no sample of class 'c'"),
        (
            {"class_weights": "balanced", "loss": "reconstruction"},
            "the loss reconstruction takes no weights of classes",
        ),
    ],
)
def test_weights_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    part: Any = SimpleNamespace(labels=torch.tensor([0, 1]), classes=["a", "b", "c"], title="it")
    with pytest.raises(UsageError, match=message):
        class_weights(resolved(SMALL, train=changes).train, part)


def test_weights_change_training_and_not_the_loss_of_the_test_part(tmp_path: Path) -> None:
    told = Told(), Told()
    tiny = {"lr": 1e-12, "class_weights": [5.0] + [1.0] * 9}
    train(run_of(tmp_path / "weighted", SMALL, train=tiny), told[0])
    train(run_of(tmp_path / "plain", SMALL, train={"lr": 1e-12}), told[1])
    weighted, plain = (each.records[0] for each in told)
    assert weighted["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-4)
    assert weighted["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-6)


def test_a_clipped_step_is_as_long_as_the_norm(tmp_path: Path) -> None:
    one_step = {"batch_size": 64, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "clip_grad": 1e-3}
    run = run_of(tmp_path / "run", SMALL, train=one_step)
    train(run, Told())
    before = build_model(run.settings, 1, 10).state_dict()
    moved = torch.cat([(value - before[name]).flatten() for name, value in weights(run).items()])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


# One of 8 validation images more or fewer is 12.5 %: with such a rate nothing gets better.
STUCK: dict[str, Any] = {
    "data": {**SMALL["data"], "subset": 300, "validation": 0.2},
    "train": {"epochs": 9, "lr": 1e-12, "patience": 2},
}


def test_a_run_ends_when_it_has_no_patience_left(tmp_path: Path) -> None:
    told = Told()
    run = run_of(tmp_path / "run", SMALL, **STUCK)
    summary = train(run, told)
    assert len(told.records) == summary["epochs"] == 3  # the first is the best
    assert told.notes[-1] == "ended after epoch 3 of 9: 2 epochs without a better one"
    patient = run_of(tmp_path / "patient", SMALL, **{**STUCK, "train": {**STUCK["train"], "patience": 20}})
    assert train(patient, Told())["epochs"] == 9


def test_patience_is_resumed(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", SMALL, **STUCK)
    train(whole, Told())
    parts = run_of(tmp_path / "parts", SMALL, **STUCK)
    per_epoch = 240 // 16
    for stop_after in (per_epoch + 3, per_epoch):
        calls = iter(range(1, 100))
        with pytest.raises(Interrupted):
            train(parts, Told(), lambda calls=calls, n=stop_after: next(calls) == n)
    assert train(parts, Told())["epochs"] == 3
    assert equal(weights(parts), weights(whole))


def test_patience_needs_something_to_watch() -> None:
    with pytest.raises(UsageError, match=r"train\.patience needs a validation part to watch: give data\.validation"):
        resolved(SMALL, train={"patience": 3})
