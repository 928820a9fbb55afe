"""`spikeloom.train.fit` and `train_recipe`: the loop of `spikeloom train` from Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import spikeloom
from helpers.small_runs import SMALL, Told, equal, run_of, weights
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from spikeloom.data import create_dataset
from spikeloom.errors import UsageError
from spikeloom.files import load_tensors
from spikeloom.layers import Linear
from spikeloom.models import create_model
from spikeloom.neurons import LIF, LeakyIntegrator, Neuron
from spikeloom.train import fit, train_recipe
from spikeloom.train.build import build_model
from spikeloom.train.loop import train
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "optimizer": "adam", "lr": 0.01, "schedule": "constant"}


class Flat(nn.Module):
    """Images for three steps, or sequences, of 64 numbers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(64, 40), LIF(v_threshold=0.5), Linear(40, classes), LeakyIntegrator())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2) if x.dim() == 5 or x.shape[1] != 1 else x.flatten(1).expand(3, -1, -1)
        return self.layers(x)


def model(seed: int = 0) -> Flat:
    torch.manual_seed(seed)
    return Flat()


def digits(part: str = "train", count: int = 96) -> TensorDataset:
    x, y = create_dataset("digits", None, part, subset=count).batch(range(count))
    return TensorDataset(x, y)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Digits one after the other, from another one on in every epoch."""

    def __init__(self, count: int = 96):
        self.data, self.epoch = digits(count=count), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for i in range(len(self.data)):
            x, y = self.data[(i + 7 * self.epoch) % len(self.data)]
            yield x, int(y)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_it_is_the_loop_of_recipes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "recipe", SMALL, train={"epochs": 2})
    train(run, Told())
    network = build_model(run.settings, 1, 10)
    parts = [create_dataset("digits", None, part, subset=n, size=16) for part, n in (("train", 64), ("test", 50))]
    summary = fit(network, *parts, out=tmp_path / "fit", progress=Told(), **{**SMALL["train"], "epochs": 2})
    assert equal(state(network), weights(run))
    folders = (tmp_path / "recipe", tmp_path / "fit")
    found = run.summary()
    assert found is not None
    assert summary["test_accuracy"] == found["test_accuracy"]
    losses = [[record["train_loss"] for record in Run.open(folder, given=True).metrics()] for folder in folders]
    assert losses[0] == losses[1]


def test_training_keeps_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("spikeloom.train.fitting.keep_memory", lambda: calls.append("kept"))
    fit(model(), digits(), digits("test"), out=tmp_path / "fit", **SETTINGS | {"epochs": 1})
    words = ("train.epochs=1", "data.subset=32", "data.test_subset=16", "train.batch_size=16", "model.T=1")
    train_recipe("quickstart/digits", *words, out=tmp_path / "recipe")
    assert calls == ["kept", "kept"]


def test_a_network_learns_digits_from_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    summary = fit(network, digits(count=600), digits("test", 200), out=tmp_path / "run", **SETTINGS)
    assert summary["test_accuracy"] > 80
    assert summary["data"] == {"train": "TensorDataset (train)", "test": "TensorDataset (test)"}
    assert summary["classes"] == [str(i) for i in range(10)]
    tensors, about = load_tensors(tmp_path / "run" / "model.safetensors")
    assert equal(tensors, state(network))
    assert about["model"]["class"].endswith("Flat")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3
    assert lines[-1].startswith("epoch 3: train loss ")
    x, y = digits("test", 200)[:]
    with torch.no_grad():
        right = network.eval()(x).mean(0).argmax(1) == y
    assert float(right.sum()) / 2 == summary["test_accuracy"]


def test_a_setting_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^fit: train\.momentum needs train\.optimizer=sgd, which is adam here$"):
        fit(model(), digits(), digits("test"), out=tmp_path / "run", **SETTINGS, momentum=0.8)
    assert not (tmp_path / "run").exists()


class Broken(Exception):
    pass


def breaking(after: int) -> Any:
    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == after:
            raise Broken

    return callback


@pytest.mark.parametrize("streamed", [False, True])
def test_it_goes_on_where_it_was_stopped(streamed: bool, tmp_path: Path) -> None:
    def again(folder: str, callbacks: Any = ()) -> Flat:
        network = model()
        given: Any = Stream(90) if streamed else digits()
        more: dict[str, Any] = {"classes": 10, "epoch_samples": 80} if streamed else {}
        fit(
            network,
            given,
            digits("test", 40),
            out=tmp_path / folder,
            progress=Told(),
            callbacks=callbacks,
            **more,
            **SETTINGS,
        )
        return network

    whole = again("whole")
    with pytest.raises(Broken):
        again("parts", [breaking(2)])
    assert equal(state(again("parts")), state(whole))
    assert equal(state(again("parts")), state(whole))  # finished


def test_a_model_has_its_steps_and_neurons_again_wherever_training_stops(tmp_path: Path) -> None:
    """Else the same model would go on with those of the stage for its own."""
    steps = [{"T": 1, "epochs": 2, "neuron": "MLF"}]
    settings = {**SETTINGS, "steps": steps, "batch_size": 48}

    def network() -> Any:
        torch.manual_seed(0)
        return create_model("report_sew_resnet34", in_channels=1, T=2)

    def learn(one: Any, folder: str, callbacks: Any = ()) -> None:
        out = tmp_path / folder
        fit(one, digits(), digits("test", 40), out=out, progress=Told(), callbacks=callbacks, **settings)

    whole, parts = network(), network()
    own = [module for module in parts.modules() if isinstance(module, Neuron)]
    learn(whole, "whole")
    with pytest.raises(Broken):
        learn(parts, "parts", [breaking(1)])
    assert parts.T == 2
    assert [module for module in parts.modules() if isinstance(module, Neuron)] == own
    learn(parts, "parts")
    assert equal(state(parts), state(whole))


def test_a_stream_is_read_in_its_order(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counted(Stream):
        def __iter__(self) -> Iterator[tuple[Tensor, int]]:
            for n, sample in enumerate(super().__iter__()):
                seen.append(100 * self.epoch + n)
                yield sample

    more = {**SETTINGS, "epochs": 2, "workers": 0}
    fit(model(), Counted(40), Stream(30), out=tmp_path / "run", progress=Told(), classes=10, epoch_samples=48, **more)
    # One for its shape, one tried; 48 of 40, which begin again; a batch for the rates after the first epoch.
    assert seen == [0, 0, *range(40), *range(8), *range(16), *range(100, 140), *range(100, 108)]


def test_sequences_of_any_length(tmp_path: Path) -> None:
    x, y = digits()[:]
    sequences = TensorDataset(x.flatten(1).unsqueeze(1).expand(-1, 5, -1), y)
    summary = fit(
        model(), *[sequences] * 2, out=tmp_path / "run", sequences=True, validation=0.25, progress=Told(), **SETTINGS
    )
    assert summary["rule"] == "best validation accuracy"
    assert summary["test_accuracy"] > 20


def test_a_callback_ends_the_run(tmp_path: Path) -> None:
    records: list[Any] = []

    def enough(record: dict[str, Any]) -> bool:
        records.append(record)
        return record["epoch"] == 2

    summary = fit(
        model(),
        digits(),
        digits("test", 30),
        out=tmp_path / "run",
        progress=Told(),
        callbacks=[enough],
        **{
            **SETTINGS,
            "epochs": 9,
        },
    )
    assert summary["epochs"] == len(records) == 2
    assert {"train_loss", "test_accuracy", "lr"} <= records[0].keys()


def test_commands_say_whose_run_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(model(), digits(), digits("test", 30), out=folder, progress=Told(), **{**SETTINGS, "epochs": 1})
    for words in (("evaluate", str(folder)), ("audit", str(folder)), ("run", str(folder))):
        result = spikeloom(*words)
        assert result.code == 2
        assert "is a run of spikeloom.train.fit, whose model and data are yours alone" in result.err
        assert result.err.count("\n") == 1


class Odd(Dataset[Any]):
    def __init__(self, sample: Any):
        self.sample = sample

    def __getitem__(self, index: int) -> Any:
        return self.sample

    def __len__(self) -> int:
        return 32


IMAGE = torch.zeros(1, 8, 8)


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (Odd(IMAGE), {}, r"samples of the train set must be pairs \(x, y\) of an image \[C, H, W\]"),
        (Odd((torch.zeros(1, 8, 8, dtype=torch.uint8), 1)), {}, "must be of a floating-point type, got torch.uint8"),
        (Odd((torch.zeros(5, 64), 1)), {}, r"got shape \(5, 64\); of sequences give sequences=True"),
        (TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), {}, "the train set has no samples"),
        (Stream(), {}, "an iterable train set has no length: say how many samples make an epoch, epoch_samples=N"),
        (Stream(), {"epoch_samples": 32}, "the classes of a stream are not known before it is read: give classes=N"),
        (Stream(), {"epoch_samples": 32, "classes": 10, "validation": 0.1}, "labels of a stream are not known"),
        (7, {}, r"the train set must be a PyTorch data set of pairs \(x, y\), got int"),
        (digits(), {"lr": "high"}, "fit: train.lr: .* got 'high'"),
        (digits(), {"learning_rate": 1.0}, "fit: unknown key 'train.learning_rate'"),
        (digits(), {"batch_size": 200}, "a batch of 200 images .* is larger than the 96 training images"),
    ],
)
def test_what_cannot_be_used(given: Any, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fit(model(), given, digits("test", 30), out=tmp_path / "run", progress=Told(), **{**SETTINGS, **more})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda x, y: (x, y + 5), "a sample has the label 14, its classes are 0 to 9"),
        (lambda x, y: (x, y - 5), "a sample has the label -5, its classes are 0 to 9"),
        (lambda x, y: (x / 0, y), "inputs of a batch hold NaN or infinite numbers"),
    ],
)
def test_samples_that_cannot_be_learned(spoilt: Any, message: str, tmp_path: Path) -> None:
    parts = digits(), TensorDataset(*spoilt(*digits("test", 30).tensors))
    for n, (train_set, test_set) in enumerate((parts, parts[::-1])):
        with pytest.raises(UsageError, match=message):
            fit(model(), train_set, test_set, classes=10, out=tmp_path / f"run{n}", progress=Told(), **SETTINGS)


def test_a_folder_of_another_run(tmp_path: Path) -> None:
    parts = (digits(), digits("test", 30))
    fit(model(), *parts, out=tmp_path / "run", progress=Told(), **{**SETTINGS, "epochs": 1})
    with pytest.raises(UsageError, match=r"holds a run with other settings: choose another folder with out="):
        fit(model(), *parts, out=tmp_path / "run", progress=Told(), **SETTINGS)
    train(run_of(tmp_path / "recipe", SMALL), Told())
    with pytest.raises(UsageError, match=r"holds a run with other settings"):
        fit(model(), *parts, out=tmp_path / "recipe", progress=Told(), **SETTINGS)


# --- a recipe from Python ---------------------------------------------------------------------------------------------


def test_a_recipe_trains_as_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("budget=smoke", "data.subset=64", "model.T=1")
    summary = train_recipe("quickstart/digits", *words, out=tmp_path / "python")
    assert "epoch 1: train loss" in capsys.readouterr().out
    assert spikeloom("train", "quickstart/digits", *words, "--out", str(tmp_path / "line")).code == 0
    runs = [Run.open(tmp_path / name) for name in ("python", "line")]
    assert equal(weights(runs[0]), weights(runs[1]))
    assert (runs[0].recipe, runs[0].row, runs[0].budget) == ("quickstart/digits", "main", "smoke")
    assert train_recipe("quickstart/digits", *words, out=tmp_path / "python") == summary  # finished: nothing is trained


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report/table2",), "report/table2 has several rows: name one, as in 'report/table2#s0t2a'"),
        (("quickstart/digit",), "unknown recipe 'quickstart/digit'"),
        (("quickstart/digits#row",), "has no row 'row'"),
        (("quickstart/digits", "budget=tiny"), "unknown budget 'tiny'"),
        (("quickstart/digits", "train.lrs=1"), "unknown key 'train.lrs'"),
        (("quickstart/digits", "epochs"), "expected key=value, got 'epochs'"),
    ],
)
def test_a_wrong_recipe_leaves_nothing(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train_recipe(*words, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_recipe_needs_another_folder(tmp_path: Path) -> None:
    words = ("budget=smoke", "data.subset=64", "model.T=1")
    train_recipe("quickstart/digits", *words, out=tmp_path, progress=Told())
    with pytest.raises(UsageError, match="holds a run with other settings: choose another folder with out="):
        train_recipe("quickstart/digits", *words, "seed=2", out=tmp_path, progress=Told())
