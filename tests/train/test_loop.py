"""The training loop: it learns, it is deterministic, and it says what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_line import spikeloom
from helpers.small_runs import NORMED, SMALL, Told, equal, resolved, run_of, weights
from helpers.timeless import timeless
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.files import load_tensors
from spikeloom.layers import Linear
from spikeloom.neurons import Neuron, make_factory
from spikeloom.ops import _dispatch
from spikeloom.train.build import build_datasets, build_model, epoch_order, seed_everything
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.losses import sdt
from spikeloom.train.methods import METHODS, bptt
from spikeloom.train.optim import build_schedule
from spikeloom.train.run import Run
from spikeloom.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")


# --- learning ---------------------------------------------------------------------------------------------------------


def test_it_learns(tmp_path: Path) -> None:
    told = Told()
    run = run_of(tmp_path / "run", SMALL, data={"subset": 512}, train={"batch_size": 32, "epochs": 4})
    summary = train(run, told)
    losses = [record["train_loss"] for record in told.records]
    assert losses[0] > losses[-1]
    assert losses[-1] < 0.6 * math.log(10)
    assert summary["test_accuracy"] > 60
    assert told.records[-1]["test_loss"] < told.records[0]["test_loss"]


def test_what_is_told(tmp_path: Path) -> None:
    told = Told()
    run = run_of(tmp_path / "run", SMALL, train={"epochs": 3})
    train(run, told)
    assert told.started == [(12, 0)]
    assert [epoch for epoch, _, _ in told.steps] == [1] * 4 + [2] * 4 + [3] * 4
    assert told.records == run.metrics()
    # The last step of an epoch reports the epoch's means.
    for record, (_, loss, accuracy) in zip(told.records, told.steps[3::4], strict=True):
        assert record["train_loss"] == pytest.approx(loss)
        assert record["train_accuracy"] == pytest.approx(accuracy)


def test_training_without_native_kernels_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "native", None)
    told = Told()
    train(run_of(tmp_path / "run", SMALL, train={"epochs": 1}), told)
    assert any("no native kernels" in warning for warning in told.warnings)


def test_the_first_steps_by_hand(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SMALL, train={"optimizer": "sgd", "lr": 0.1, "momentum": 0.9})
    train(run, Told())
    images, _ = build_datasets(run.settings)
    model = build_model(run.settings, 1, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for batch in epoch_order(64, 1, 0).split(16):
        x, y = images.batch(batch.tolist())
        optimizer.zero_grad()
        sdt(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
    assert equal(weights(run), dict(model.state_dict()))


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 64, 1438])
def test_epoch_order(length: int) -> None:
    orders = [epoch_order(length, 1, epoch) for epoch in range(4)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(length))
    assert torch.equal(epoch_order(length, 1, 2), orders[2])
    if length > 2:
        assert len({tuple(order.tolist()) for order in orders}) == 4
        assert not torch.equal(epoch_order(length, 2, 0), orders[0])
        assert orders[0].tolist() != list(range(length))


def test_epoch_order_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    epoch_order(100, 1, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_everything() -> None:
    import random

    def draw(*where: int) -> tuple[float, float, float]:
        seed_everything(*where)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    places = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 2, 3), (1, 3, 2)]
    drawn = [draw(*place) for place in places]
    assert len({number for numbers in drawn for number in numbers}) == 3 * len(places)
    assert [draw(*place) for place in places] == drawn


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)  # what was drawn before does not matter
        run = run_of(tmp_path / name, NORMED, seed=seed)
        train(run, Told())
        runs.append(run)
    assert equal(weights(runs[0]), weights(runs[1]))
    assert timeless(runs[0].metrics()) == timeless(runs[1].metrics())
    assert not equal(weights(runs[0]), weights(runs[2]))


def test_the_seed_draws_the_weights() -> None:
    first, again, other = (build_model(resolved(NORMED, seed=seed), 1, 10).state_dict() for seed in (1, 1, 2))
    assert equal(dict(first), dict(again))
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_checkpoints_do_not_change_a_run(tmp_path: Path) -> None:
    often, rarely = (
        run_of(tmp_path / str(minutes), NORMED, train={"checkpoint_minutes": minutes}) for minutes in (0.0, 1000.0)
    )
    train(often, Told())
    train(rarely, Told())
    assert equal(weights(often), weights(rarely))


def test_a_stopped_run_continues(tmp_path: Path) -> None:
    whole, parts = run_of(tmp_path / "whole", NORMED), run_of(tmp_path / "parts", NORMED)
    train(whole, Told())
    for done in (0, 3):
        told = Told()
        with pytest.raises(Interrupted):
            train(parts, told, stop=lambda told=told: len(told.steps) == 3)
        assert told.started == [(8, done)]
        assert not parts.weights.exists()
        parts = Run.open(parts.folder)
    train(parts, Told())
    assert equal(weights(parts), weights(whole))
    assert timeless(parts.metrics()) == timeless(whole.metrics())


# --- batches ----------------------------------------------------------------------------------------------------------


def first_gradients(monkeypatch: pytest.MonkeyPatch, folder: Path, base: dict[str, Any], **changes: Any) -> Any:
    """The gradients of a run's first optimiser step."""
    seen: list[Tensor] = []

    class Stop(Exception):
        pass

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", lambda parameters, lr, weight_decay: Optimizer(parameters, lr))
        with pytest.raises(Stop):
            train(run_of(folder, base, **changes), Told())
    return seen


@pytest.mark.parametrize("parts", [{"accumulate": 2}, {"accumulate": 4}, {"total_batch": 32}])
def test_micro_batches_give_the_gradients_of_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, int]
) -> None:
    lively = {**SMALL, "neuron": {"name": "LIF", "v_threshold": 0.1}}  # every layer fires, so every weight learns
    whole = first_gradients(monkeypatch, tmp_path / "whole", lively, train={"batch_size": 32})
    size = 32 // parts.get("accumulate", 4)
    cut = first_gradients(monkeypatch, tmp_path / "parts", lively, train={"batch_size": size, **parts})
    assert len(whole) == 8
    assert all(float(grad.abs().max()) > 0 for grad in whole)
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    other = first_gradients(monkeypatch, tmp_path / "other", lively, train={"batch_size": 16})
    assert not torch.allclose(other[0], whole[0], rtol=1e-2)


def test_micro_batches_report_the_mean_loss(tmp_path: Path) -> None:
    whole, parts = Told(), Told()
    train(run_of(tmp_path / "whole", SMALL, train={"batch_size": 32, "optimizer": "sgd", "lr": 1e-6}), whole)
    settings = {"batch_size": 8, "accumulate": 4, "optimizer": "sgd", "lr": 1e-6}
    train(run_of(tmp_path / "parts", SMALL, train=settings), parts)
    assert len(parts.steps) == len(whole.steps) == 2
    for a, b in zip(parts.steps, whole.steps, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_images_that_fill_no_batch_wait_for_the_next_epoch(tmp_path: Path) -> None:
    told = Told()
    train(run_of(tmp_path / "run", SMALL, data={"subset": 50}), told)
    assert told.started == [(3, 0)]
    assert len(told.steps) == 3


@pytest.mark.parametrize(
    ("changes", "batch"),
    [({"batch_size": 65}, 65), ({"batch_size": 16, "accumulate": 5}, 80), ({"total_batch": 96}, 96)],
)
def test_a_batch_larger_than_the_data(tmp_path: Path, changes: dict[str, Any], batch: int) -> None:
    run = run_of(tmp_path / "run", SMALL, train=changes)
    with pytest.raises(UsageError, match=f"a batch of {batch} images .* the 64 training images of digits"):
        train(run, Told())


def test_the_total_batch_is_the_same_on_any_number_of_processes() -> None:
    settings = {"epochs": 1, "lr": 0.1, "batch_size": 32, "total_batch": 256}
    t = TrainSettings.model_validate(settings)
    assert [t.micro_batches(processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(UsageError, match=r"train.total_batch=256 is no multiple of 96, .* lower train.batch_size"):
        t.micro_batches(3)
    with pytest.raises(UsageError, match="no multiple of 512"):
        t.micro_batches(16)


def test_a_batch_as_large_as_the_data(tmp_path: Path) -> None:
    told = Told()
    train(run_of(tmp_path / "run", SMALL, train={"batch_size": 64}), told)
    assert len(told.steps) == 1


def test_the_method_of_the_settings_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> Tensor:
        calls.append(len(y))
        return bptt(model, x, y, loss)

    monkeypatch.setitem(METHODS._entries, "bptt", counted)
    train(run_of(tmp_path / "run", SMALL), Told())
    assert calls == [16] * 4


# --- learning rates ---------------------------------------------------------------------------------------------------


def rates(tmp_path: Path, **changes: Any) -> list[float]:
    """The learning rate of every step; 4 steps an epoch."""
    settings = resolved(SMALL, train={"optimizer": "sgd", "lr": 0.1, "epochs": 4, **changes}).train
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], settings.lr)
    schedule = build_schedule(settings, optimizer, 4)
    found = []
    for step in range(16):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules(tmp_path: Path) -> None:
    assert rates(tmp_path) == pytest.approx([0.1] * 16)
    assert rates(tmp_path, schedule="cosine") == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    )
    stepped = rates(tmp_path, schedule="step", milestones=[1.0, 2.5], gamma=0.5)
    assert stepped == pytest.approx([0.1] * 4 + [0.05] * 6 + [0.025] * 6)
    warmed = rates(tmp_path, warmup_epochs=1.0)
    assert warmed == pytest.approx([0.001 + (0.1 - 0.001) * step / 4 for step in range(4)] + [0.1] * 12)


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    moving = {"optimizer": "sgd", "lr": 0.1, "epochs": 3, "schedule": "step", "milestones": [1.0, 2.0], "gamma": 0.5}
    run = run_of(tmp_path / "run", SMALL, train=moving)
    train(run, Told())
    assert [record["lr"] for record in run.metrics()] == pytest.approx([0.1, 0.05, 0.025])


# --- precision --------------------------------------------------------------------------------------------------------


def test_bf16(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()
    forward = Linear.forward

    def spy(self: Linear, x: Tensor) -> Tensor:
        out = forward(self, x)
        seen.add(out.dtype)
        return out

    run = run_of(tmp_path / "run", NORMED, train={"precision": "bf16"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "forward", spy)
        train(run, Told())
    assert torch.bfloat16 in seen
    for record in run.metrics():
        assert all(math.isfinite(value) for value in record.values())
    for name, tensor in weights(run).items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        assert tensor.isfinite().all(), name


def test_precisions_may_follow_each_other_in_one_process(tmp_path: Path) -> None:
    # As the rows of a table do.
    for index, precision in enumerate(("fp32", "bf16", "fp32")):
        run = run_of(tmp_path / str(index), SMALL, train={"precision": precision})
        train(run, Told())
    assert equal(weights(Run.open(tmp_path / "0")), weights(Run.open(tmp_path / "2")))
    assert not equal(weights(Run.open(tmp_path / "0")), weights(Run.open(tmp_path / "1")))


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "lower"), [(1e30, "1e+29"), (1e38, "1e+37")])
def test_a_loss_that_is_no_number(tmp_path: Path, lr: float, lower: str) -> None:
    run = run_of(tmp_path / "a run", NORMED, train={"lr": lr, "epochs": 1, "warmup_epochs": 0})
    with pytest.raises(UsageError, match=r"^the loss is (nan|inf) at epoch 1, step \d: ") as info:
        train(run, Told())
    assert "\n" not in str(info.value)
    assert "from its beginning, as it has no checkpoint yet, with a lower rate" in str(info.value)
    command = f"spikeloom train --resume '{run.folder}' train.lr={lower}"
    assert str(info.value).endswith(f"{command} (see docs/faq.md#the-loss-is-nan-what-now)")
    assert not run.weights.exists()
    assert run.summary() is None
    # The advice works: from the beginning, as nothing was kept.
    calm = Run.open(run.folder).changed({"train": {"lr": 0.01}})
    train(calm, Told())
    fresh = run_of(tmp_path / "fresh", NORMED, train={"lr": 0.01, "epochs": 1, "warmup_epochs": 0})
    train(fresh, Told())
    assert equal(weights(calm), weights(fresh))


def test_a_loss_that_is_no_number_after_a_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", NORMED, train={"epochs": 2, "warmup_epochs": 0})
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        train(run, Told(), lambda: next(asked))
    wild = Run.open(run.folder).changed({"train": {"lr": 1e38}})
    with pytest.raises(
        UsageError, match=r"continue from its last checkpoint with a lower rate: .* train\.lr=1e\+37 \(see docs/"
    ):
        train(wild, Told())


def test_settings_change_from_a_checkpoint_on(tmp_path: Path) -> None:
    before = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "constant", "epochs": 2}
    after = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1}
    run = run_of(tmp_path / "run", SMALL, train=before)
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        train(run, Told(), lambda: next(asked))
    changed = Run.open(run.folder).changed({"train": after})
    told = Told()
    summary = train(changed, told)
    assert told.started == [(8, 2)]
    assert [record["lr"] for record in told.records] == [0.02, 0.02]
    # The same by hand: one optimiser, its constants set anew after two of eight steps.
    images, _ = build_datasets(run.settings)
    model = build_model(run.settings, 1, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step, batch in enumerate([*epoch_order(64, 1, 0).split(16), *epoch_order(64, 1, 1).split(16)]):
        if step == 2:
            optimizer.param_groups[0].update(after)
        x, y = images.batch(batch.tolist())
        optimizer.zero_grad()
        sdt(model(x.contiguous(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
    assert equal(weights(changed), dict(model.state_dict()))
    # The run says so.
    pairs = {"train.lr": [0.1, 0.02], "train.momentum": [0.9, 0.5], "train.weight_decay": [0.0, 0.1]}
    changes = [{"after_epoch": 0, "settings": pairs}]
    opened = Run.open(run.folder)
    assert (opened.settings, list(opened.changes)) == (changed.settings, changes)
    assert summary["changes"] == changes
    assert "after epoch 0: train.lr 0.02 instead of 0.1" in opened.changes_in_words()[0]


def test_a_finished_run_with_more_epochs_is_a_longer_one(tmp_path: Path) -> None:
    base = {**SMALL, "train": {**SMALL["train"], "schedule": "constant", "warmup_epochs": 0}}
    long, short = (run_of(tmp_path / str(epochs), base, train={"epochs": epochs}) for epochs in (3, 2))
    train(long, Told())
    train(short, Told())
    longer = Run.open(short.folder).changed({"train": {"epochs": 3}})
    with pytest.raises(Interrupted):
        train(longer, Told(), lambda: True)
    assert (longer.summary(), longer.weights.exists()) == (None, False), "what is there is of no finished run"
    summary = train(Run.open(short.folder), Told())
    assert summary["epochs"] == 3
    assert equal(weights(longer), weights(long))


def test_a_finished_run_goes_on_from_the_command_line(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SMALL, train={"epochs": 1})
    train(run, Told())
    for words in ([], ["train.epochs=1"], ["train.lr=0.01"]):
        done = spikeloom("train", "--resume", str(run.folder), *words)
        assert done.code == 2
        assert "is finished: give it more epochs, such as train.epochs=2, or evaluate it" in done.err
    assert run.summary() is not None
    Run.open(run.folder).changed({"train": {"epochs": 2}}).begin()  # what a try leaves that fails before it trains
    done = spikeloom("train", "--resume", str(run.folder), "train.epochs=2", "--json")
    assert (done.code, json.loads(done.out)["epochs"]) == (0, 2)


def test_a_finished_run_keeps_its_best_weights_until_there_are_better(tmp_path: Path) -> None:
    base = {**SMALL, "data": {**SMALL["data"], "subset": 300, "validation": 0.2}}
    run = run_of(tmp_path / "run", base, train={"schedule": "constant", "warmup_epochs": 0, "lr": 0.03, "epochs": 2})
    train(run, Told())
    before = weights(run)
    wild = Run.open(run.folder).changed({"train": {"epochs": 3, "lr": 1.0}})
    summary = train(wild, Told())
    assert (summary["epochs"], summary["epoch"]) == (3, 2)
    assert equal(weights(wild), before)
    assert not wild.best.exists()


def test_a_refused_change_leaves_the_run_as_it_was(finished: Run) -> None:
    before = (finished.folder / "settings.json").read_bytes()
    for values in ({"seed": 3}, {"model": {"T": 4}}, {"train": {"optimizer": "adamw"}}, {"train": {"lr": -1.0}}):
        with pytest.raises(UsageError):
            finished.changed(values)
    assert finished.changed({"train": {"lr": finished.settings.train.lr}}) is finished
    assert (finished.folder / "settings.json").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"lrr": 1.0}}, "unknown key 'train.lrr'; did you mean lr"),
        ({"data": {"subst": 8}}, "unknown key 'subst'; did you mean subset"),
        ({"model": "cifar10_net"}, "model cannot change, only train.lr"),
        ({"seed": 3}, "seed cannot change, only train.lr"),
    ],
)
def test_an_unknown_change_is_not_called_one_that_is_refused(
    finished: Run, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finished.changed(values)


def test_a_silent_layer_is_named(tmp_path: Path) -> None:
    told = Told()
    run = run_of(tmp_path / "run", SMALL, neuron={"name": "LIF", "v_threshold": 100.0})
    train(run, told)
    names = [name for name, m in build_model(run.settings, 1, 10).named_modules() if isinstance(m, Neuron)]
    assert [warning.split()[1] for warning in told.warnings] == names
    for warning in told.warnings:
        assert "nearly silent" in warning
        assert "rate 0.00 %" in warning
        assert "v_threshold" in warning


@pytest.mark.parametrize(("images", "silent"), [(80, ["features.1", "features.4", "head.1"]), (1024, [])])
def test_a_layer_that_wakes_up_is_not_named(tmp_path: Path, images: int, silent: list[str]) -> None:
    # Two layers are silent in the first 5 steps and fire at 23 and 10 % after 64.
    told = Told()
    changes: dict[str, Any] = {"data": {"subset": images}, "model": {"T": 4}, "train": {"lr": 0.005}}
    train(run_of(tmp_path / "run", SMALL, neuron={"name": "LIF", "v_threshold": 1.5}, **changes), told)
    assert [warning.split()[1] for warning in told.warnings] == silent
    assert all("after the first epoch" in warning for warning in told.warnings)


def test_a_saturated_layer_is_named(tmp_path: Path) -> None:
    told = Told()
    # A sigmoid is above next to nothing at every step.
    run = run_of(tmp_path / "run", SMALL, neuron={"name": "ParaLIF", "firing": "st", "v_threshold": 1e-30})
    train(run, told)
    saturated = [warning for warning in told.warnings if "saturated" in warning]
    assert saturated
    assert "rate 100.00 %" in saturated[0]
    assert "raise v_threshold" in saturated[0]


def test_a_lively_network_is_not_warned_of(tmp_path: Path) -> None:
    told = Told()
    train(run_of(tmp_path / "run", NORMED, train={"epochs": 1}), told)
    assert told.warnings == []


def test_warnings_come_once(tmp_path: Path) -> None:
    told = Told()
    run = run_of(tmp_path / "run", SMALL, neuron={"name": "LIF", "v_threshold": 100.0}, train={"epochs": 4})
    train(run, told)
    assert len(told.warnings) == len(set(told.warnings)) == 3


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("finished") / "run", SMALL, train={"epochs": 3})
    train(run, Told())
    return run


def test_metrics_are_one_record_an_epoch(finished: Run) -> None:
    lines = (finished.folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert set(record) == {
            "epoch",
            "T",
            "train_loss",
            "train_accuracy",
            "test_loss",
            "test_accuracy",
            "lr",
            "seconds",
            "input_images_per_s",
            "step_images_per_s",
        }
        assert all(math.isfinite(value) for value in record.values())
        assert 0 <= record["train_accuracy"] <= 100
        # Of 64 and of 50 images.
        assert record["train_accuracy"] * 64 / 100 == pytest.approx(round(record["train_accuracy"] * 64 / 100))
        assert record["test_accuracy"] * 50 / 100 == pytest.approx(round(record["test_accuracy"] * 50 / 100))
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_tensorboard(finished: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "lr"} <= set(events.Tags()["scalars"])
    for tag, key in (("train/loss", "train_loss"), ("test/accuracy", "test_accuracy")):
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([record[key] for record in finished.metrics()])


def test_summary(finished: Run) -> None:
    summary, records = finished.summary(), finished.metrics()
    assert summary is not None
    assert summary["recipe"] == "quickstart/digits"
    assert (summary["row"], summary["budget"], summary["seed"]) == ("main", "full", 1)
    assert (summary["model"], summary["epochs"]) == ("colored_mnist_net", 3)
    assert summary["parameters"] == sum(p.numel() for p in build_model(finished.settings, 1, 10).parameters())
    assert summary["data"] == {
        "train": "digits (scikit-learn), first 64 images",
        "test": "digits (scikit-learn), first 50 images",
    }
    assert summary["test_accuracy"] == records[-1]["test_accuracy"]
    accuracies = [record["test_accuracy"] for record in records]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert accuracies[summary["best_epoch"] - 1] == max(accuracies)
    assert summary["seconds"] == records[-1]["seconds"] > 0
    for key in ("spikeloom", "commit", "torch", "python", "machine", "processor", "threads", "native", "device"):
        assert key in summary["environment"]


def test_the_last_checkpoint_holds_the_trained_weights(finished: Run) -> None:
    tensors, information = load_tensors(finished.checkpoint)
    for name, tensor in weights(finished).items():
        assert torch.equal(tensors[f"model.{name}"], tensor)
    assert (information["position"]["epoch"], information["position"]["step"]) == (3, 0)


def test_a_lost_checkpoint_is_said(tmp_path: Path) -> None:
    run, told = run_of(tmp_path / "run", SMALL, train={"epochs": 3}), Told()
    with pytest.raises(Interrupted):
        train(run, told, stop=lambda: len(told.steps) == 6)
    run.checkpoint.unlink()
    told = Told()
    train(Run.open(run.folder), told)
    assert any("no checkpoint.safetensors: the run begins again" in warning for warning in told.warnings)


def test_an_occupied_folder_is_refused(finished: Run) -> None:
    with pytest.raises(UsageError, match=r"is not empty: choose another folder with --out$"):
        Run.plan(finished.folder, "x", "main", "full", finished.settings)


def test_a_run_is_opened_with_its_settings(finished: Run) -> None:
    assert Run.open(finished.folder) == finished


def test_a_soft_reset_survives_the_settings_file(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SMALL, neuron={"name": "LIF", "v_reset": None})
    run.begin()
    opened = Run.open(run.folder)
    for settings in (run.settings, opened.settings):
        assert settings.neuron is not None
        assert make_factory(settings.neuron.name, settings.neuron.options)().v_reset is None


def test_metrics_cut_short_by_a_crash(finished: Run, tmp_path: Path) -> None:
    run = Run.plan(tmp_path / "run", "x", "main", "full", finished.settings)
    run.begin()
    lines = (finished.folder / "metrics.jsonl").read_text()
    (run.folder / "metrics.jsonl").write_text(lines[:-20])
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    run.keep_metrics(1)
    assert [record["epoch"] for record in run.metrics()] == [1]
    run.add_metrics({"epoch": 2})
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
