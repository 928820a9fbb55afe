"""`spikeloom import`: weights from elsewhere as a run, which the other commands take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import spikeloom
from torch import nn

import spikeloom as package
from spikeloom.models import create_model
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ["data=digits", "data.size=16", "data.test_subset=60"]
MODEL = ["--model", "colored_mnist_net", "model.image_size=16", "model.T=2"]


class Elsewhere(nn.Module):
    """The layers of `colored_mnist_net` by other names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        shapes = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.stages = nn.ModuleList()
        for module in shapes:
            if isinstance(module, nn.Conv2d):
                size: Any = module.kernel_size
                self.stages.append(nn.Conv2d(module.in_channels, module.out_channels, size))
            else:
                self.stages.append(nn.Linear(module.in_features, module.out_features))
        for stage, module in zip(self.stages, shapes, strict=True):
            stage.load_state_dict(module.state_dict())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(3)
    model = create_model("colored_mnist_net", in_channels=1, num_classes=10, T=2, image_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    torch.save({"model": Elsewhere(model).state_dict()}, home / "net.pth")
    torch.save(model.state_dict(), home / "ours.pth")
    done = spikeloom("import", str(home / "net.pth"), *MODEL, *DATA, "--out", str(home / "run"))
    assert done.code == 0, done.err
    assert "8 tensors of" in done.out
    assert "neuron: its own" in done.out
    assert f"next:  spikeloom audit {home / 'run'}" in done.out
    return home


def test_the_run_has_the_weights(home: Path) -> None:
    loaded = package.load(home / "run").state_dict()
    expected = torch.load(home / "ours.pth")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    run = Run.open(home / "run")
    assert (run.title, run.settings.model.name, run.settings.data.name) == ("imported", "colored_mnist_net", "digits")
    summary = run.summary()
    assert summary is not None
    assert (summary["epochs"], summary["seconds"], summary["imported_from"]) == (0, 0.0, str(home / "net.pth"))


def test_other_commands_take_it(home: Path) -> None:
    run = str(home / "run")
    found = json.loads(spikeloom("evaluate", run, "--json").out)
    assert found["test_accuracy"] == Run.open(run).summary()["test_accuracy"]  # pyright: ignore
    assert any(rate > 0 for rate in found["rates"].values())
    for command in (("audit", run, "--images", "8"), ("run", run, "--images", "8"), ("report", run)):
        done = spikeloom(*command)
        assert done.code == 0, (command, done.err)
        assert "unfinished" not in done.out + done.err
        assert "unknown recipe" not in done.out + done.err
    page = (home / "run" / "report.html").read_text()
    assert f"imported from {home / 'net.pth'}" in page
    done = spikeloom("train", "--resume", run)
    assert done.code == 2
    assert "is finished: evaluate it with" in done.err
    assert spikeloom("train", "--resume", run, "train.epochs=9").err == done.err, "it was not trained here"


def test_a_neuron_and_other_settings(home: Path, tmp_path: Path) -> None:
    words = ["neuron=LIF", "neuron.tau=3.0", "train.batch_size=30", "--json"]
    done = spikeloom("import", str(home / "ours.pth"), *MODEL, *DATA, *words, "--out", str(tmp_path / "run"))
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["matched"]) == 8
    neurons = [m for m in package.load(tmp_path / "run").modules() if type(m).__name__ == "LIF"]
    assert {neuron.tau for neuron in neurons} == {3.0}


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no data": ([*MODEL], "the data are missing: give data=NAME"),
    "a name twice": ([*MODEL, *DATA, "model.name=sew_resnet18"], "the model is colored_mnist_net: give its options"),
    "an unknown model": (["--model", "colored_mnist", *DATA], "unknown model 'colored_mnist'; did you mean colored_mn"),
    "another size": (["--model", "colored_mnist_net", "data=digits"], "does not fit colored_mnist_net with 1 channels"),
    "an unknown key": ([*MODEL, *DATA, "modle.T=2"], "unknown key 'modle'; did you mean model or --model?"),
    "a wrong option": ([*MODEL, *DATA, "model.steps=2"], "steps"),
    "a wrong neuron": ([*MODEL, *DATA, "neuron=LIFF"], "LIFF"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(home: Path, tmp_path: Path, kind: str) -> None:
    words, message = MISTAKES[kind]
    done = spikeloom("import", str(home / "net.pth"), *words, "--out", str(tmp_path / "run"))
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_files_and_folders(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no")
    tensors = torch.load(home / "ours.pth")
    torch.save({"model": tensors, "args": argparse.Namespace()}, tmp_path / "objects.pth")
    tensors[next(iter(tensors))][0] = torch.nan
    torch.save(tensors, tmp_path / "nan.pth")
    for file, out, message in (
        (tmp_path / "objects.pth", tmp_path / "run", 'alone with torch.save(checkpoint["model"]'),
        (tmp_path / "nan.pth", tmp_path / "run", "has NaN or infinite numbers for"),
        (home / "none.pth", tmp_path / "run", "there is no file"),
        (tmp_path / "text.pth", tmp_path / "run", "is no safetensors or torch.save file of weights"),
        (home / "net.pth", home / "run", "is not empty"),
    ):
        done = spikeloom("import", str(file), *MODEL, *DATA, "--out", str(out))
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert message in done.err
