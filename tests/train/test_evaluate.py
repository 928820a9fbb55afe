"""Evaluating finished runs: the numbers of the summary again, each image once, in any batch size."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import spikeloom
from spikeloom.cli.progress import Quiet
from spikeloom.errors import DataFileError
from spikeloom.files import load_tensors, save_tensors
from spikeloom.neurons import Neuron
from spikeloom.record import Recorder
from spikeloom.train.build import build_datasets
from spikeloom.train.evaluate import evaluate, evaluate_run, load_run
from spikeloom.train.loop import train
from spikeloom.train.losses import sdt, tet
from spikeloom.train.recipe import check_settings, merge
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings

NORMED: dict[str, Any] = {
    "data": {"name": "digits", "subset": 64, "test_subset": 50},
    "model": {"name": "report_sew_resnet34", "T": 2},
    "train": {"batch_size": 16, "epochs": 2, "lr": 0.1},
}


class Counting(Quiet):
    """Counts the images of the work that it is told of."""

    def __init__(self) -> None:
        self.total = self.counted = 0

    def work(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, count: int) -> None:
        self.counted += count


pytestmark = pytest.mark.usefixtures("one_thread")


def resolved(**changes: Any) -> Settings:
    return check_settings(merge(NORMED, changes), "here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.plan(tmp_path_factory.mktemp("finished") / "run", "quickstart/digits", "main", "full", resolved())
    train(run, Quiet())
    return run


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_run_is_evaluated_as_in_training(tmp_path: Path, channels_last: bool) -> None:
    settings = resolved(train={"channels_last": channels_last, "epochs": 1})
    run = Run.plan(tmp_path / "run", "quickstart/digits", "main", "full", settings)
    train(run, Quiet())
    for opened in (run, Run.open(run.folder)):
        result = evaluate_run(opened, opened.settings, Quiet())
        [record] = run.metrics()
        assert (result["test_accuracy"], result["test_loss"]) == (record["test_accuracy"], record["test_loss"])


def test_evaluating_twice_gives_the_same(finished: Run) -> None:
    weights = finished.weights.read_bytes()
    assert evaluate_run(finished, finished.settings, Quiet()) == evaluate_run(finished, finished.settings, Quiet())
    assert finished.weights.read_bytes() == weights


def test_the_numbers_by_hand(finished: Run) -> None:
    counting = Counting()
    result = evaluate_run(finished, finished.settings, counting)
    assert counting.total == counting.counted == 50
    _, images = build_datasets(finished.settings, train=False)
    model = load_run(finished, 1, 10).eval()
    x, y = images.batch(range(50))
    with torch.no_grad(), Recorder(model) as record:
        logits = model(x)
    assert result["test_accuracy"] == 100 * int((logits.mean(0).argmax(1) == y).sum()) / 50
    assert result["test_loss"] == pytest.approx(sdt(logits, y).item(), rel=1e-5)
    assert list(result["rates"]) == [name for name, m in model.named_modules() if isinstance(m, Neuron)]
    assert result["rates"] == pytest.approx(record.rates(), abs=1e-4)
    assert result["run"] == str(finished.folder)
    assert result["data"] == "digits (scikit-learn), first 50 images"


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 64])
def test_the_batch_size_does_not_matter(finished: Run, batch_size: int) -> None:
    # 50 images, so the last batch is often a small one: each image counts the same.
    settings = resolved(train={"batch_size": batch_size})
    _, images = build_datasets(settings, train=False)

    class Fixed(nn.Module):
        """Logits that depend on the image alone, without rounding."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1)[:, 20:30], x.flatten(1)[:, 30:40]])

    accelerator = Accelerator(cpu=True)
    x, y = images.batch(range(50))
    for loss in (sdt, functools.partial(tet, lam=0.5)):
        result = evaluate(Fixed(), images, settings.train, loss, accelerator)
        assert result["test_loss"] == pytest.approx(loss(Fixed()(x), y).item(), rel=1e-6)
        assert result["test_accuracy"] == 100 * int((Fixed()(x).mean(0).argmax(1) == y).sum()) / 50


def test_evaluation_uses_the_running_statistics(finished: Run) -> None:
    # One image at a time: statistics of the batch would make every norm give its bias.
    _, images = build_datasets(finished.settings, train=False)
    model = load_run(finished, 1, 10).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, images, resolved(train={"batch_size": 1}).train, sdt, Accelerator(cpu=True))
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_data_may_be_named(finished: Run) -> None:
    result = evaluate_run(finished, resolved(data={"test_subset": 10}), Quiet())
    assert result["data"] == "digits (scikit-learn), first 10 images"


def test_load_run(finished: Run) -> None:
    model = load_run(finished, 1, 10)
    tensors, _ = load_tensors(finished.weights)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_an_unfinished_run(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    with pytest.raises(DataFileError, match="is not finished; continue it with: spikeloom train --resume "):
        load_run(Run.open(tmp_path / "run"), 1, 10)


def test_weights_of_another_number_of_classes(finished: Run) -> None:
    with pytest.raises(DataFileError, match=r"head\.weight has shape \(10, 64\), the model's has \(7, 64\)"):
        load_run(finished, 1, 7)


def test_weights_without_a_layer(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run")
    tensors, information = load_tensors(finished.weights)
    del tensors["blocks.3.spike.norm.bias"]
    save_tensors(tmp_path / "run" / "model.safetensors", tensors, information)
    with pytest.raises(DataFileError, match=r"it has no blocks\.3\.spike\.norm\.bias"):
        load_run(Run.open(tmp_path / "run"), 1, 10)


# --- the model alone --------------------------------------------------------------------------------------------------


def test_a_finished_run_gives_its_model_without_its_data(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "moved")
    # Data that are nowhere: nothing of them is asked for.
    text = (tmp_path / "moved" / "settings.json").read_text()
    (tmp_path / "moved" / "settings.json").write_text(text.replace('"digits"', '"mnist"'))
    expected = load_run(finished, 1, 10).eval()
    x = torch.rand(3, 1, 8, 8)
    for folder in (tmp_path / "moved", str(tmp_path / "moved")):
        torch.manual_seed(5)
        before = torch.rand(3)
        torch.manual_seed(5)
        model = spikeloom.load(folder)
        assert torch.equal(torch.rand(3), before), "the caller's random numbers stay as they are"
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))


def test_an_older_run_asks_its_data(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "old")
    tensors, information = load_tensors(finished.weights)
    assert information.pop("made_for") == {"in_channels": 1, "num_classes": 10}
    save_tensors(tmp_path / "old" / "model.safetensors", tensors, information)
    assert spikeloom.load(tmp_path / "old").head.out_features == 10


def test_what_is_no_finished_run(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="is not a run: it has no settings"):
        spikeloom.load(tmp_path)
    with pytest.raises(DataFileError, match=r"is a file: give a run's folder; .* read by spikeloom\.deploy\.load"):
        spikeloom.load(finished.weights)
    shutil.copytree(finished.folder, tmp_path / "begun")
    (tmp_path / "begun" / "model.safetensors").unlink()
    with pytest.raises(DataFileError, match="is not finished; continue it with"):
        spikeloom.load(tmp_path / "begun")
