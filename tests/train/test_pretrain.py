"""Pre-training in the loop, starting from another run, and the transformers' training: mixing, schedule, decay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeloom.cli.progress import Quiet
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import load_tensors
from spikeloom.models import create_model
from spikeloom.reproduce import reproduce
from spikeloom.train import build
from spikeloom.train.batches import mixing
from spikeloom.train.build import build_datasets
from spikeloom.train.evaluate import evaluate_run
from spikeloom.train.loop import train
from spikeloom.train.losses import reconstruction, sdt, tet
from spikeloom.train.optim import build_optimizer, build_schedule
from spikeloom.train.pretrain import start_from
from spikeloom.train.recipe import check_settings, load_recipe, merge
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings

SIZE = {"in_channels": 1, "num_classes": 10}
PRETRAIN: dict[str, Any] = {
    "data": {"name": "digits", "subset": 64, "test_subset": 20, "size": 16},
    "model": {
        "name": "masked_autoencoder",
        "encoder": "spikformer_v2_2_64",
        "image_size": 16,
        "decoder_width": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
    "train": {"epochs": 2, "batch_size": 16, "loss": "reconstruction", "optimizer": "adamw", "lr": 2e-3},
}
FINETUNE: dict[str, Any] = {
    "data": {"name": "digits", "subset": 32, "test_subset": 20, "size": 16},
    "model": {"name": "spikformer_v2_2_64", "T": 1},
    "train": {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "lr": 1e-3},
}


def settings_of(base: dict[str, Any], **changes: Any) -> Settings:
    return check_settings(merge(base, changes), "here")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.plan(tmp_path_factory.mktemp("pretrain") / "run", "here", "main", "full", settings_of(PRETRAIN))
    train(run, Quiet())
    return run


def test_a_model_with_an_error_for_output(pretrained: Run) -> None:
    summary = pretrained.summary()
    assert summary is not None
    records = pretrained.metrics()
    assert all(r["test_accuracy"] is None and r["train_accuracy"] is None for r in records)
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert summary["test_loss"] == records[-1]["test_loss"]
    assert summary["best_epoch"] == min(records, key=lambda r: r["test_loss"])["epoch"]
    assert summary["test_accuracy"] is summary["best_test_accuracy"] is None


def test_reconstructions_are_not_counted_among_the_five_likeliest_classes(
    pretrained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikeloom.train.evaluate.MANY_CLASSES", 10)  # as many as the digits have
    found = evaluate_run(pretrained, pretrained.settings, Quiet())
    assert found["test_top5"] is None
    assert found["test_accuracy"] is None


def test_pictures_are_written(pretrained: Run) -> None:
    from PIL import Image

    with Image.open(pretrained.folder / "pictures.png") as image:
        assert image.size == (3 * 18 * 4, 8 * 18 * 4)
        pixels = np.asarray(image)[::4, ::4]  # one of each enlarged pixel
    rows = pixels.reshape(8, 18, 3, 18)[:, 1:-1, :, 1:-1]
    _, test_set = build_datasets(pretrained.settings, train=False)
    assert np.array_equal(rows[:, :, 0], test_set.images[:8, 0].numpy())
    assert not np.array_equal(rows[:, :, 0], rows[:, :, 1])
    assert not np.array_equal(rows[:, :, 2], rows[:, :, 1])


def test_the_decoder_is_left_behind(pretrained: Run, tmp_path: Path) -> None:
    model = create_model("spikformer_v2_2_64", **SIZE)
    assert start_from(model, str(pretrained.folder)) == ["head.weight", "head.bias"]
    trained = load_tensors(pretrained.weights)[0]
    assert any(name.startswith("decoder.") for name in trained)
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, trained[name])
    told: list[str] = []
    quiet = Quiet()
    quiet.warn = told.append
    run = Run.plan(
        tmp_path / "run", "here", "main", "full", settings_of(FINETUNE, train={"start_from": str(pretrained.folder)})
    )
    assert train(run, quiet)["test_accuracy"] is not None
    assert any("drawn anew" in line and "head.weight, head.bias" in line for line in told)
    change = (load_tensors(run.weights)[0]["stem.0.0.weight"] - trained["stem.0.0.weight"]).abs().max()
    assert 0 < change < 0.02, "two steps of AdamW from there"


def test_where_a_run_cannot_start_from(pretrained: Run, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="is not a run"):
        start_from(create_model("spikformer_v2_2_64", **SIZE), str(tmp_path))
    with pytest.raises(DataFileError, match=r"none of the weights of .* fits: it trained masked_autoencoder"):
        start_from(create_model("report_vgg16", **SIZE), str(pretrained.folder))


def test_a_row_that_starts_from_another_recipe_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "create_dataset", lambda name, root, split, **o: digits(split, **o))
    recipe = load_recipe("spikformer_v2/finetune")
    places = (tmp_path / "runs", tmp_path / "results")
    for _ in range(2):  # the second time nothing is trained
        [record] = reproduce(recipe, ["pretrained"], "smoke", {}, *places, Quiet(), lambda: False)
    start = Path(record["settings"]["train"]["start_from"])
    assert start.parent == tmp_path / "runs" / "spikformer_v2-pretrain"
    assert json.loads((start / "summary.json").read_text())["model"] == "masked_autoencoder"
    assert len(list((tmp_path / "runs").glob("*/*"))) == 2


def digits(split: str, **options: Any) -> Any:
    from spikeloom.data import create_dataset

    return create_dataset("digits", None, split, size=28, subset=options["subset"])


def test_reconstruction_is_a_mean_square() -> None:
    error = torch.randn(1, 3, 5, 7)
    torch.testing.assert_close(reconstruction(error, torch.zeros(3)), (error**2).mean())


# --- mixing -----------------------------------------------------------------------------------------------------------


def mixed(x: torch.Tensor, y: torch.Tensor, epoch: int = 0, **mix: Any) -> tuple[torch.Tensor, torch.Tensor]:
    t = settings_of(FINETUNE, train={"mix": mix}).train
    return mixing(t, 10, epoch)(x.clone(), y)


def test_mixup_and_cutmix() -> None:
    np.random.seed(2)
    x, y = torch.randn(6, 2, 8, 8), torch.tensor([3, 1, 4, 1, 5, 9])
    out, weights = mixed(x, y, mixup=1.0)
    lam = weights[0, 3].item()
    assert 0 < lam < 1
    torch.testing.assert_close(out, lam * x + (1 - lam) * x.flip(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert weights[0, 9].item() == pytest.approx(1 - lam, abs=1e-6)
    out, weights = mixed(x, y, cutmix=1.0)
    kept = (out == x)[:, 0].float().mean((1, 2))
    assert torch.equal((out == x) | (out == x.flip(0)), torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(weights[0, 3], kept[0])


def test_mixing_ends() -> None:
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    assert mixed(x, y, 4, mixup=0.5, until=5)[1].shape == (4, 10)
    same, labels = mixed(x, y, 5, mixup=0.5, until=5)
    assert torch.equal(same, x)
    assert labels is y
    with pytest.raises(UsageError, match=r"train\.mix needs an even train.batch_size, got 15"):
        mixing(settings_of(FINETUNE, train={"mix": {"mixup": 0.5}, "batch_size": 15}).train, 10, 0)
    with pytest.raises(UsageError, match="mixup or cutmix must be above 0"):
        settings_of(FINETUNE, train={"mix": {"p": 0.5}})


def test_losses_take_weights_of_classes() -> None:
    logits, y = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    weights = torch.nn.functional.one_hot(y, 4).float()
    for loss in (sdt, tet):
        for smoothing in (0.0, 0.1):
            torch.testing.assert_close(
                loss(logits, weights, label_smoothing=smoothing), loss(logits, y, label_smoothing=smoothing)
            )


def test_a_mixed_run(tmp_path: Path) -> None:
    changes = {"mix": {"mixup": 0.5, "cutmix": 1.0}, "augment": [{"name": "rand_augment"}, {"name": "random_erase"}]}
    runs = [Run.plan(tmp_path / str(i), "here", "main", "full", settings_of(FINETUNE, train=changes)) for i in range(2)]
    summaries = [train(run, Quiet()) for run in runs]
    assert 0 <= summaries[0]["test_accuracy"] <= 100
    first, second = (load_tensors(run.weights)[0] for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first), "timm's draws are seeded"


# --- schedule and decay -----------------------------------------------------------------------------------------------


def test_the_cosine_of_the_transformers() -> None:
    t = settings_of(
        FINETUNE,
        train={"lr": 0.5, "epochs": 8, "warmup_epochs": 2.0, "warmup_lr": 0.1, "min_lr": 0.05, "cooldown_epochs": 2.0},
    ).train
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], t.lr)
    schedule = build_schedule(t, optimizer, 10)
    rates = []
    for step in range(80):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.3)
    for step in (20, 35, 59):
        assert rates[step] == pytest.approx(0.05 + 0.45 * (1 + np.cos(np.pi * step / 60)) / 2)
    assert rates[60:] == pytest.approx([0.05] * 20)


@pytest.mark.parametrize("decay_all", [True, False])
def test_decay_of_norms_and_biases(decay_all: bool) -> None:
    t = settings_of(FINETUNE, train={"weight_decay": 0.1, "lr": 0.01, "decay_all": decay_all}).train
    model = create_model("spikformer_2_384", channels=16, heads=2, depth=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(t, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.001 * (decay_all or p.dim() > 1)
        torch.testing.assert_close(p.detach(), before[name] * factor)
