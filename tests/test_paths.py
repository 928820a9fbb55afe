"""Every function that takes a file or a folder takes a string, a `Path` and any other `os.PathLike`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import spikeloom
from spikeloom import analyse, deploy, files
from spikeloom.analyse.load import open_target
from spikeloom.analyse.papers.attention_inputs import attention_inputs
from spikeloom.analyse.papers.figures import confusions
from spikeloom.analyse.plots import draw_figures, read_figure, write_figure
from spikeloom.analyse.report.data import gather_run, read_signed, write_signed
from spikeloom.bench import events as bench_events
from spikeloom.bench.write import earlier_results, write_results
from spikeloom.cards import write_weights
from spikeloom.cli.progress import Quiet
from spikeloom.data import create_dataset
from spikeloom.deploy.exchange.export import export_file
from spikeloom.layers import Conv2d, Flatten, Linear
from spikeloom.models import copy_weights, create_model, load_spikingjelly
from spikeloom.models._ann_weights import load_ann
from spikeloom.models.spikingjelly import read_layers
from spikeloom.models.trained_weights import read_weights, run_folder
from spikeloom.models.weight_source import layers_of
from spikeloom.neurons import LIF
from spikeloom.play import play
from spikeloom.predict import find_files, predict
from spikeloom.reproduce import recorded_figures, reproduce
from spikeloom.scores import scoreboard
from spikeloom.show import show
from spikeloom.sweep import place_of, planned
from spikeloom.sweep import plan as plan_sweep
from spikeloom.train import fit, train_recipe
from spikeloom.train.build import build_model
from spikeloom.train.evaluate import load_classifier
from spikeloom.train.imported import import_weights
from spikeloom.train.list_runs import compare_runs, describe_run, find_runs
from spikeloom.train.loop import train
from spikeloom.train.pretrain import start_from, write_pictures
from spikeloom.train.recipe import check_settings, load_recipe
from spikeloom.train.run import Run, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

# The readers of data have a test of their own; the command line takes words.
ELSEWHERE = ("spikeloom.data", "spikeloom.cli", "spikeloom.__main__", "spikeloom._native")
# Records of what was found; the folder of a `Run`; settings, which `start_from` below has; and benchmarks that take
# seconds or minutes, whose files go through `recordings` and `write_results`.
RECORDS = {
    "Search",
    "Trial",
    "RunData",
    "OnnxFile",
    "Played",
    "Prediction",
    "Shown",
    "Weights",
    "locked",
    "DataSettings",
}
BENCHMARKS = {"bench_audit", "bench_events", "bench_methods", "bench_neurons", "frame_rows"}
OF_FILES = {"path", "file", "folder", "folders", "out", "root", "run", "runs", "results"}


class Named:
    """A path of somebody else's kind."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions of the package, and the public methods of its classes, by `name` or `Class.name`."""
    for module in pkgutil.walk_packages(spikeloom.__path__, "spikeloom."):
        if module.name.startswith(ELSEWHERE):
            continue
        for name, entry in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(entry, "__module__", None) != module.name:
                continue
            if inspect.isfunction(entry):
                yield name, entry
            elif inspect.isclass(entry):
                yield name, entry
                for own in vars(entry):
                    member = getattr(entry, own, None)
                    if not own.startswith("_") and inspect.isroutine(member) and callable(member):
                        yield f"{name}.{own}", getattr(entry, own)


def hints() -> dict[str, list[str]]:
    """The annotations of parameters that are files, by function."""
    found: dict[str, list[str]] = {}
    for name, function in functions():
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # of a class that has none
            continue
        for parameter in parameters:
            hint = str(parameter.annotation)
            if re.search(r"Path\b|PathLike", hint) or (parameter.name in OF_FILES and re.search(r"\bstr\b", hint)):
                found.setdefault(name, []).append(hint)
    return found


# Their annotations name a file by an alias.
ALIASED = {"copy_weights", "layers_of", "load_ann", "load_spikingjelly", "read_layers"}
# Parameters that only sound like files.
OTHERS = {"metric_curves": "runs", "changes": "path"}
# Of the package's own use: they are given paths.
OTHERS |= dict.fromkeys(("cannot_write", "make_folder"), "path")


def test_signatures_say_so() -> None:
    wrong = {
        name: [hint for hint in found if "PathLike" not in hint]
        for name, found in hints().items()
        if name not in OTHERS
    }
    assert {name for name, found in wrong.items() if found} == {"Run", *RECORDS}


def test_all_are_called_below() -> None:
    assert set(hints()) - set(OTHERS) - RECORDS - BENCHMARKS == set(CALLS) - ALIASED


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, a model file, an engine, a graph, and a folder of events."""
    home = tmp_path_factory.mktemp("home")
    settings = {
        "data": {"name": "digits", "subset": 32, "test_subset": 20, "size": 16},
        "model": {"name": "colored_mnist_net", "T": 2, "image_size": 16},
        "train": {"batch_size": 16, "epochs": 1, "lr": 0.01},
    }
    train(Run.plan(home / "run", "quickstart/digits", "main", "full", check_settings(settings, "here")), Quiet())
    analyse.write_report([home / "run"], {}, Quiet())
    x = torch.rand(2, 3, 2, 8, 8)
    deploy.compile(network(), x, tune=False).save(home / "engine.safetensors")
    deploy.write_nir(deploy.to_nir(network(), x), home / "net.nir")
    torch.save(files.load_tensors(home / "run/model.safetensors")[0], home / "net.pth")
    write_results(home, "bench", {"table": [{"a": 1}]})
    write_figure(home / "figure.json", go.Figure(go.Scatter(y=[1, 2])))
    place = home / "recorded" / "quickstart" / "digits" / "figures"
    write_figure(place / "main.full.seed1.a.json", go.Figure(go.Scatter(y=[1, 2])))
    (home / "pictures").mkdir()
    Image.new("L", (8, 8), 200).save(home / "pictures" / "grey.png")
    (home / "events").mkdir()
    (home / "events" / "one.bin").write_bytes(bytes([1, 2, 128, 0, 1] * 20))
    source = Path(spikeloom.__file__).parent / "recipes" / "quickstart" / "digits.toml"
    shutil.copy(source, home / "mine.toml")
    return home


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Conv2d(2, 4, 3), LIF(), Flatten(), Linear(144, 3))


SEQUENCE = torch.ones(2, 3, 2, 8, 8)
TENSORS = {"a": torch.arange(3)}


class Pictures(nn.Module):
    """Draws what it sees."""

    mean, std = (0.0,), (1.0,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def pictures(self, x: Tensor) -> Tensor:
        return torch.stack([x] * 3, 1)

    def __len__(self) -> int:
        return 2

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.rand(len(indices), 1, 4, 4), torch.zeros(len(indices))

    def encode(self, x: Tensor) -> Tensor:
        return x


def plan(at: Any) -> Run:
    settings = Run.open(at("run")).settings
    return Run.plan(at("new"), "quickstart/digits", "main", "full", settings)


def rerun(at: Any) -> Any:
    words = {"data": {"subset": 32, "test_subset": 20}, "train": {"epochs": 1}, "model": {"T": 1}}
    [record] = reproduce(
        load_recipe("quickstart/digits"), ["main"], "smoke", words, at("runs"), at("results"), Quiet(), lambda: False
    )
    return record["measured"]["acc"]


def started(at: Any) -> Any:
    settings = Run.open(at("run")).settings.model_dump()
    settings["train"]["start_from"] = at("run")
    checked = check_settings(settings, "here")
    assert type(checked.train.start_from) is str
    json.dumps(checked.model_dump())
    return start_from(build_model(checked, 1, 10), at("run"))


def without_attention(at: Any) -> str:
    with pytest.raises(spikeloom.UsageError) as info:
        attention_inputs(at("run"), {"root": at("events")})
    return str(info.value)


def atomically(at: Any) -> str:
    with files.atomic(at("new")) as temporary:
        temporary.write_text("text")
    return Path(at("new")).read_text()


def whole_folder(path: Any) -> list[str]:
    with files.atomic_folder(path) as temporary:
        (temporary / "a").touch()
    return os.listdir(path)


def pretrained(at: Any) -> float:
    model = spikeloom.create_model("sew_resnet18", num_classes=10)
    torch.save({"conv1.weight": torch.ones_like(model.stem.weight)}, at("new"))  # pyright: ignore
    load_ann(model, at("new"))  # pyright: ignore[reportArgumentType]
    return float(model.stem.weight.detach().mean())  # pyright: ignore


def imported(at: Any) -> Any:
    settings = Run.open(at("run")).settings.model_dump()
    summary, match = import_weights(at("net.pth"), at("new"), {k: settings[k] for k in ("data", "model")}, Quiet())
    return summary["test_accuracy"], match.matched, Run.open(at("new")).title


def loaded(at: Any) -> Any:
    return load_spikingjelly(at("net.pth"), "colored_mnist_net", T=2, image_size=16)(torch.ones(1, 1, 16, 16)).tolist()


def fitted(at: Any) -> Any:
    torch.manual_seed(0)
    digits = create_dataset("digits", subset=16, size=16)
    net = create_model("colored_mnist_net", in_channels=1, num_classes=10, image_size=16, T=1)
    return fit(net, digits, digits, out=at("new"), progress=Quiet(), epochs=1, batch_size=8, lr=0.01)["test_accuracy"]


def played(at: Any) -> Any:
    with pytest.raises(spikeloom.UsageError, match="takes no events") as info:
        play(at("run"), at("events/one.bin"))
    return str(info.value)


def swept(at: Any) -> Any:
    return plan_sweep(load_recipe("quickstart/digits"), "main", "full", [], {"seed": ["1", "2"]}, at("new"))


# What a function says when it is given files by `at`, which names those of `home` or, where nothing is there, new ones.
TINY = ("data.subset=32", "data.test_subset=20", "model.T=1", "train.epochs=1", "train.batch_size=16")
CALLS: dict[str, Callable[[Any], Any]] = {
    "Engine.save": lambda at: deploy.load(at("engine.safetensors")).save(at("new")) or Path(at("new")).read_bytes(),
    "Run": lambda at: Run(at("run"), "a", "b", "full", Run.open(at("run")).settings).weights.name,
    "Run.open": lambda at: Run.open(at("run")).metrics(),
    "Run.plan": lambda at: plan(at).folder.name,
    "atomic": atomically,
    "atomic_folder": lambda at: whole_folder(at("new")),
    "attention_inputs": without_attention,
    "compare_runs": lambda at: compare_runs([at("run")])[0]["accuracy"],
    "confusions": lambda at: sorted(map(os.path.basename, confusions([at("run")], 10).tables)),
    "describe_run": lambda at: describe_run(at("run")),
    "draw_figures": lambda at: [path.name for path in draw_figures([at("figure.json")], at("new"))],
    "earlier_results": lambda at: earlier_results(at("."), "bench"),
    "export_file": lambda at: {
        **export_file(network(), SEQUENCE, True, "nir", at("new"), None),
        "path": None,
        "bytes": None,
    },
    "find_files": lambda at: [path.name for path in find_files([at("pictures"), at("figure.json")])],
    "fit": fitted,
    "find_runs": lambda at: [path.name for path in find_runs(at("."))],
    "gather_run": lambda at: gather_run(at("run"), {}, Quiet()).records,
    "load": lambda at: deploy.load(at("engine.safetensors"))(SEQUENCE).tolist(),
    "load_ann": pretrained,
    "load_classifier": lambda at: load_classifier(at("run")).num_classes,
    "load_recipe": lambda at: load_recipe(at("mine.toml")).title,
    "load_tensors": lambda at: sorted(files.load_tensors(at("run/model.safetensors"))[0]),
    "load_weights": lambda at: files.load_weights(network(), dict(network().state_dict()), at("new"), "x"),
    "copy_weights": lambda at: copy_weights(at("net.pth"), spikeloom.load(at("run"))).matched,
    "layers_of": lambda at: [layer.name for layer in layers_of(at("net.pth"), "x")],
    "import_weights": imported,
    "load_spikingjelly": loaded,
    "read_layers": lambda at: [layer.name for layer in read_layers(at("net.pth"), "colored_mnist_net")[0]],
    "read_state_dict": lambda at: sorted(files.read_state_dict(at("net.pth"))),
    "open_target": lambda at: open_target(at("run"), {"images": 2}).title,
    "plan": lambda at: [trial.folder.name for trial in swept(at)],
    "place_of": lambda at: place_of(load_recipe("quickstart/digits"), "main", at("new")).parts[-2:],
    "planned": lambda at: planned({"seed": "1"}, at("new"), Run.open(at("run")).settings).folder.name,
    "train_recipe": lambda at: train_recipe("quickstart/digits", *TINY, out=at("new"), progress=Quiet())["epochs"],
    "play": played,
    "predict": lambda at: [(found.label, found.probability) for found in predict(at("run"), [at("pictures")])],
    "read_figure": lambda at: read_figure(at("figure.json")).data[0].y,
    "read_json": lambda at: files.read_json(at("run/summary.json")),
    "read_metrics": lambda at: read_metrics(at("run")),
    "read_nir": lambda at: sorted(deploy.read_nir(at("net.nir")).nodes),
    "read_rows": lambda at: [row["file"] for row in bench_events.read_rows(at("events"), 1)],
    "read_safetensors": lambda at: sorted(files.read_safetensors(at("run/model.safetensors"))[0]),
    "read_signed": lambda at: sorted(read_signed(at("run/report.json"))),
    "recordings": lambda at: [path.name for paths in bench_events.recordings(at("events")).values() for path in paths],
    "reproduce": rerun,
    "save_tensors": lambda at: files.save_tensors(at("new"), TENSORS, {}) or Path(at("new")).read_bytes(),
    "show": lambda at: show(at("run"), at("new"), at("pictures/grey.png")).decision,
    "start_from": started,
    "scoreboard": lambda at: [score.state for score in scoreboard(at("results"))],
    "to_onnx": lambda at: deploy.to_onnx(nn.Sequential(nn.Linear(8, 2)), SEQUENCE, at("new")).bytes,
    "create_model": lambda at: sorted(create_model("colored_mnist_net", weights=at("run")).state_dict()),
    "read_weights": lambda at: sorted(read_weights("colored_mnist_net", at("run/model.safetensors")).tensors),
    "run_folder": lambda at: run_folder(at("run")).name,
    "write_weights": lambda at: write_weights(Run.open(at("run")), Run.open(at("run")).settings, at("new"), Quiet())[
        "test_accuracy"
    ],
    "recorded_figures": lambda at: [
        path.name for path in recorded_figures(load_recipe("quickstart/digits"), at("recorded"), None, {})
    ],
    "write_figure": lambda at: write_figure(at("new"), read_figure(at("figure.json"))) or Path(at("new")).read_text(),
    "write_json": lambda at: files.write_json(at("new"), [1]) or Path(at("new")).read_text(),
    "write_nir": lambda at: deploy.write_nir(deploy.read_nir(at("net.nir")), at("new")) or Path(at("new")).is_file(),
    "write_pictures": lambda at: write_pictures(Pictures(), Pictures(), at("new")) or Path(at("new")).is_file(),
    "write_report": lambda at: [
        analyse.write_report(runs, {}, Quiet(), at("new"))[0].name for runs in (at("run"), [at("run")])
    ],
    "write_results": lambda at: write_results(at("new"), "x", {}) or sorted(os.listdir(at("new"))),
    "write_safetensors": lambda at: files.write_safetensors(at("new"), TENSORS, {"a": "b"}),
    "write_signed": lambda at: write_signed(at("new"), {}) or Path(at("new")).read_text(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_string_a_path_and_anything_like_one(name: str, home: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    for kind in (Path, str, Named):
        folder = tmp_path / kind.__name__
        folder.mkdir()

        def at(name: str, kind: Any = kind, folder: Path = folder) -> Any:
            return kind(home / name if (home / name).exists() else folder / name)

        said.append(CALLS[name](at))
    assert said[0] == said[1] == said[2]
