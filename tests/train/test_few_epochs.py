"""Tools for learning in few epochs: T in stages, first rates, averages, schedules, validation, prepared batches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import NORMED, SMALL, Told, equal, resolved, run_of, weights
from helpers.timeless import timeless
from torch import Tensor, nn

from spikeloom.cli.progress import Quiet
from spikeloom.data.subset import hold_out
from spikeloom.data.transforms import augmentation
from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv2d, Linear, NormSpike
from spikeloom.models import create_model
from spikeloom.neurons import LIF, MLF, Neuron
from spikeloom.record import RateMeter
from spikeloom.registry import list_recipes
from spikeloom.train import train_recipe
from spikeloom.train.batches import Batches
from spikeloom.train.build import build_datasets, build_model, epoch_order
from spikeloom.train.checks_of_settings import check_beginning
from spikeloom.train.evaluate import evaluate_run
from spikeloom.train.firing_rates import set_first_rates
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.losses import LOSSES
from spikeloom.train.optim import build_optimizer, build_schedule
from spikeloom.train.recipe import BUDGETS, load_recipe, parse_overrides
from spikeloom.train.run import Run
from spikeloom.train.settings import Named
from spikeloom.train.stages import NeuronPlaces, measure_norms, stage_of_epoch

pytestmark = pytest.mark.usefixtures("one_thread")

STAGED: dict[str, Any] = {
    **NORMED,
    "model": {"name": "report_sew_resnet34", "T": 3},
    "train": {**NORMED["train"], "epochs": 3, "steps": [{"T": 1, "epochs": 1}, {"T": 2, "epochs": 1}], "ema": 0.9},
}


# --- T in stages ------------------------------------------------------------------------------------------------------


def test_the_stage_of_an_epoch() -> None:
    t = resolved(STAGED, train={"epochs": 5, "steps": [{"T": 1, "epochs": 2}, {"T": 2, "epochs": 1}]}).train
    assert [stage_of_epoch(t, 6, epoch).T for epoch in range(5)] == [1, 1, 2, 6, 6]


def test_each_epoch_trains_with_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    forward = Linear.forward

    def spy(self: Linear, x: Tensor) -> Tensor:
        seen.append((self.training, x.shape[0]))
        return forward(self, x)

    monkeypatch.setattr(Linear, "forward", spy)
    run = run_of(tmp_path / "run", STAGED)
    train(run, Told())
    training = [T for trains, T in seen if trains]
    # After the input was tried and the warnings' batch: 4 steps an epoch.
    assert [T for T, _ in itertools.groupby(training)] == [1, 2, 3]
    assert [record["T"] for record in run.metrics()] == [1, 2, 3]
    evaluated = [T for trains, T in seen if not trains]
    assert evaluated[-4:] == [3] * 4  # at the end at model.T


def test_a_run_is_the_same_bits_across_a_change_of_steps(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", STAGED)
    train(whole, Told())
    for stop in (4, 5, 9):  # at the end of the first stage, in the middle of the second, and of the last
        parts = run_of(tmp_path / f"parts{stop}", STAGED)
        told = Told()
        with pytest.raises(Interrupted):
            train(parts, told, stop=lambda told=told, stop=stop: len(told.steps) == stop)
        train(Run.open(parts.folder), Told())
        assert equal(weights(parts), weights(whole))
        assert timeless(parts.metrics()) == timeless(whole.metrics())


def test_other_neurons_stand_in_for_those_of_the_network(tmp_path: Path) -> None:
    """In their stage, of the averaged weights too, and across an interruption; what is saved has the network's own."""
    levels = {"name": "MLF", "surrogate": "Triangle"}
    steps = [{"T": 1, "epochs": 1, "neuron": levels}, {"T": 2, "epochs": 1}]
    whole = run_of(tmp_path / "whole", STAGED, train={**STAGED["train"], "steps": steps})
    plain = run_of(tmp_path / "plain", STAGED)
    train(whole, Told())
    train(plain, Told())
    first, *_, last = whole.metrics()
    assert first["train_loss"] != plain.metrics()[0]["train_loss"]
    assert evaluate_run(whole, whole.settings, Quiet())["test_loss"] == last["test_loss"]
    for stop in (3, 5):  # in the stage, and behind it
        parts, told = run_of(tmp_path / f"parts{stop}", whole.settings.model_dump()), Told()
        with pytest.raises(Interrupted):
            train(parts, told, stop=lambda told=told, stop=stop: len(told.steps) == stop)
        train(Run.open(parts.folder), Told())
        assert equal(weights(parts), weights(whole))
        assert timeless(parts.metrics()) == timeless(whole.metrics())


def test_neurons_are_put_in_all_places_and_back() -> None:
    model = create_model("report_sew_resnet34", T=1)
    x = torch.rand(2, 3, 32, 32)
    own = [module for module in model.modules() if isinstance(module, Neuron)]
    places = NeuronPlaces(model)
    before = model(x)
    places.put(Named(name="MLF"))
    others = [module for module in model.modules() if isinstance(module, Neuron)]
    assert len(others) == len(own)
    assert all(isinstance(module, MLF) for module in others)
    assert model(x).isfinite().all()
    places.put(None)
    assert [module for module in model.modules() if isinstance(module, Neuron)] == own
    assert torch.equal(model.train()(x), before)


def test_steps_of_later_epochs_can_change(tmp_path: Path) -> None:
    """From the checkpoint on the run is the one that had these steps from its beginning."""
    same = {**STAGED["train"], "schedule": "constant"}  # learning rates of as many epochs as there are in the end
    whole = run_of(tmp_path / "whole", STAGED, train=same)
    train(whole, Told())
    longer = {"epochs": 4, "steps": [{"T": 1, "epochs": 1}, {"T": 2, "epochs": 2}]}
    parts, told = run_of(tmp_path / "parts", STAGED, train={**same, **longer}), Told()
    with pytest.raises(Interrupted):
        train(parts, told, stop=lambda: len(told.steps) == 4)
    for steps in ([{"T": 2, "epochs": 1}], [{"T": 2, "epochs": 2}]):
        with pytest.raises(UsageError, match=r"is in epoch 1: train.steps may change later epochs alone$"):
            Run.open(parts.folder).changed({"train": {"steps": steps}})
    changed = Run.open(parts.folder).changed({"train": {"epochs": 3, "steps": STAGED["train"]["steps"]}})
    train(changed, Told())
    assert [record["T"] for record in parts.metrics()] == [1, 2, 3]
    assert equal(weights(parts), weights(whole))


def test_norms_are_measured_again() -> None:
    """The running statistics are the means over batches of what enters the norm, computed here in float64."""
    torch.manual_seed(1)
    model = nn.Sequential(Conv2d(3, 4, 3), NormSpike(4, LIF))
    batches = [torch.randn(2, 5, 3, 6, 6) for _ in range(3)]
    measure_norms(model, batches)
    inputs = [model[0](x).double().permute(2, 0, 1, 3, 4).flatten(1) for x in batches]
    mean = torch.stack([x.mean(1) for x in inputs]).mean(0)
    variance = torch.stack([x.var(1) for x in inputs]).mean(0)
    norm = model[1].norm
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-6)
    assert norm.momentum == 0.1
    assert not norm.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": [{"T": 1, "epochs": 4}]}}, "train.steps has 4 epochs, but train.epochs is 3"),
        ({"train": {"steps": [{"T": 1, "epochs": 3}]}}, "train.steps ends at T = 1, but model.T, .* is 3"),
        ({"neuron": {"name": "PSN", "T": 3}}, "train.steps: this network is made for T = 3 alone"),
        (
            {"train": {"steps": [{"T": 3, "epochs": 3, "neuron": "MLF"}]}},
            "train.steps ends with MLF, which stands in for the network's own neurons: leave them the last epochs",
        ),
        ({"train": {"steps": [{"T": 1, "epochs": 1, "neuron": "PLIF"}]}}, "may have no weights, and PLIF has"),
        (
            {"neuron": "PLIF", "train": {"steps": [{"T": 1, "epochs": 1, "neuron": "MLF"}]}},
            "may have no weights, and PLIF has",
        ),
        ({"train": {"steps": [{"T": 1, "epochs": 1, "neuron": "MFL"}]}}, "train.steps: unknown neuron 'MFL'"),
        (
            {
                "train": {
                    "steps": [{"T": 1, "epochs": 1, "neuron": "MLF"}],
                    "rate_penalty": {"weight": 1.0},
                }
            },
            "train.rate_penalty is of the network's own neurons: leave it out, or the neurons of train.steps",
        ),
        ({"train": {"nesterov": True, "optimizer": "adam"}}, "train.nesterov needs train.optimizer=sgd"),
        (
            {"train": {"loss": "tet", "method": {"name": "sltt_k", "k": 4}}},
            "train.method.k=4 is above T = 3, the number of steps: lower it, or use train.method=sltt",
        ),
        ({"train": {"workers": 5000}}, "train.workers=5000 is too many for this machine: at most .*, or leave it out"),
        ({"data": {"validation": 0.001}}, "data.validation=0.001 leaves one side"),
    ],
)
def test_settings_that_cannot_be_met(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(run_of(tmp_path / "run", STAGED, **changes), Told())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.milestones=[1.0]", "train.milestones needs train.schedule=step, which is cosine here"),
        ("train.gamma=0.5", "train.gamma needs train.schedule=step, which is cosine here"),
        ("train.optimizer=adam train.momentum=0.8", "train.momentum needs train.optimizer=sgd, which is adam here"),
        (
            "train.schedule=constant train.min_lr=0.01",
            "train.min_lr needs train.schedule=cosine or linear or one_cycle, which is constant here",
        ),
        (
            "train.schedule=one_cycle train.cooldown_epochs=0.5",
            "train.cooldown_epochs needs train.schedule=cosine or linear, which is one_cycle here",
        ),
        (
            "train.start_from=runs/other train.initial_rate=0.2",
            "train.start_from and train.initial_rate cannot both be given, it has rates: leave one out",
        ),
        ("train.schedule=step", "train.schedule=step needs train.milestones, such as train.milestones=[10.0,15.0]"),
        ("train.warmup_epochs=0 train.warmup_lr=0.01", "train.warmup_lr needs train.warmup_epochs above 0"),
        ("train.warmup_epochs=2", "train.warmup_epochs must be at most train.epochs, which is 1, got 2.0"),
        ("train.cooldown_epochs=1", "train.cooldown_epochs must be below train.epochs, which is 1, got 1.0"),
        (
            "train.schedule=step train.milestones=[2.0,1.0]",
            "train.milestones must rise, from 0 epochs on, got [2.0, 1.0]",
        ),
        (
            "train.schedule=step train.milestones=[-1.0]",
            "train.milestones must rise, from 0 epochs on, got [-1.0]",
        ),
    ],
)
def test_what_has_no_effect_or_meaning_is_refused(tmp_path: Path, words: str, message: str) -> None:
    with pytest.raises(UsageError) as info:
        train_recipe("quickstart/digits", "budget=smoke", *words.split(), out=tmp_path / "run")
    assert str(info.value) == f"quickstart/digits#main: {message}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    ["train.min_lr=0 train.schedule=constant", "train.momentum=0.8", "train.schedule=step train.milestones=[0.5]"],
)
def test_what_has_an_effect_or_asks_for_nothing_is_taken(tmp_path: Path, words: str) -> None:
    values = parse_overrides(words.split())
    settings = load_recipe("quickstart/digits").resolve("main", "smoke", values)
    Run.plan(tmp_path / "run", "quickstart/digits", "main", "smoke", settings, values)


def test_every_recipe_can_begin() -> None:
    for recipe in (load_recipe(name) for name in list_recipes()):
        for row in recipe.rows if not recipe.measures else ():
            for budget in BUDGETS:
                if budget == "full" or budget in recipe.budgets or budget in recipe.rows[row].budgets:
                    check_beginning(recipe.resolve(row, budget).train, {}, row)


# --- first rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("report_vgg16", {"T": 2}, 0),
        ("report_sew_resnet34", {"T": 1}, 0),
        ("report_ms_resnet34", {"T": 2}, 0),
        ("ds_resnet20", {"T": 2}, 0),
        ("spikingformer_4_256", {"T": 1}, 4),  # behind the product of attention there is nothing to scale
    ],
)
def test_first_rates(name: str, options: dict[str, Any], left: int) -> None:
    """On the same batch in training mode every layer fires at the wanted rate."""
    torch.manual_seed(0)
    model = create_model(name, **options).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    found = set_first_rates(model, x, 0.2)
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers())
    with RateMeter(model.train()) as meter, torch.no_grad():
        model(x)
    rates = meter.rates()
    assert [f.name for f in found] == list(rates)
    off = [f.name for f in found if abs(rates[f.name] - 0.2) > 0.02]
    assert len(off) == left, off
    assert max(abs(f.before - 0.2) for f in found) > 0.03
    for f in found:
        assert rates[f.name] == pytest.approx(f.after, abs=0.01)


def test_first_rates_of_layers_without_a_norm() -> None:
    """The weight and bias of a linear layer are scaled by one factor; a layer that starts at zero stays."""
    torch.manual_seed(0)
    first, zero = Linear(20, 30), Linear(30, 30)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    weight, bias = first.weight.detach().clone(), first.bias.detach().clone()
    model = nn.Sequential(first, LIF(), zero, MLF())
    found = set_first_rates(model, torch.randn(3, 50, 20), 0.3)
    assert found[0].after == pytest.approx(0.3, abs=0.02)
    assert (found[1].before, found[1].after) == (0, 0)
    gain = (first.weight / weight).mean()
    torch.testing.assert_close(first.weight, gain * weight)
    torch.testing.assert_close(first.bias, gain * bias)
    assert not zero.weight.any()


def test_first_rates_of_a_run_are_told_and_set_once(tmp_path: Path) -> None:
    told = Told()
    changes = {"train": {"initial_rate": 0.15, "lr": 1e-9, "weight_decay": 0.0}}
    parts = run_of(tmp_path / "run", NORMED, **changes)
    with pytest.raises(Interrupted):
        train(parts, told, stop=lambda: len(told.steps) == 1)
    neurons = sum(isinstance(m, NormSpike) for m in build_model(parts.settings, 1, 10).modules())
    assert len(told.notes) == neurons
    assert all(" set to " in note for note in told.notes)
    again = Told()
    train(Run.open(parts.folder), again)
    assert again.notes == []
    drawn = {n: m for n, m in build_model(parts.settings, 1, 10).named_modules() if isinstance(m, BatchNorm)}
    changed = [n for n in drawn if not torch.allclose(weights(parts)[f"{n}.weight"], drawn[n].weight, rtol=1e-3)]
    assert len(changed) > len(drawn) / 2


# --- averaged weights -------------------------------------------------------------------------------------------------


def test_averaged_weights_become_the_runs(tmp_path: Path) -> None:
    """By hand: timm's decay with warm-up, min(decay, 1 - step ** -2/3), over the weights after every step."""
    run, plain = run_of(tmp_path / "run", SMALL, train={"ema": 0.5}), run_of(tmp_path / "plain", SMALL)
    averages: dict[str, Tensor] = {}
    seen: list[dict[str, Tensor]] = []
    step = torch.optim.Adam.step

    def spy(self: Any, closure: Any = None) -> Any:
        result = step(self, closure)
        seen.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        train(plain, Told())
    train(run, Told())
    names = [name for name, _ in build_model(run.settings, 1, 10).named_parameters()]
    start = [p.detach().clone() for p in build_model(run.settings, 1, 10).parameters()]
    for number, values in enumerate(seen):
        decay = min(0.5, 1 - max(number, 1) ** (-2 / 3))
        start = [decay * a + (1 - decay) * b for a, b in zip(start, values, strict=True)]
    averages = dict(zip(names, start, strict=True))
    assert not equal(weights(run), weights(plain))
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, averages[name], rtol=1e-4, atol=1e-6)


# --- learning rates ---------------------------------------------------------------------------------------------------


def rates(**changes: Any) -> list[tuple[float, float]]:
    """Learning rate and momentum of every step; 4 steps in each of 4 epochs."""
    settings = resolved(SMALL, train={"optimizer": "sgd", "lr": 0.1, "epochs": 4, **changes}).train
    optimizer = build_optimizer(settings, nn.Linear(1, 1))
    schedule = build_schedule(settings, optimizer, 4)
    found = []
    for step in range(16):
        schedule.step_update(step)
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    return found


def test_linear() -> None:
    found = [lr for lr, _ in rates(schedule="linear", warmup_epochs=1.0, min_lr=0.02)]
    assert found[:4] == pytest.approx([0.001 + 0.099 * step / 4 for step in range(4)])
    assert found[4:] == pytest.approx([0.02 + 0.08 * (1 - step / 12) for step in range(12)])


def test_one_cycle_is_torchs() -> None:
    """Beside torch's OneCycleLR, which counts its two phases from their first to their last step."""
    found = rates(schedule="one_cycle", warmup_epochs=1.0, momentum=0.95)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.95)
    peer = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=17, pct_start=5 / 17, final_div_factor=math.inf
    )
    for lr, momentum in found:
        group = optimizer.param_groups[0]
        assert (lr, momentum) == pytest.approx((group["lr"], group["momentum"]), abs=1e-6)
        optimizer.step()
        peer.step()


def test_one_cycle_continues_from_a_checkpoint(tmp_path: Path) -> None:
    changes = {"train": {"schedule": "one_cycle", "optimizer": "sgd", "nesterov": True, "epochs": 2}}
    whole, parts = run_of(tmp_path / "whole", SMALL, **changes), run_of(tmp_path / "parts", SMALL, **changes)
    train(whole, Told())
    told = Told()
    with pytest.raises(Interrupted):
        train(parts, told, stop=lambda: len(told.steps) == 3)
    train(Run.open(parts.folder), Told())
    assert equal(weights(parts), weights(whole))


def test_nesterov_by_hand(tmp_path: Path) -> None:
    optimizer = build_optimizer(
        resolved(SMALL, train={"optimizer": "sgd", "lr": 0.1, "momentum": 0.5, "nesterov": True}).train,
        nn.Linear(1, 1, bias=False),
    )
    weight = optimizer.param_groups[0]["params"][0]
    nn.init.constant_(weight, 1.0)
    for _ in range(2):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    # First step: g + 0.5 g = 3; second: momentum 0.5 * 2 + 2 = 3, g + 0.5 * 3 = 3.5.
    assert weight.item() == pytest.approx(1 - 0.1 * 3 - 0.1 * 3.5)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdt", "tet", "mse_onehot"])
def test_label_smoothing_mixes_in_every_class(name: str) -> None:
    """The smoothed loss is that of the soft label (1 - eps) onehot + eps / classes."""
    logits, y = torch.randn(3, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    soft = 0.8 * torch.nn.functional.one_hot(y, 5) + 0.2 / 5
    loss = LOSSES[name]
    torch.testing.assert_close(loss(logits, y, label_smoothing=0.2), loss(logits, soft))


# --- validation -------------------------------------------------------------------------------------------------------


def test_hold_out() -> None:
    run = resolved(SMALL, data={"subset": 500})
    whole, _ = build_datasets(run)
    kept, held = hold_out(whole, 0.1)
    assert sorted([*kept.indices.tolist(), *held.indices.tolist()]) == list(range(500))
    counts = torch.bincount(whole.labels, minlength=10)
    assert torch.bincount(whole.labels[held.indices], minlength=10).tolist() == [round(0.1 * int(n)) for n in counts]
    x, y = held.batch([3, 0])
    expected = whole.batch([int(held.indices[3]), int(held.indices[0])])
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])
    assert (held.in_channels, held.classes) == (whole.in_channels, whole.classes)
    assert torch.equal(hold_out(whole, 0.1)[1].indices, held.indices)


def test_the_validation_part_picks_the_epoch(tmp_path: Path) -> None:
    base = {**SMALL, "data": {**SMALL["data"], "subset": 300, "validation": 0.2}}
    run = run_of(tmp_path / "run", base, train={"epochs": 6, "lr": 0.03})
    summary = train(run, Told())
    records = run.metrics()
    best = max(records, key=lambda record: record["validation_accuracy"])
    assert summary["rule"] == "best validation accuracy"
    assert (summary["epoch"], summary["test_accuracy"]) == (best["epoch"], best["test_accuracy"])
    assert best["epoch"] < 6  # or the last epoch's weights would do
    found = evaluate_run(run, run.settings, Silent())
    assert found["test_accuracy"] == summary["test_accuracy"]
    assert found["test_loss"] == pytest.approx(summary["test_loss"])
    assert not run.best.exists()


class Silent(Told):
    def work(self, what: str, total: int) -> None: ...
    def advance(self, count: int) -> None: ...


# --- batches ----------------------------------------------------------------------------------------------------------


AUGMENTS = [
    {"name": "random_crop", "padding": 2, "mode": "reflect"},
    {"name": "alternating_flip"},
    {"name": "trivial_augment"},
]


def batches(workers: int | None, augment: list[dict[str, Any]] = AUGMENTS, **changes: Any) -> Batches:
    settings = resolved(SMALL, train={"workers": workers, "augment": augment, "epochs": 3, **changes})
    dataset, _ = build_datasets(settings)
    pipeline = augmentation(augment, dataset.mean, dataset.std)
    return Batches(dataset, lambda epoch: epoch_order(64, 1, epoch), settings.train, pipeline, 1, 4)


def test_workers_change_nothing() -> None:
    """The same batches from another process, from any step on, whatever was drawn before."""
    torch.manual_seed(5)
    here = [batches(0)[step] for step in range(12)]
    beside = list(batches(1).loader(5))
    assert len(beside) == 7
    for a, b in zip(here[5:], beside, strict=True):
        for first, second in zip(a.parts, b.parts, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_a_process_prepares_what_takes_long() -> None:
    assert isinstance(batches(None, AUGMENTS[:2]).loader(0), map)
    assert not isinstance(batches(None).loader(11), map)


def test_alternating_flip_shows_every_image_both_ways() -> None:
    x = torch.arange(6.0).view(1, 1, 1, 6).repeat(1000, 1, 2, 1)
    indices = torch.randperm(5000)[:1000]
    first, second, third = (
        augmentation([{"name": "alternating_flip"}]).at(indices, epoch)(x, torch.zeros(1)) for epoch in range(3)
    )
    flipped = first[:, 0, 0, 0] == 5
    assert 400 < int(flipped.sum()) < 600
    assert torch.equal(second[:, 0, 0, 0] == 5, ~flipped)
    assert torch.equal(third, first)
    # Which images are flipped depends on their number alone.
    again = augmentation([{"name": "alternating_flip"}]).at(indices[:10], 0)(x[:10], torch.zeros(1))
    assert torch.equal(again, first[:10])


def test_a_run_learns_with_all_tools_together(tmp_path: Path) -> None:
    run = run_of(
        tmp_path / "run",
        {**SMALL, "data": {**SMALL["data"], "subset": 512, "validation": 0.1}},
        train={
            "epochs": 4,
            "batch_size": 32,
            "lr": 0.01,
            "schedule": "one_cycle",
            "warmup_epochs": 1.0,
            "ema": 0.9,
            "augment": [{"name": "random_crop", "padding": 1, "mode": "reflect"}],
            "initial_rate": 0.1,
            "steps": [{"T": 1, "epochs": 2}],
            "loss": {"name": "sdt", "label_smoothing": 0.1},
        },
    )
    summary = train(run, Told())
    assert summary["test_accuracy"] > 60


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_flips_are_beside_the_accuracy(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SMALL)
    train(run, Told())
    plain, both = evaluate_run(run, run.settings, Silent()), evaluate_run(run, run.settings, Silent(), flips=True)
    assert {key: both[key] for key in plain if key != "rates"} == {k: v for k, v in plain.items() if k != "rates"}
    _, images = build_datasets(run.settings, train=False)
    model = build_model(run.settings, 1, 10)
    model.load_state_dict(weights(run))
    x, y = images.batch(range(50))
    with torch.no_grad():
        logits = model.eval()(x).mean(0) + model(x.flip(-1)).mean(0)
    assert both["test_accuracy_flips"] == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_curve_that_goes_nowhere_is_said(tmp_path: Path) -> None:
    told = Told()
    dead = {**SMALL, "data": {**SMALL["data"], "subset": 1000}, "neuron": {"name": "LIF", "v_threshold": 100.0}}
    train(run_of(tmp_path / "run", dead, train={"epochs": 2, "batch_size": 100}), told)
    assert len(told.warnings) == 4
    assert "no better than guessing among 10 classes" in told.warnings[0]
    assert "train.initial_rate" in told.warnings[0]
    told = Told()
    lively = {**SMALL, "data": {**SMALL["data"], "subset": 1000}}
    train(run_of(tmp_path / "lively", lively, train={"batch_size": 20}), told)
    assert told.warnings == []
