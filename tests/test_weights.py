"""Trained networks: made by `export --to weights`, loaded by name, folder, file and hub, refused where wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import spikeloom as command
from helpers.golden_vectors import shared_folder
from helpers.small_runs import NORMED, SMALL, Told, run_of

import spikeloom
from spikeloom import cards
from spikeloom.analyse.load import open_target
from spikeloom.cards import count_right
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import Json, load_tensors, read_safetensors, save_tensors
from spikeloom.models import trained_weights
from spikeloom.train.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(3, 1, 8, 8)
NEURON = {"name": "LIF", "tau": 4.0, "surrogate": {"name": "Sigmoid", "alpha": 2.0}, "v_reset": "none"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with neurons of its own, and its weights as they are shared."""
    home = tmp_path_factory.mktemp("weights")
    train(run_of(home / "run", NORMED, neuron=NEURON, train={"epochs": 1}), Told())
    made = command("export", str(home / "run"), "--to", "weights", "--out", str(home / "shared"), "--json")
    assert made.code == 0, made.err
    (home / "made.json").write_text(made.out)
    return home


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "shared", tmp_path / "shared"))


def rounded(folder: Path) -> torch.nn.Module:
    """The run's network with weights rounded to float16, built by the run's own settings."""
    model = spikeloom.load(folder)
    model.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    return model


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_is_shared(home: Path) -> None:
    shared, made = home / "shared", json.loads((home / "made.json").read_text())
    assert sorted(path.name for path in shared.iterdir()) == [
        "README.md",
        "metrics.jsonl",
        "model.safetensors",
        "settings.json",
        "summary.json",
    ]
    tensors, about = load_tensors(shared / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16, torch.int64}
    assert about == {
        "model": {"name": "report_sew_resnet34", "T": 2},
        "made_for": {"in_channels": 1, "num_classes": 10},
        "neuron": {**NEURON, "v_reset": None},
    }
    summary = json.loads((shared / "summary.json").read_text())
    assert summary == {key: value for key, value in made.items() if key != "bytes"}
    assert str(home) not in "".join(path.read_text() for path in shared.iterdir() if path.suffix != ".safetensors")


def test_the_card_says_what_was_measured(home: Path) -> None:
    shared, summary = home / "shared", json.loads((home / "shared" / "summary.json").read_text())
    page, card = (shared / "README.md").read_text(), summary["card"]
    assert card["sha256"] == hashlib.sha256((shared / "model.safetensors").read_bytes()).hexdigest()
    assert f"`{card['sha256']}`" in page
    assert 'create_model("report_sew_resnet34", weights="FOLDER")`, where FOLDER is where this file lies' in page
    changed = next(line for line in page.splitlines() if "trained by" in line)
    assert "train.epochs=1 " in changed
    assert "'neuron.surrogate={name=\"Sigmoid\", alpha=2.0}'" in changed or "neuron.surrogate.name=Sigmoid" in changed
    # The right number is counted here by hand: on 50 images, one of which is 2 %.
    model = rounded(home / "run")
    target = open_target(home / "run", {"images": 50, "batch": 50})
    [(x, y)] = target.batches()
    with torch.no_grad():
        for T in (1, 2):
            model.T = T  # pyright: ignore[reportArgumentType]
            right = int((model(x).mean(0).argmax(1) == y).sum())
            assert card["by_steps"][str(T)] == 2 * right
            assert f"{2 * right:.2f} % at T = {T}" in page
    assert card["sample"] == {"right": right, "images": 50}
    assert summary["test_accuracy"] == 2 * right
    assert len(card["rates"]) == 31
    assert set(card["engine_ms"]) == {"1", "64"}
    assert 0 < card["energies_uJ"]["measured"] < 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--to", "weights"], "--to weights needs a folder to write: --out FOLDER"),
        (["RUN", "--to", "weights", "--out", "SHARED"], "is not empty: choose another --out"),
        (["RUN", "--to", "weights", "--out", "new", "model.T=2"], "unknown key 'model'"),
        (["RUN", "--to", "weights", "--out", "new", "--T", "2"], "--T and --input are not for --to weights"),
        (["RUN", "--to", "onnx", "--out", "new", "--weights", "int8"], "--weights is for --to weights alone"),
        (["RUN", "--to", "weights", "--out", "new", "--weights", "int"], "of weights 'int'; did you mean int8"),
        (["RUN", "--to", "weights", "--out", "SHARED/README.md/x"], "cannot write"),
    ],
)
def test_mistakes_leave_nothing(words: list[str], message: str, home: Path, copy: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    words = [w.replace("RUN", str(home / "run")).replace("SHARED", str(copy)) for w in words]
    found = command("export", *words)
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert message in found.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an empty folder"])
def test_an_error_on_the_way_leaves_nothing(
    there: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise UsageError("no audit today")

    if there:
        (tmp_path / "new").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(cards, "audit", fail)
        found = command("export", str(home / "run"), "--to", "weights", "--out", str(tmp_path / "new"))
    assert (found.code, found.err) == (2, "spikeloom: error: no audit today\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert command("export", str(home / "run"), "--to", "weights", "--out", str(tmp_path / "new")).code == 0
    assert (tmp_path / "new" / "README.md").is_file()


# --- how it is loaded -------------------------------------------------------------------------------------------------


def test_a_file_a_folder_and_the_run_give_the_network(home: Path) -> None:
    wanted = rounded(home / "run")(X)
    state = torch.get_rng_state()
    for weights in (home / "shared", str(home / "shared"), home / "shared" / "model.safetensors"):
        model = spikeloom.create_model("report_sew_resnet34", weights=weights)
        assert not model.training
        assert torch.equal(model(X), wanted)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers stay as they are"
    assert torch.equal(
        spikeloom.create_model("report_sew_resnet34", weights=home / "run")(X), spikeloom.load(home / "run")(X)
    )
    assert spikeloom.create_model("report_sew_resnet34", weights=home / "shared", T=5)(X).shape[0] == 5


def test_the_hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what was downloaded before: no network is asked."""
    import huggingface_hub.constants as constants

    snapshot = tmp_path / "models--someone--net" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--net" / "refs").mkdir()
    (tmp_path / "models--someone--net" / "refs" / "main").write_text("0" * 40)
    shutil.copy(home / "shared" / "model.safetensors", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = spikeloom.create_model("report_sew_resnet34", weights="hf-hub:someone/net")
    assert torch.equal(model(X), rounded(home / "run")(X))
    for name in ("someone/other", "no name at all", ""):
        with pytest.raises(UsageError, match=f"^cannot read weights of hf-hub:{name}: ") as found:
            spikeloom.create_model("report_sew_resnet34", weights=f"hf-hub:{name}")
        assert "\n" not in str(found.value)


def test_names(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("report_sew_resnet34/digits", "report_vgg16/digits", "report_vgg16/mnist"):
        shutil.copytree(home / "shared", tmp_path / name)
    other = tmp_path / "report_vgg16" / "digits" / "settings.json"
    other.write_text(other.read_text().replace("quickstart/digits", "report/table1"))
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path)
    assert spikeloom.list_weights() == ["report_sew_resnet34/digits", "report_vgg16/digits", "report_vgg16/mnist"]
    assert spikeloom.list_weights("*/mnist") == ["report_vgg16/mnist"]
    for name in ("digits", "report_sew_resnet34/digits"):  # of several the quickstart's
        assert trained_weights.run_folder(f"weights:{name}") == tmp_path / "report_sew_resnet34/digits"
    assert trained_weights.run_folder("weights:mnist") == tmp_path / "report_vgg16/mnist"
    other.with_name("settings.json").write_text(other.read_text())
    wanted = rounded(home / "run")(X)
    assert torch.equal(spikeloom.create_model("report_sew_resnet34", weights="digits")(X), wanted)
    assert torch.equal(spikeloom.load("weights:digits")(X), wanted)
    with pytest.raises(UsageError, match=r"^there are no weights 'digit'; did you mean digits"):
        spikeloom.load("weights:digit")
    with pytest.raises(
        UsageError, match="report_vgg16 comes without weights 'cifar10'; it has digits, mnist, and a file"
    ):
        spikeloom.create_model("report_vgg16", weights="cifar10")
    with pytest.raises(UsageError, match="sew_7b comes without weights 'digits'; it has none, and a file"):
        spikeloom.create_model("sew_7b", weights="digits")
    quick = tmp_path / "report_sew_resnet34" / "digits" / "settings.json"
    quick.write_text(quick.read_text().replace("quickstart/digits", "report/table1"))
    with pytest.raises(
        UsageError, match="several networks have weights for 'digits': name one of report_sew_resnet34/"
    ):
        spikeloom.load("weights:digits")


def test_commands_take_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home / "shared", tmp_path / "package" / "report_sew_resnet34" / "digits")
    monkeypatch.setattr(trained_weights, "FOLDER", tmp_path / "package")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "package").rglob("*")}
    monkeypatch.chdir(tmp_path)
    summary = json.loads((home / "shared" / "summary.json").read_text())
    found = json.loads(command("run", "weights:digits", "--images", "50", "--json").out)
    assert found["accuracy"] == found["model_accuracy"] == summary["test_accuracy"]
    assert command("audit", "weights:digits", "--images", "20").code == 0
    assert json.loads(command("evaluate", "weights:digits", "--json").out)["test_accuracy"] == summary["test_accuracy"]
    assert command("export", "weights:digits", "--to", "onnx").code == 0
    assert (tmp_path / "digits.onnx").is_file()
    assert command("report", "weights:digits").out == "report: runs/report_sew_resnet34-digits/report.html\n"
    listed = json.loads(command("list", "weights", "--json").out)
    assert listed["report_sew_resnet34/digits"].startswith(f"{summary['test_accuracy']:.2f} % on digits")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "package").rglob("*")} == before


# --- what is refused --------------------------------------------------------------------------------------------------


def other_header(path: Path, **changes: Any) -> None:
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, {**about, **changes})


DAMAGES: dict[str, tuple[Any, str]] = {
    "missing": (lambda p: p.unlink(), "there is no file"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "is truncated or not a safetensors file"),
    "changed": (lambda p: p.write_bytes(p.read_bytes()[:-9] + b"123456789"), "is damaged: its checksum does not match"),
    "pickled": (lambda p: torch.save({"a": torch.zeros(1)}, p), "is truncated or not a safetensors file"),
    "foreign": (
        lambda p: __import__("safetensors.torch").torch.save_file({"a": torch.zeros(1)}, p),
        "was not written by Spikeloom",
    ),
    "nameless": (lambda p: save_tensors(p, {"a": torch.zeros(1)}, {}), "does not say of which model its weights are"),
    "of another": (lambda p: other_header(p, model={"name": "sew_7b"}), "holds the weights of sew_7b, not of"),
    "odd model": (lambda p: other_header(p, model=[1, 2]), "does not say of which model its weights are"),
    "odd option": (
        lambda p: other_header(p, model={"name": "report_sew_resnet34", "nose": 1}),
        "names settings that report_sew_resnet34 cannot have",
    ),
    "odd T": (lambda p: other_header(p, model={"name": "report_sew_resnet34", "T": 0}), "T must be at least"),
    "integers": (
        lambda p: save_tensors(p, {k: v.to(torch.int8) for k, v in load_tensors(p)[0].items()}, load_tensors(p)[1]),
        r"stem.weight holds torch.int8, the model's torch.float32",
    ),
    "huge": (lambda p: other_header(p, made_for={"in_channels": 2**40, "num_classes": 10}), "stem.weight has shape"),
    "odd neuron": (lambda p: other_header(p, neuron="LIF"), "does not say which neurons its model has"),
    "no neuron": (lambda p: other_header(p, neuron={"name": "LIFE"}), "unknown neuron 'LIFE'"),
    "other tensors": (lambda p: save_tensors(p, {"a": torch.zeros(1)}, load_tensors(p)[1]), "does not fit report_sew"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_files(damage: str, copy: Path) -> None:
    spoil, message = DAMAGES[damage]
    spoil(copy / "model.safetensors")
    with pytest.raises((DataFileError, UsageError), match=message) as found:
        spikeloom.create_model("report_sew_resnet34", weights=copy)
    assert "\n" not in str(found.value)


def test_a_network_that_does_not_classify_is_no_weights(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "run", tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "test_accuracy": None}))
    found = command("export", str(folder), "--to", "weights", "--out", str(tmp_path / "new"))
    assert "is not the folder of a finished run of a network that classifies" in found.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [lambda t: t[:1].fill_(1e6), lambda t: t.mul_(1e-6)], ids=["large", "small"])
def test_values_beyond_float16_stay(change: Callable[[torch.Tensor], object], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", SMALL)
    train(run, Told())
    tensors, about = load_tensors(run.weights)
    name = next(name for name in tensors if name.endswith("weight"))
    change(tensors[name])
    save_tensors(run.weights, tensors, about)
    assert command("export", str(run.folder), "--to", "weights", "--out", str(tmp_path / "new")).code == 0
    shared, _ = load_tensors(tmp_path / "new" / "model.safetensors")
    assert torch.equal(shared[name], tensors[name])
    assert "computed in float32: float16 and float32." in (tmp_path / "new" / "README.md").read_text()
    assert {t.dtype for key, t in shared.items() if key != name} == {torch.float16}


def test_int8_weights(home: Path, tmp_path: Path) -> None:
    """One byte a weight and a scale a channel: loaded, each is the nearest of 255 multiples of its scale."""
    shared = tmp_path / "shared"
    found = command("export", str(home / "run"), "--to", "weights", "--weights", "int8", "--out", str(shared), "--json")
    assert found.code == 0, found.err
    exact, _ = load_tensors(home / "run" / "model.safetensors")
    stored, header = read_safetensors(shared / "model.safetensors")
    names = json.loads(header["spikeloom"])["int8"]
    assert names == sorted(name for name, t in exact.items() if t.dim() > 1 and t[0].numel() >= 32)
    assert len(names) > 30
    loaded = spikeloom.load(shared).state_dict()
    for name, tensor in exact.items():
        if name in names:
            step = tensor.flatten(1).abs().amax(1).reshape(-1, *[1] * (tensor.dim() - 1)) / 127
            assert stored[name].dtype == torch.int8
            assert torch.all((loaded[name] - tensor).abs() <= step * 0.5001)
            multiples = loaded[name] / torch.where(step > 0, step, torch.ones(()))
            torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-3)
        else:
            half = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(loaded[name], half)
    model = spikeloom.create_model("report_sew_resnet34", weights=shared)
    assert torch.equal(model(X), spikeloom.load(shared)(X))
    page = (shared / "README.md").read_text()
    assert "computed in float32: int8 with a scale for each output channel and float16." in page
    summary = json.loads(found.out)
    assert summary["bytes"] < 0.6 * (home / "shared" / "model.safetensors").stat().st_size
    assert f"| accuracy | {summary['test_accuracy']:.2f} % on" in page
    # Shared again, it is still said what the trained weights did.
    again = command("export", str(shared), "--to", "weights", "--out", str(tmp_path / "again"), "--json")
    assert json.loads(again.out)["trained_accuracy"] == summary["trained_accuracy"]


def test_a_channel_of_zeros_is_stored_as_zeros(tmp_path: Path) -> None:
    tensor = torch.tensor([[0.0, 0.0], [3.0, -1.5], [1e-40, 0.0]])
    save_tensors(tmp_path / "a.safetensors", {"a": tensor}, {}, int8=["a"])
    found = load_tensors(tmp_path / "a.safetensors")[0]["a"]
    assert torch.equal(found[0], tensor[0])
    torch.testing.assert_close(found, tensor, rtol=0, atol=3 / 254)


def raw(path: Path, change: Callable[[dict[str, Any], Json], object]) -> None:
    """Writes a file of integers again, with tensors and header changed and a checksum that fits."""
    tensors, header = read_safetensors(path)
    about = json.loads(header["spikeloom"])
    change(tensors, about)
    save_tensors(path, tensors, about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, about: about.update(int8="a"), "its header does not list its integers"),
        (lambda t, about: about.update(int8=["b"]), "it has no b of integers with scales"),
        (lambda t, about: about.update(int8=[["a"]]), "it has no .* of integers with scales"),
        (lambda t, about: t.pop("a.scale"), "it has no a of integers with scales"),
        (lambda t, about: t.update({"a.scale": t["a.scale"][:1]}), "a is not int8 with a scale"),
        (lambda t, about: t.update({"a.scale": t["a.scale"].half()}), "a is not int8 with a scale"),
        (lambda t, about: t.update(a=t["a"].float()), "a is not int8 with a scale"),
        (lambda t, about: t.update(a=t["a"][0, 0]), "a is not int8 with a scale"),
    ],
)
def test_damaged_integers(change: Callable[[dict[str, Any], Json], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.randn(3, 4)}, {}, int8=["a"])
    raw(path, change)
    with pytest.raises(DataFileError, match=message):
        load_tensors(path)


# --- the networks of the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", spikeloom.list_weights())
def test_a_network_of_the_package_is_what_its_card_says(name: str) -> None:
    model, task = name.split("/")
    folder = trained_weights.FOLDER / name
    summary = json.loads((folder / "summary.json").read_text())
    card = summary["card"]
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == card["sha256"]
    assert all(0 <= rate <= 1 for rate in card["rates"].values())
    loaded = spikeloom.create_model(model, weights=task)
    assert sum(p.numel() for p in loaded.parameters()) == summary["parameters"]
    try:
        target = open_target(folder, {"images": 500, "batch": 100, "data": {"root": str(shared_folder() / "data")}})
    except UsageError as error:
        pytest.skip(f"REAL DATA MISSING: the accuracy of {name} is NOT checked: {error}")
    right, images = count_right(loaded, target)
    assert images == card["sample"]["images"]
    # On other processors sums are added in another order, and a spike may flip.
    assert abs(right - card["sample"]["right"]) <= 2


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in trained_weights.FOLDER.rglob("*") if path.is_file()) <= 12e6
