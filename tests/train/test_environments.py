"""Environments: their shares of a batch, penalties by hand, and the epoch that is reported."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_files import idx_bytes
from helpers.timeless import timeless
from torch import Tensor, nn

from spikeloom import cli
from spikeloom.cli.progress import Quiet
from spikeloom.errors import UsageError
from spikeloom.layers import Flatten, Linear
from spikeloom.models import create_model
from spikeloom.neurons import LIF
from spikeloom.reproduce import reproduce
from spikeloom.train.build import epoch_order
from spikeloom.train.environments import PENALTIES, Penalised, Share, environment_order, select_epoch
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.losses import irm, sdt, spike_similarity
from spikeloom.train.recipe import check_settings, load_recipe
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


# --- penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_irm_is_the_gradient_of_a_scale(classes: int) -> None:
    logits = torch.randn(3, 8, classes, dtype=torch.float64)
    y = torch.randint(classes, (8,))

    def slope(z: Tensor, labels: Tensor) -> Tensor:
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(torch.nn.functional.cross_entropy(w * z.mean(0), labels), w)[0]

    torch.testing.assert_close(irm(logits, y, "square"), slope(logits, y) ** 2)
    halves = slope(logits[:, ::2], y[::2]) * slope(logits[:, 1::2], y[1::2])
    torch.testing.assert_close(irm(logits, y, "halves"), halves)
    assert torch.equal(irm(logits, y), irm(logits, y, "halves"))


def test_irm_of_a_logistic_model() -> None:
    z, y = torch.randn(9, dtype=torch.float64), torch.randint(2, (9,))
    logits = torch.stack([torch.zeros_like(z), z], 1)[None]
    torch.testing.assert_close(irm(logits, y, "square"), (((z.sigmoid() - y) * z).mean()) ** 2)
    for estimator in ("square", "halves"):
        assert irm(torch.zeros(4, 9, 2), y, estimator).item() == 0  # the constant-zero classifier
    with pytest.raises(UsageError, match=r"at least 2 samples.*raise train.batch_size"):
        irm(logits[:, :1], y[:1])


def test_halves_are_unbiased_and_the_square_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    batches, size = 40_000, 8
    x = torch.randn(batches, size, dtype=torch.float64, generator=generator)
    y = (torch.rand(batches, size, dtype=torch.float64, generator=generator) < (1.5 * x).sigmoid()).long()
    z = 0.7 * x
    slopes = (z.sigmoid() - y) * z
    population = slopes.mean().item() ** 2
    logits = torch.stack([torch.zeros_like(z), z], -1)
    found = {
        estimator: torch.stack([irm(logits[i][None], y[i], estimator) for i in range(4000)])
        for estimator in ("halves", "square")
    }
    error = found["halves"].std().item() / math.sqrt(4000)
    assert abs(found["halves"].mean().item() - population) < 4 * error
    assert found["square"].mean().item() - population > 10 * error


def test_similarity() -> None:
    torch.manual_seed(2)
    a, b = ((torch.rand(4, 6, 10) < 0.3).double().requires_grad_() for _ in range(2))
    for axis in ("sample", "batch"):
        assert 0 <= spike_similarity(a, b, axis).item() <= 1
    by_hand = [
        sum((a[:, n] * b[:, n]).flatten()) / (a[:, n].norm() * b[:, n].norm()) for n in range(6)
    ]  # all steps and features of sample n
    torch.testing.assert_close(spike_similarity(a, b), torch.stack(by_hand).mean())
    per_feature = torch.nn.functional.cosine_similarity(a, b, dim=1)
    torch.testing.assert_close(spike_similarity(a, b, "batch"), per_feature.mean())
    torch.testing.assert_close(spike_similarity(a, a), torch.ones((), dtype=torch.float64))
    assert spike_similarity(a, 1 - a.detach()).item() == 0


def test_silence_is_similar_to_nothing_and_has_no_gradient() -> None:
    a, b = torch.zeros(4, 6, 10), (torch.rand(4, 6, 10) < 0.3).float()
    a[:, 1] = b[:, 1]
    a.requires_grad_()
    for axis in ("sample", "batch"):
        value = spike_similarity(a, b, axis)
        value.backward()
        assert value.isfinite()
        assert a.grad is not None
        assert a.grad.isfinite().all()
        assert a.grad.abs().max() <= 1
    assert spike_similarity(a, b).item() == pytest.approx(1 / 6)
    assert spike_similarity(torch.zeros(4, 6, 10), torch.zeros(4, 6, 10)).item() == 0


def shares() -> list[Share]:
    torch.manual_seed(3)
    return [
        Share(
            torch.randn(4, 6, 2), torch.randint(2, (6,)), [(torch.rand(4, 6, width) < 0.4).float() for width in (9, 5)]
        )
        for _ in range(2)
    ]


def test_registered_penalties() -> None:
    both = shares()
    assert {"irm", "spike_similarity"} == set(PENALTIES)
    torch.testing.assert_close(PENALTIES["irm"](both), (irm(*both[0][:2]) + irm(*both[1][:2])) / 2)
    for tap, index in (("before_linears", 0), ("before_last_linear", 1)):
        expected = 1 - spike_similarity(both[0].taps[index], both[1].taps[index])
        torch.testing.assert_close(PENALTIES["spike_similarity"](both, tap=tap), expected)
    orders = [share.y.argsort(stable=True) for share in both]
    sorted_ = [share.taps[1][:, order] for share, order in zip(both, orders, strict=True)]
    found = PENALTIES["spike_similarity"](both, pair="label")
    torch.testing.assert_close(found, 1 - spike_similarity(*sorted_))
    assert found != PENALTIES["spike_similarity"](both)


def test_penalised_loss_by_hand() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(Flatten(), Linear(12, 8), LIF(decay_input=False), Linear(8, 2))
    x, y = torch.randn(4, 10, 12) * 2, torch.randint(2, (10,))
    with Penalised(model, sdt, PENALTIES["spike_similarity"], 2) as loss:
        loss.weight = 0.5
        value = loss(model(x), y)
        with torch.no_grad():
            model(x)  # leaves nothing behind
        again = loss(model(x), y)
    spikes = model[:3](x)
    penalty = 1 - spike_similarity(spikes[:, :5], spikes[:, 5:])
    expected = sdt(model(x), y) + 0.5 * penalty
    torch.testing.assert_close(value, expected)
    assert torch.equal(value, again)
    assert loss.take() == pytest.approx(penalty.item())
    assert loss.take() == 0
    for a, b in zip(
        torch.autograd.grad(value, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert not model[1]._forward_pre_hooks


def test_taps_of_the_network_of_table_3() -> None:
    """Similarity1 and Similarity2 of figure 4: 500 and 800 spikes."""
    model = create_model("colored_mnist_net")
    widths: list[list[int]] = []

    def penalty(found: list[Share]) -> Tensor:
        widths.extend([tap.shape[2] for tap in share.taps] for share in found)
        assert all(set(tap.unique().tolist()) <= {0.0, 1.0} for share in found for tap in share.taps)
        return torch.zeros(())

    with Penalised(model, sdt, penalty, 2) as loss:
        loss(model(torch.rand(4, 3, 28, 28)), torch.tensor([0, 1, 0, 1]))
    assert widths == [[800, 500]] * 2


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "environments", "batch"), [(40, 2, 8), (46, 2, 8), (30, 3, 6)])
def test_order_of_environments(length: int, environments: int, batch: int) -> None:
    order = epoch_order(length, 1, 0, environments, batch)
    per, share = length // environments, batch // environments
    assert len(order) == per // share * share * environments
    assert len(order.unique()) == len(order)
    for part in order.split(batch):
        assert (part // per).tolist() == [n for n in range(environments) for _ in range(share)]
    assert torch.equal(order, epoch_order(length, 1, 0, environments, batch))
    assert not torch.equal(order, epoch_order(length, 1, 1, environments, batch))
    assert not torch.equal(order[:share], order[share:batch] - per)  # each environment has its own order
    with pytest.raises(UsageError, match=r"train.batch_size must be a multiple of 2"):
        environment_order(40, 2, 7, torch.randperm)


# --- what is reported -------------------------------------------------------------------------------------------------


def test_selected_epoch() -> None:
    log = [(50, 50, 50.5), (72, 69, 41), (90, 80, 10), (71, 69, 49), (71.5, 69, 40), (75, 66, 41)]
    records = [
        {"epoch": n, "train1_accuracy": a, "train2_accuracy": b, "test_accuracy": test}
        for n, (a, b, test) in enumerate(log, 1)
    ]
    chosen = select_epoch(records)
    assert chosen is not None
    assert chosen["epoch"] == 2  # not 1 and 4, of a mean of at most 70; the first of equals
    assert select_epoch(records[:1]) is None


def test_published_rows_meet_the_rule() -> None:
    recipe = load_recipe("report/table3")
    rows = {name: row for name, row in recipe.rows.items() if row.published}
    assert list(rows) == [f"s0t3{letter}" for letter in "abcdef"]
    for name, row in rows.items():
        published: dict[str, Any] = row.published
        assert published["acc_train1"] + published["acc_train2"] > 140
        data = recipe.resolve(name, "full").data.options
        assert data.get("flip_train1", 0.1) + data.get("flip_train2", 0.2) == pytest.approx(0.3)
        assert "flip_test" not in data
        settings = recipe.resolve(name, "full")
        assert (settings.train.batch_size * settings.train.accumulate, settings.train.epochs) == (4000, 50)
        assert settings.train.penalty is not None
        per_epoch = settings.train.penalty.weight / settings.train.epochs
        assert per_epoch == (1 if name == "s0t3a" else 1 / 50)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files with blocks for digits: below 5 at the top, the others at the bottom."""
    folder = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    folder.mkdir(parents=True)
    labels = (np.arange(60_000) * 7 % 10).astype(np.uint8)
    images = np.zeros((60_000, 28, 28), np.uint8)
    images[labels < 5, 6:12, 8:20] = 255
    images[labels >= 5, 16:22, 8:20] = 255
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder.parents[1]


def settings(root: Path, penalty: Any = None, **train_settings: Any) -> Any:
    values: dict[str, Any] = {
        "data": {"name": "colored_mnist", "root": str(root), "subset": 96, "test_subset": 60},
        "model": {"name": "colored_mnist_net", "T": 2},
        "train": {
            "epochs": 2,
            "batch_size": 32,
            "optimizer": "adam",
            "lr": 1e-3,
            "schedule": "constant",
            **({} if penalty is None else {"penalty": penalty}),
            **train_settings,
        },
    }
    return check_settings(values, "here")


def plan(folder: Path, values: Any) -> Run:
    return Run.plan(folder, "report/table3", "s0t3a", "smoke", values)


def test_records_of_a_run(root: Path, tmp_path: Path) -> None:
    for name in ("irm", "spike_similarity"):
        run = plan(tmp_path / name, settings(root, {"name": name, "weight": 2.0}))
        summary = train(run, Quiet())
        first, last = run.metrics()
        assert {"train1_accuracy", "train2_accuracy", "test_accuracy", "train_penalty"} <= set(last)
        assert summary["last"] == last
        assert first["train_penalty"] > 0 if name == "spike_similarity" else first["train_penalty"] != 0
    plain = plan(tmp_path / "plain", settings(root))
    train(plain, Quiet())
    assert "train_penalty" not in plain.metrics()[0]
    # lambda is 0 in the first epoch: its training is that without a penalty, and goes another way in the second.
    for key in ("train_loss", "test_loss", "train1_accuracy"):
        assert first[key] == plain.metrics()[0][key]
    assert last["train_loss"] != plain.metrics()[1]["train_loss"]


def test_micro_batches_leave_similarity_as_it_is(root: Path, tmp_path: Path) -> None:
    found = []
    for accumulate in (1, 2):
        values = settings(
            root,
            {"name": "spike_similarity", "weight": 2.0},
            batch_size=64 // accumulate,
            accumulate=accumulate,
            optimizer="sgd",
            lr=1e-6,
        )
        run = plan(tmp_path / str(accumulate), values)
        train(run, Quiet())
        found.append(run.metrics()[-1])
    # The pairs differ, their mean hardly.
    assert found[0]["train_penalty"] == pytest.approx(found[1]["train_penalty"], abs=0.05)
    assert found[0]["train_loss"] == pytest.approx(found[1]["train_loss"], abs=0.05)


def test_a_stopped_run_continues(root: Path, tmp_path: Path) -> None:
    values = settings(root, {"name": "irm", "weight": 2.0})
    whole, parts = plan(tmp_path / "whole", values), plan(tmp_path / "parts", values)
    train(whole, Quiet())
    asked = itertools.count(1)
    with pytest.raises(Interrupted):
        train(parts, Quiet(), stop=lambda: next(asked) == 8)
    train(Run.open(parts.folder), Quiet())
    assert timeless(parts.metrics()) == timeless(whole.metrics())


def test_mistakes(root: Path, tmp_path: Path) -> None:
    values = settings(root, {"name": "irm", "weight": 1.0})
    digits = check_settings(
        {**values.model_dump(), "data": {"name": "digits", "size": 28}, "model": {"name": "colored_mnist_net"}}, "here"
    )
    with pytest.raises(UsageError, match=r"train.penalty irm needs data with environments, not digits"):
        train(plan(tmp_path / "a", digits), Quiet())
    with pytest.raises(UsageError, match=r"train.batch_size must be a multiple of 2"):
        train(plan(tmp_path / "b", settings(root, batch_size=33)), Quiet())
    for penalty, text in (
        ({"name": "irm"}, "train.penalty.weight is missing"),
        ({"name": "irn", "weight": 1.0}, "unknown penalty 'irn'; did you mean irm"),
        ({"name": "irm", "weight": 1.0, "estimatr": "square"}, "unknown key 'estimatr'"),
        ({"name": "spike_similarity", "weight": 1.0, "shares": 3}, "unknown key 'shares'"),
    ):
        with pytest.raises(UsageError, match=text):
            settings(root, penalty)
    with pytest.raises(UsageError, match=r"train.penalty needs train.method=bptt"):
        settings(root, {"name": "irm", "weight": 1.0}, method="sltt", loss="tet")


@pytest.mark.parametrize("method", ["sltt", {"name": "sltt_k", "k": 2}, {"name": "sltt", "mode": "online"}])
def test_methods_that_step_need_a_loss_of_each_step(root: Path, method: Any) -> None:
    for loss in ("sdt", "mse_onehot"):
        with pytest.raises(UsageError, match="takes one step at a time"):
            settings(root, method=method, loss=loss)
    settings(root, method=method, loss="tet")
    settings(root, method={"name": "sltt", "mode": "multi_step_detached"}, loss="sdt")


def test_published_beside_measured(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"data": {"root": str(root), "subset": 40, "test_subset": 20}, "model": {"T": 2}}
    [record] = reproduce(
        load_recipe("report/table3"),
        ["s0t3b"],
        "smoke",
        tiny,
        tmp_path / "runs",
        tmp_path / "results",
        Quiet(),
        lambda: False,
    )
    measured = record["measured"]
    [folder] = (tmp_path / "runs" / "report-table3").iterdir()
    last = Run.open(folder).metrics()[-1]
    assert measured["last_train1"] == last["train1_accuracy"]
    assert measured["last_test"] == last["test_accuracy"]
    assert ("acc_test" in measured) == (select_epoch(Run.open(folder).metrics()) is not None)
    figure = tmp_path / "results" / "report" / "table3" / record["figures"][0]
    assert "penalty, without its weight" in figure.read_text()
    # As a table: every quantity on a line of its own.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["report/table3#s0t3b", "budget=smoke", "model.T=2", "data.subset=40", "data.test_subset=20"]
    monkeypatch.setattr(sys, "argv", ["spikeloom", "reproduce", *words, f"data.root={root}"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert " 42.1 " in out
    assert "last_train1" in out
    assert out.endswith("draw its figures: spikeloom reproduce report/table3 --figures\n")
    assert list(tmp_path.rglob("results/**/*.html")) == []
    written = tmp_path / "results" / "report" / "table3" / "s0t3b.smoke.seed1.json"
    assert json.loads(written.read_text())["published"]["acc_test"] == 42.1
