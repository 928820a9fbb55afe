"""The command line: what it prints, and that every mistake is one clear line that leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command_line import SMALL, spikeloom
from helpers.made_files import idx_bytes, write_cifar10

from spikeloom import cli
from spikeloom.files import load_tensors
from spikeloom.neurons import Neuron
from spikeloom.train.build import build_model
from spikeloom.train.run import Run

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
GROUPS = [group.name for group in cli.app.registered_groups]  # of commands of their own
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write_mnist(root: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    (root / "MNIST" / "raw").mkdir(parents=True)
    for stem in ("train", "t10k"):
        pixels = rng.integers(0, 256, (images, 28, 28), np.uint8)
        (root / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        labels = (np.arange(images) % 10).astype(np.uint8)
        (root / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and runs, whole and damaged."""
    home = tmp_path_factory.mktemp("places")
    result = spikeloom("train", *SMALL, f"--out={home / 'run'}", "--json")
    assert result.code == 0, result.err
    result = spikeloom(
        "train",
        *SMALL,
        "model.T=1",
        "train.epochs=1",
        "data.size=20",
        "model.image_size=20",
        f"--out={home / 'run20'}",
        "--json",
    )
    assert result.code == 0, result.err
    for name in ("truncated", "flipped", "foreign", "unfinished", "odd"):
        shutil.copytree(home / "run", home / f"run_{name}")
    halve(home / "run_truncated" / "model.safetensors")
    damaged = bytearray((home / "run_flipped" / "model.safetensors").read_bytes())
    damaged[-100] ^= 1
    (home / "run_flipped" / "model.safetensors").write_bytes(damaged)
    shutil.copy(home / "run20" / "model.safetensors", home / "run_foreign")
    shutil.copy(home / "run20" / "checkpoint.safetensors", home / "run_foreign")
    for name in ("summary.json", "model.safetensors"):
        (home / "run_unfinished" / name).unlink()
    (home / "run_foreign" / "summary.json").unlink()
    (home / "run_odd" / "settings.json").write_text('{"recipe": "x"')
    write_mnist(home / "data", 64)
    write_cifar10(home / "data", 64)
    for split in ("train", "test"):
        shutil.copytree(home / "data", home / f"truncated_{split}")
    halve(home / "truncated_train" / "MNIST" / "raw" / "train-images-idx3-ubyte")
    halve(home / "truncated_test" / "MNIST" / "raw" / "t10k-images-idx3-ubyte")
    for split in ("train", "test"):
        halve(home / f"truncated_{split}" / "CIFAR10" / f"{split}.npz")
    (home / "empty").mkdir()
    (home / "file").write_text("a regular file")
    return home


# --- what it prints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    result = spikeloom(command, "--help")
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith("Usage: ")
    assert f" {command} " in result.out.splitlines()[0]
    assert "--json" in result.out or command == "schema"  # which prints nothing but JSON


def test_help_names_every_command() -> None:
    result = spikeloom("--help")
    assert result.code == 0
    listed = [line.split()[0] for line in result.out.split("Commands:\n")[1].splitlines() if line.strip()]
    assert [name for name in listed if name not in GROUPS] == COMMANDS
    assert set(GROUPS) <= set(listed)
    assert {"train", "evaluate", "reproduce", "list", "doctor"} <= set(listed)


def test_without_a_command_it_helps() -> None:
    result = spikeloom()
    assert "Documentation: docs/index.md" in result.out + result.err
    assert "Usage: spikeloom" in result.out + result.err
    assert "reproduce" in result.out + result.err


def test_help_answers_at_once() -> None:
    program = [sys.executable, "-m", "spikeloom", "--help"]

    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run(program, check=True, capture_output=True)
        return time.perf_counter() - started

    assert any(seconds() < 0.5 for _ in range(5))


def test_help_does_not_load_torch() -> None:
    # One process for all: what none of them has loaded, each has not.
    code = (
        "import contextlib, io, sys\nfrom spikeloom.cli import main\n"
        f"for words in {[[], *([command] for command in COMMANDS)]!r}:\n"
        "    sys.argv, out = ['spikeloom', *words, '--help'], io.StringIO()\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out): main()\n"
        "    loaded = {'torch', 'numpy', 'accelerate', 'torchvision'} & set(sys.modules)\n"
        "    assert not loaded, (words, loaded)\n"
        "    assert 'Usage: ' in out.getvalue(), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("what", "some"),
    [
        ("models", ["report_vgg16", "report_sew_resnet34", "colored_mnist_net"]),
        ("recipes", ["quickstart/digits", "report/table1", "report/table2"]),
        ("datasets", ["digits", "mnist", "cifar10"]),
        ("neurons", ["IF", "LIF", "PLIF"]),
    ],
)
def test_list(what: str, some: list[str]) -> None:
    result = spikeloom("list", what)
    lines = dict(line.split(None, 1) for line in result.out.splitlines())
    assert result.code == 0
    assert set(some) <= set(lines)
    assert all(lines.values())
    as_json = spikeloom("list", what, "--json")
    assert json.loads(as_json.out) == lines
    assert as_json.err == ""


def test_doctor() -> None:
    text = spikeloom("doctor")
    assert text.code == 0
    found = json.loads(spikeloom("doctor", "--json").out)
    for key in ("spikeloom", "torch", "native", "backend on cpu", "SPIKELOOM_DATA"):
        assert key in found
        assert any(line.startswith(key) and str(found[key]) in line for line in text.out.splitlines())


def test_train_prints_json(places: Path, tmp_path: Path) -> None:
    result = spikeloom("train", *SMALL, f"--out={tmp_path / 'run'}", "--json")
    assert result.code == 0
    summary = json.loads(result.out)
    assert summary.pop("run") == str(tmp_path / "run")
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    # Run folders differ by nothing but times.
    assert summary["test_accuracy"] == json.loads((places / "run" / "summary.json").read_text())["test_accuracy"]


def test_train_prints_what_is_next(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = spikeloom("train", *SMALL, f"--out={run}")
    assert result.code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert f"test accuracy {summary['test_accuracy']:.2f} % on digits (scikit-learn), first 50 images" in result.out
    assert f"{summary['parameters']:,} parameters" in result.out
    assert f"spikeloom evaluate {run}" in result.out
    # Progress goes to standard error, a line an epoch.
    for epoch in (1, 2):
        assert sum(line.startswith(f"epoch   {epoch}/2") for line in result.err.splitlines()) == 1


def test_train_ends_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "a run"
    result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={run}")
    assert f"  report: {run}/report.html" in result.out
    assert (run / "report.html").stat().st_size > 4_000_000
    # A report that fails loses nothing: neither the numbers nor the exit code.
    monkeypatch.setattr("spikeloom.analyse.report.render.render", lambda runs: {}[0])
    other = tmp_path / "another"
    result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={other}", "--json")
    assert result.code == 0
    assert json.loads(result.out)["epochs"] == 1
    assert result.err.splitlines()[-1] == (
        f"spikeloom: warning: the run is complete, but not its report: KeyError: 0; "
        f"make it with: spikeloom report {other}"
    )
    assert (other / "model.safetensors").is_file()


def test_report_prints_the_file_and_what_is_missing(places: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = spikeloom("report", str(places / "run"), str(places / "run_unfinished"), f"--out={page}", "--json")
    found = json.loads(result.out)
    assert found["report"] == str(page)
    [problem] = found["problems"]
    assert problem.startswith(f"{places}/run_unfinished: unfinished: 2 of 2 epochs")
    assert str(places / "run_unfinished") in page.read_text().split("<script>")[0]
    result = spikeloom("report", str(places / "run"), f"--out={page}", "--images=7")
    assert (result.code, result.out) == (0, f"report: {page}\n")
    assert "Measured on 7 of digits" in page.read_text()


def test_train_writes_under_runs_by_default() -> None:
    result = spikeloom("train", *SMALL[1:], "train.epochs=1", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["recipe"] == "quickstart/digits"  # without a recipe
    [folder] = Path("runs").iterdir()
    assert summary["run"] == str(folder)
    assert folder.name.startswith("quickstart-digits-")


def test_evaluate_gives_the_accuracy_of_the_summary(places: Path) -> None:
    run = places / "run"
    result = json.loads(spikeloom("evaluate", str(run), "--json").out)
    summary = json.loads((run / "summary.json").read_text())
    assert result["test_accuracy"] == summary["test_accuracy"]
    assert result["test_loss"] == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
    assert result["data"] == summary["data"]["test"]
    model = build_model(Run.open(run).settings, 1, 10)
    layers = [name for name, module in model.named_modules() if isinstance(module, Neuron)]
    assert list(result["rates"]) == layers
    assert len(layers) == 3
    assert all(0 <= rate <= 1 for rate in result["rates"].values())
    assert any(rate > 0 for rate in result["rates"].values())


def test_evaluate_prints_every_layer(places: Path) -> None:
    run = places / "run"
    result = spikeloom("evaluate", str(run))
    assert result.code == 0
    summary = json.loads((run / "summary.json").read_text())
    assert f"quickstart/digits: accuracy {summary['test_accuracy']:.2f} %" in result.out
    rates = json.loads(spikeloom("evaluate", str(run), "--json").out)["rates"]
    assert [line.split() for line in result.out.splitlines()[2:]] == [
        [f"{100 * rate:.2f}", "%", name] for name, rate in rates.items()
    ]


def test_evaluate_names_the_accuracy_with_mirror_images(places: Path) -> None:
    run = str(places / "run")
    plain, both = (json.loads(spikeloom("evaluate", run, *flips, "--json").out) for flips in ([], ["--flips"]))
    shown = both.pop("test_accuracy_flips")
    assert both == plain
    assert f"  with mirror images: accuracy {shown:.2f} %" in spikeloom("evaluate", run, "--flips").out.splitlines()


def test_evaluate_takes_data_settings(places: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (places / "run").iterdir()}
    result = spikeloom("evaluate", str(places / "run"), "data.test_subset=10", "--json")
    assert json.loads(result.out)["data"] == "digits (scikit-learn), first 10 images"
    assert json.loads(result.out)["test_accuracy"] % 10 == 0
    assert {path.name: path.stat().st_mtime_ns for path in (places / "run").iterdir()} == before


def test_data_come_from_the_environment(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELOOM_DATA", str(places / "data"))
    words = ["quickstart/mnist", "model.T=1", "data.subset=8", "data.test_subset=4", "train.batch_size=4"]
    result = spikeloom("train", *words, "train.epochs=1", f"--out={tmp_path / 'run'}", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["data"]["train"] == "MNIST files of 64 images, first 8 images"


def test_audit_of_a_run(places: Path) -> None:
    words = ["audit", str(places / "run"), "--images=20", "--batch=8"]
    found = json.loads(spikeloom(*words, "--json").out)
    assert found["target"] == "quickstart/digits (full)"
    assert found["data"] == "20 of digits (scikit-learn), first 50 images"
    assert (found["images"], found["steps"], found["parameters"]) == (20, 2, 56_080)
    assert [row["name"] for row in found["rows"]] == ["features.0", "features.3", "head.0", "head.2"]
    assert found["rows"][0]["input"] == "real"
    text = spikeloom(*words)
    assert text.code == 0
    for row in found["rows"]:
        assert row["name"] in text.out
    for rule, energy in found["energies"].items():
        assert f"{energy['pj'] / 1e6:.3f}" in next(line for line in text.out.splitlines() if f" {rule} " in line)
    assert ("not spike-driven" in text.out) is not found["spike_driven"]


def test_a_run_by_its_spikes(places: Path, tmp_path: Path) -> None:
    words = ["run", str(places / "run"), "--images=20", "--batch=8"]
    file = tmp_path / "net.safetensors"
    found = json.loads(spikeloom(*words, f"--save={file}", "--json").out)
    assert (found["target"], found["images"]) == ("quickstart/digits (full)", 20)
    assert found["same"] == 100
    assert found["accuracy"] == found["model_accuracy"]
    assert [layer["layer"] for layer in found["plan"] if layer["way"]] == [
        "features.0",
        "features.3",
        "head.0",
        "head.2",
    ]
    again = json.loads(spikeloom(*words, f"--engine={file}", "--no-compare", "--json").out)
    assert again["accuracy"] == found["accuracy"]
    assert "model_ms" not in again
    text = spikeloom(*words, "--plan")
    assert text.code == 0
    assert "the same prediction for 100.00 % of images" in text.out
    for layer in found["plan"]:
        assert layer["layer"] in text.out
    exact = spikeloom(*words, "--weights=exact")
    assert "within 1e-4 for 100.00 %, largest difference 0\n" in exact.out
    portable = json.loads(spikeloom(*words, "--portable", f"--save={file}", "--json").out)
    assert portable["accuracy"] == found["accuracy"]
    assert {layer["way"] for layer in portable["plan"]} <= {"event", "direct", ""}
    for option in ("--weights=bf16", "--portable"):
        mistake = spikeloom(*words, f"--engine={file}", option)
        assert mistake.code == 2
        assert option.split("=")[0] in mistake.err
        assert "--engine has its own" in mistake.err
    other = spikeloom("run", "weights:digits", "--images=20", f"--engine={file}", "--no-compare")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"{file} was made of another network than weights:digits" in other.err


def test_mistakes_in_running(places: Path) -> None:
    words = ["run", str(places / "run"), "--images=20"]
    for word, message in (
        ("--engine=none", "none: no such file"),
        (f"--engine={places / 'file'}", "not a safetensors file"),
        ("compare=false", "write --no-compare"),
        ("image=3", "unknown key 'image'; did you mean --images?"),
        ("--weights=half", "weights must be fp32, bf16, int8 or exact"),
    ):
        result = spikeloom(*words, word)
        assert result.code == 2
        assert message in result.err
        assert result.err.count("\n") == 1
    result = spikeloom("run", "psn_cifar_net", "--input=3x32x32", "--images=2")
    assert result.code == 2
    assert "features.1.neuron: the event engine has no step for spikeloom::psn" in result.err


def test_export_of_a_run(places: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `exchange` is not installed")
    result = spikeloom("export", str(places / "run"), "--to", "onnx", "--out", "net.onnx", "--T", "1", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert (found["format"], found["path"], found["T"], found["opset"]) == ("onnx", "net.onnx", 1, 18)
    assert found["bytes"] == Path("net.onnx").stat().st_size
    x = np.random.default_rng(0).random((3, 1, 16, 16), np.float32)
    (logits,) = onnxruntime.InferenceSession("net.onnx").run(["logits"], {"input": x})
    assert logits.shape == (1, 3, 10)


def test_export_of_a_model() -> None:
    nir = pytest.importorskip("nir", reason="the extra `exchange` is not installed")
    words = ["export", "shd_net", "--to", "nir", "--input=700", "neuron.name=LIF", "--T", "7"]
    result = spikeloom(*words)
    assert result.code == 0, result.err
    assert result.out.startswith("shd_net, untrained: NIR, 9 nodes, T = 7, 0.")
    assert result.out.endswith("  written: shd_net.nir\n")
    assert len(nir.read("shd_net.nir").nodes) == 9
    assert json.loads(spikeloom(*words, "--json").out)["edges"] == 8


def test_audit_of_a_model() -> None:
    words = ["report_sew_resnet34", "model.T=2", "--images=2"]
    noise = json.loads(spikeloom("audit", *words, "--input=1x16x16", "--json").out)
    assert noise["data"] == "random inputs 1x16x16"
    digits = json.loads(spikeloom("audit", *words, "data.name=digits", "data.size=16", "--json").out)
    assert digits["data"] == "2 of digits (scikit-learn)"
    assert digits["rows"][0]["operations"] == 16 * 16 * 16 * 9
    result = spikeloom("audit", *words, "data=digits", "data.size=16", "neuron.name=IF", "neuron.v_threshold=0.1")
    assert "not spike-driven: 14 of 32 layers" in result.out
    assert "14 with integer values from a sum (ADD shortcut)" in result.out


def test_audit_of_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    page = tmp_path / "blocks.html"
    small = ["model.channels=32", "model.heads=4", "model.depth=2", "--images=2", f"--histograms={page}"]
    found: dict[str, list[Any]] = {}
    for name in ("spikformer_4_384", "spikingformer_4_384"):
        found[name] = json.loads(spikeloom("audit", name, *small, "--json").out)["block_inputs"]
        assert [sum(block["counts"]) for block in found[name]] == [4 * 2 * 32 * 8 * 8] * 2
        assert all(0 < block["nonzero"] < 1 for block in found[name])  # untrained, yet not silent
    assert max(len(block["counts"]) for block in found["spikformer_4_384"]) > 2
    assert all(len(block["counts"]) <= 2 for block in found["spikingformer_4_384"])
    result = spikeloom("audit", "spikformer_4_384", *small)
    assert "what enters q, k and v of each block" in result.out
    assert f"{100 * found['spikformer_4_384'][0]['nonzero']:.2f}" in result.out
    assert f"drawn: {page}" in result.out
    assert "block 2" in page.read_text()


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[str, list[str]]] = {
    "unknown command": ("trian", ["trian"]),
    "unknown option": ("train --epochs", ["--epochs"]),
    "unknown option of list": ("list models --jsn", ["--jsn"]),
    "missing argument": ("evaluate", ["RUN"]),
    "surplus argument": ("list models neurons", ["neurons"]),
    "unknown list": ("list modles", ["'modles'", "did you mean models or"]),
    "unknown recipe": ("train quickstart/digit", ["'quickstart/digit'", "did you mean quickstart/digits"]),
    "no recipe file": ("train none.toml", ["none.toml"]),
    "unknown row": ("train report/table2#s0t2d data.root={0}/data", ["'s0t2d'", "s0t2a"]),
    "no row": ("train report/table2 data.root={0}/data", ["several rows", "report/table2#s0t2a"]),
    "unknown row of reproduce": ("reproduce report/table2#s0t2d data.root={0}/data", ["'s0t2d'", "s0t2a"]),
    "unknown benchmark": ("bench neuron", ["'neuron'", "did you mean neurons?"]),
    "no table": ("reproduce data.root={0}/data", ["name a table"]),
    "unknown budget": ("train budget=smal", ["'smal'", "smoke"]),
    "unknown budget of reproduce": ("reproduce report/table2 budget=ful", ["'ful'", "did you mean full?"]),
    "a setting without its table": ("train lr=0.1", ["unknown key 'lr'", "did you mean train.lr?"]),
    "a misspelt setting without its table": ("train epoch=3", ["'epoch'", "did you mean train.epochs"]),
    "an option of the model without its table": ("reproduce report/table2 T=8", ["did you mean model.T?"]),
    "a setting as an option": ("train --batch-size=3", ["did you mean train.batch_size?", "spikeloom train --help"]),
    "no images": ("audit report_vgg16 --images=0", ["--images", "1"]),
    "an option of another benchmark": ("bench audit --model=x", ["--model", "spikeloom bench methods"]),
    "unknown top key": ("train sede=3", ["'sede'", "did you mean seed"]),
    "unknown nested key": ("train train.epohcs=3", ["'train.epohcs'", "did you mean epochs"]),
    "unknown option of the model": ("train model.block_bais=true", ["'block_bais'", "did you mean block_bias?"]),
    "wrong type": ('train train.epochs="3"', ["train.epochs", "integer"]),
    "not key=value": ("train train.epochs=1 seed", ["expected key=value", "'seed'"]),
    "late unknown key": ("train seed=3 data.subset=64 train.epochs=1 model.Q=3", ["'Q'"]),
    "no data root": ("train quickstart/mnist", ["data.root=", "SPIKELOOM_DATA"]),
    "data root without data": ("train quickstart/mnist data.root={0}/empty", ["{0}/empty", "MNIST"]),
    "data root that is not there": ("train quickstart/mnist data.root={0}/nowhere", ["{0}/nowhere"]),
    "truncated IDX": ("train quickstart/mnist data.root={0}/truncated_train", ["train-images-idx3-ubyte"]),
    "truncated IDX of the test part": ("train quickstart/mnist data.root={0}/truncated_test", ["t10k-images"]),
    "truncated npz": ("train report/table1#s0t1b budget=smoke data.root={0}/truncated_train", ["train.npz"]),
    "truncated npz of the test part": (
        "train report/table1#s0t1b budget=smoke data.root={0}/truncated_test",
        ["test.npz"],
    ),
    "subset larger than the data": ("train data.subset=2000", ["subset", "1438", "2000"]),
    "batch larger than the data": ("train data.subset=32 train.batch_size=64", ["64", "32", "lower train.batch_size"]),
    "micro-batches larger than the data": (
        "train data.subset=32 train.batch_size=16 train.accumulate=3",
        ["48", "32", "train.accumulate"],
    ),
    "a total batch of broken micro-batches": (
        "train train.batch_size=16 train.total_batch=40",
        ["train.total_batch must be a multiple of train.batch_size, 16"],
    ),
    "a total batch and micro-batches": ("train train.accumulate=2 train.total_batch=64", ["cannot both be given"]),
    "option without its name": ("train neuron.tau=4", ["neuron.name is missing; add neuron=NAME"]),
    "tau": ("train neuron.name=LIF neuron.tau=1.0", ["tau must be greater than 1, got 1.0"]),
    "surrogate": ("train neuron.name=LIF neuron.surrogate=ATna", ["'ATna'", "ATan"]),
    "option of the surrogate": (
        "train neuron.name=LIF neuron.surrogate.name=ATan neuron.surrogate.alhpa=1.0",
        ["'alhpa'"],
    ),
    "transform": ('train train.augment=[{{name="random_crop",padding=0}}]', ["padding", "at least 1", "0"]),
    "T": ("train model.T=0", ["T must be at least 1, got 0"]),
    "image size": ("train data.subset=64 model.name=colored_mnist_net model.T=1 model.image_size=8", ["at least 16"]),
    "model of another image size": ("train data.subset=64 model.name=colored_mnist_net model.T=1", ["28", "8"]),
    "images smaller than the model takes": ("train data.subset=64 model.name=report_vgg16 model.T=1", ["32", "8"]),
    "run folder below a file": ("train --out={0}/file/run", ["{0}/file/run", "--out"]),
    "run folder is a file": ("train --out={0}/file", ["{0}/file", "--out"]),
    "run folder with a run": ("train --out={0}/run", ["{0}/run is not empty", "--out"]),
    "run folder with a stopped run": ("train --out={0}/run_unfinished", ["--resume {0}/run_unfinished", "--out"]),
    "training part of evaluate": ("evaluate {0}/run data.subset=10", ["data.subset", "data.test_subset"]),
    "training part of audit": ("audit {0}/run data.validation=0.5", ["data.validation", "data.test_subset"]),
    "runs of other lists": ("list models --runs=x", ["--runs", "spikeloom list runs"]),
    "methods of an unknown network": ("bench methods --model=sew_7c --out={0}/new", ["'sew_7c'", "sew_7b"]),
    "a quick list of benchmarks": ("bench --quick", ["name what to measure", "neurons"]),
    "runs of the scores": ("reproduce --scores --runs=x", ["--runs", "--results"]),
    "classes of a table": ("predict {0}/run x.png --csv --top=5", ["--csv", "--top"]),
    "resume of no run": ("train --resume={0}/empty", ["{0}/empty is not a run"]),
    "resume of nothing": ("train --resume={0}/nowhere", ["{0}/nowhere"]),
    "resume of damaged settings": ("train --resume={0}/run_odd", ["settings.json"]),
    "resume with a recipe": ("train quickstart/digits --resume={0}/run_unfinished", ["--resume RUN", "no recipe"]),
    "resume with a budget": ("train budget=smoke --resume={0}/run_unfinished", ["--resume RUN", "no budget"]),
    "resume into another folder": ("train --out=x --resume={0}/run_unfinished", ["--resume RUN", "no --out"]),
    "resume with another model": ("train model.T=3 --resume={0}/run_unfinished", ["model.T cannot change", "train.lr"]),
    "resume with another order": ("train seed=3 --resume={0}/run_unfinished", ["seed cannot change"]),
    "resume with another optimiser": (
        "train train.optimizer=adam --resume={0}/run_unfinished",
        ["train.optimizer cannot change"],
    ),
    "resume with other data": ("train data.subset=32 --resume={0}/run_unfinished", ["data.subset cannot change"]),
    "resume with no such key": ("train train.loss.smooth=1 --resume={0}/run_unfinished", ["unknown key 'smooth'"]),
    "resume with too few epochs": ("train train.epochs=1 --resume={0}/run_unfinished", ["2 epochs", "train.epochs"]),
    "resume of a finished run": ("train --resume={0}/run", ["finished", "spikeloom evaluate {0}/run"]),
    "resume of another model's checkpoint": ("train --resume={0}/run_foreign", ["checkpoint.safetensors", "another"]),
    "misspelt option": ("run {0}/run --imges 3", ["No such option: --imges (Possible options: --images) (see"]),
    "option that is a setting": ("run {0}/run --model.T 3", ["settings are written KEY=VALUE: model.T=VALUE (see"]),
    "input of a run": ("audit {0}/run --input 3x32x32", ["{0}/run is a run", "leave the input's shape out"]),
    "evaluation of no run": ("evaluate {0}/empty", ["{0}/empty is not a run"]),
    "evaluation of an unfinished run": ("evaluate {0}/run_unfinished", ["not finished", "--resume {0}/run_unfinished"]),
    "truncated weights": ("evaluate {0}/run_truncated", ["{0}/run_truncated/model.safetensors", "truncated"]),
    "damaged weights": ("evaluate {0}/run_flipped", ["{0}/run_flipped/model.safetensors", "damaged"]),
    "weights of another model": ("evaluate {0}/run_foreign", ["another model", "head.0.weight", "(500, 50)"]),
    "settings of an evaluation": ("evaluate {0}/run train.lr=1.0", ["data.* settings only", "'train'"]),
    "unknown key of an evaluation": ("evaluate {0}/run data.rot=x", ["'rot'", "root"]),
    "audit of nothing": ("audit report_resnet", ["'report_resnet'", "neither", "did you mean"]),
    "audit of no run": ("audit {0}/empty", ["{0}/empty is not a run"]),
    "audit of an unfinished run": ("audit {0}/run_unfinished", ["not finished", "--resume {0}/run_unfinished"]),
    "report of no run": ("report {0}/empty", ["{0}/empty is not a run", "settings.json"]),
    "report of nothing": ("report data.root=x", ["name the folder of a run"]),
    "unknown key of a report": ("report {0}/run image=3", ["'image'", "did you mean --images?"]),
    "report of the same run": ("report {0}/run {0}/run", ["named twice"]),
    "report to nowhere": ("report {0}/run --out={0}/nowhere/page.html", ["there is no folder {0}/nowhere"]),
    "unknown key of an audit": ("audit {0}/run image=3", ["'image'", "did you mean --images?"]),
    "unknown model option of an audit": ("audit report_vgg16 model.TT=3", ["'TT'"]),
    "histograms without attention": (
        "audit report_vgg16 --images=1 --histograms={0}/x.html",
        ["report_vgg16", "no spiking self-attention"],
    ),
    "histograms nowhere": (
        "audit spikformer_2_384 model.channels=24 --images=1 --histograms={0}/no/x.html",
        ["no/x.html", "there is no folder {0}/no"],
    ),
    "audit on other inputs": ("audit report_vgg16 --input=3x8x8 --images=1", ["report_vgg16", "3x8x8"]),
    "no data root of an audit": ("audit report_vgg16 data=mnist", ["data.root=", "SPIKELOOM_DATA"]),
    "unknown format of an export": ("export report_vgg16 --to nri", ["'nri'", "did you mean nir"]),
    "export of nothing": ("export report_resnet --to nir", ["'report_resnet'", "neither", "did you mean"]),
    "export of what NIR lacks": ("export {0}/run --to nir", ["layer features.", "(MaxPool2d)", "NIR has no max pool"]),
    "export of no steps": ("export {0}/run --to onnx --T 0", ["T must be at least 1, got 0"]),
    "export on other inputs": ("export report_vgg16 --to onnx --input=3x8x8", ["32x32, got 8x8"]),
    "export to nowhere": (
        "export shd_net --to nir --out {0}/nowhere/a.nir --input=700 neuron.name=LIF",
        ["cannot write {0}/nowhere/a.nir: there is no folder {0}/nowhere"],
    ),
}


def listing(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for folder in folders for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, places: Path) -> None:
    words, parts = MISTAKES[mistake]
    result = spikeloom(*words.format(places).split(" "))
    assert result.code == 2
    assert result.out == ""
    [line] = result.err.splitlines()
    assert line.startswith("spikeloom: error: ")
    for part in parts:
        assert part.format(places) in line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_nothing_behind(mistake: str, places: Path, tmp_path: Path) -> None:
    before = listing(places, tmp_path)
    words = MISTAKES[mistake][0].format(places).split(" ")
    if words[0] == "train" and not any(word.startswith("-") for word in words):
        words.append(f"--out={tmp_path / 'run'}")
    with contextlib.suppress(Exception):  # the test above asks for the line
        spikeloom(*words)
    assert listing(places, tmp_path) == before


@pytest.mark.parametrize("mistake", ["unknown command", "unknown option", "unknown nested key", "truncated weights"])
def test_a_mistake_in_a_process_of_its_own(mistake: str, places: Path) -> None:
    words, parts = MISTAKES[mistake]
    done = subprocess.run(
        [sys.executable, "-m", "spikeloom", *words.format(places).split(" ")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("spikeloom: error: ")
    assert all(part.format(places) in line for part in parts)


def test_a_corrected_mistake_may_use_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert spikeloom("train", *SMALL, "train.batch_size=128", f"--out={run}").code == 2
    result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={run}")
    assert result.code == 0, result.err


def test_a_name_with_odd_characters(tmp_path: Path) -> None:
    # What looks like markup or a number is a name like any other.
    for name in ("[bold]run[/bold]", "2026"):
        result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={name}")
        assert result.code == 0, result.err
        assert Path(name, "summary.json").is_file()
        assert f"run:   {name}" in result.out
        assert f"run: {name}" in result.err


def test_weights_are_as_readable_as_the_rest(places: Path) -> None:
    # A run that others may read has weights that others may read.
    modes: dict[str, Any] = {path.name: path.stat().st_mode & 0o777 for path in (places / "run").glob("*.*")}
    assert modes["model.safetensors"] == modes["checkpoint.safetensors"] == modes["summary.json"]


def test_the_weights_are_of_the_named_model(places: Path) -> None:
    _, information = load_tensors(places / "run" / "model.safetensors")
    assert information == {
        "model": {"name": "colored_mnist_net", "T": 2, "image_size": 16},
        "made_for": {"in_channels": 1, "num_classes": 10},
    }


def test_list_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = spikeloom("list", "runs")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert "there are no runs in runs: give their folder as --runs PATH" in found.err
    spikeloom("train", *SMALL, "train.epochs=1", "--out=runs/one")
    shutil.copytree("runs/one", "runs/table/begun")
    Path("runs/table/begun/summary.json").unlink()
    shutil.copytree("runs/one", "runs/torn")
    Path("runs/torn/settings.json").write_text("{")
    (tmp_path / "runs" / "notes").mkdir()
    lines = json.loads(spikeloom("list", "runs", "--json").out)
    assert set(lines) == {"runs/one", "runs/table/begun", "runs/torn"}
    assert re.fullmatch(r"quickstart/digits \(full\), seed 1: \d+\.\d\d %, 1 epochs, \d+ s", lines["runs/one"])
    assert re.search(r": epoch 1 of 1, \d+\.\d\d % so far, not finished$", lines["runs/table/begun"])
    assert lines["runs/torn"].startswith("damaged: runs/torn/settings.json")
    assert "runs/one  " in spikeloom("list", "runs", "--runs", str(tmp_path / "runs")).out.replace(f"{tmp_path}/", "")
