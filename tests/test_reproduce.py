"""Published tables beside measured ones, on images made up here: the numbers of the layout are the published ones."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_files import idx_bytes, write_cifar10, write_fsdd

from spikeloom import cli
from spikeloom import reproduce as module
from spikeloom.analyse import Measured, audit, read_figure, write_report
from spikeloom.analyse.audit.energy import paper_rule
from spikeloom.cli.progress import Quiet
from spikeloom.cli.tables import print_table
from spikeloom.data import create_dataset
from spikeloom.errors import UsageError
from spikeloom.registry import list_recipes
from spikeloom.reproduce import reproduce
from spikeloom.train.evaluate import load
from spikeloom.train.loop import Interrupted
from spikeloom.train.recipe import load_recipe
from spikeloom.train.run import Run

ROWS = ("s0t2a", "s0t2b", "s0t2c")
TINY: dict[str, Any] = {"data": {"subset": 4, "test_subset": 4}, "train": {"batch_size": 2}}
WORDS = ["budget=smoke", "data.subset=4", "data.test_subset=4", "train.batch_size=2"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight random images in MNIST's files."""
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST" / "raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (8, 28, 28), np.uint8)),
            ("labels-idx1", np.arange(8, dtype=np.uint8)),
        ):
            (root / "MNIST" / "raw" / f"{stem}-{kind}-ubyte").write_bytes(idx_bytes(array))
    write_cifar10(root, 8)
    write_fsdd(root, 8)
    return root


def run_table(
    home: Path, root: Path, rows: tuple[str, ...] = ROWS, stop: Callable[[], bool] = lambda: False, **overrides: Any
) -> list[dict[str, Any]]:
    values = {**TINY, "data": {**TINY["data"], "root": str(root)}, **overrides}
    return reproduce(
        load_recipe("report/table2"), rows, "smoke", values, home / "runs", home / "results", Quiet(), stop
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, list[dict[str, Any]]]:
    home = tmp_path_factory.mktemp("table")
    return home, run_table(home, root)


def test_every_row_is_trained_once(table: tuple[Path, list[dict[str, Any]]]) -> None:
    home, records = table
    assert [record["row"] for record in records] == list(ROWS)
    runs = sorted((home / "runs" / "report-table2").iterdir())
    assert [run.name.rsplit("-", 1)[0] for run in runs] == [f"{row}-smoke" for row in ROWS]
    for run in runs:
        assert Run.open(run).summary() is not None


def test_results_are_written(table: tuple[Path, list[dict[str, Any]]]) -> None:
    home, records = table
    folder = home / "results" / "report" / "table2"
    assert sorted(path.name for path in folder.iterdir()) == [f"{row}.smoke.seed1.json" for row in ROWS]
    for record in records:
        assert json.loads((folder / f"{record['row']}.smoke.seed1.json").read_text()) == record


def test_published_and_measured(table: tuple[Path, list[dict[str, Any]]]) -> None:
    recipe = load_recipe("report/table2")
    for record in table[1]:
        assert record["published"] == recipe.rows[record["row"]].published
        assert record["system"] == recipe.rows[record["row"]].system
        assert record["measured"]["acc"] in (0, 25, 50, 75, 100)  # of four images
        assert record["measured"]["best_acc"] == record["measured"]["acc"]
        assert (record["budget"], record["seed"], record["epochs"]) == ("smoke", 1, 1)
        assert record["data"]["train"] == "MNIST files of 8 images, first 4 images"
        assert record["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("row", "parameters", "flops"),
    [("s0t2a", 14_788_938, "315.80"), ("s0t2b", 463_866, "72.20"), ("s0t2c", 463_866, "72.20")],
)
def test_the_layout_is_the_published_one(
    table: tuple[Path, list[dict[str, Any]]], row: str, parameters: int, flops: str
) -> None:
    [record] = [record for record in table[1] if record["row"] == row]
    assert record["parameters"] == parameters
    assert f"{record['flops_s0'] / 1e6:.2f}" == flops
    assert f"{record['measured']['flops_M']:.1f}" == f"{record['published']['flops_M']:.1f}"
    assert f"{record['measured']['params_M']:.2f}" == f"{record['published']['params_M']:.2f}"


def test_results_name_no_place_of_this_machine(table: tuple[Path, list[dict[str, Any]]], root: Path) -> None:
    for path in (table[0] / "results").rglob("*.json"):
        assert str(root) not in path.read_text()
        assert str(table[0]) not in path.read_text()


def test_finished_runs_are_taken_again(table: tuple[Path, list[dict[str, Any]]], root: Path) -> None:
    home, records = table
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", lambda *args: pytest.fail("a finished row is trained again"))
        started = time.perf_counter()
        again = run_table(home, root)
    assert time.perf_counter() - started < 10
    assert again == records
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")} == before


def test_other_settings_are_another_run(table: tuple[Path, list[dict[str, Any]]], root: Path) -> None:
    home, _ = table
    row = ("s0t2b",)
    # Nothing that changes the result: the same run.
    train = {**TINY["train"], "checkpoint_minutes": 100.0}
    run_table(home, root, row, train=train)
    runs = home / "runs" / "report-table2"
    assert len(list(runs.iterdir())) == 3
    run_table(home, root, row, seed=2)
    assert len(list(runs.iterdir())) == 4
    assert (home / "results" / "report" / "table2" / "s0t2b.smoke.seed2.json").is_file()
    (home / "results" / "report" / "table2" / "s0t2b.smoke.seed2.json").unlink()


def test_an_interrupted_table_continues(table: tuple[Path, list[dict[str, Any]]], tmp_path: Path, root: Path) -> None:
    rows = ("s0t2b", "s0t2c")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3  # after the first of two steps of the second row

    with pytest.raises(Interrupted):
        run_table(tmp_path, root, rows, stop)
    assert [path.name for path in (tmp_path / "results").rglob("*.json")] == ["s0t2b.smoke.seed1.json"]
    records = run_table(tmp_path, root, rows)
    assert len(list((tmp_path / "runs" / "report-table2").iterdir())) == 2
    timeless = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    assert timeless == [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in table[1]
        if record["row"] in rows
    ]


def test_all_rows_are_checked_before_the_first_is_trained(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UsageError, match="no row 's0t2x'"):
        run_table(tmp_path, root, ("s0t2b", "s0t2x"))
    with pytest.raises(UsageError, match=r"unknown key 'train\.epoch'"):
        run_table(tmp_path, root, train={"epoch": 1})
    assert list(tmp_path.iterdir()) == []


def test_settings_without_effect_are_refused(tmp_path: Path, root: Path) -> None:
    adam = {**TINY["train"], "optimizer": "adam", "momentum": 0.8}
    with pytest.raises(UsageError, match=r"report/table2#s0t2a: train\.momentum needs train\.optimizer=sgd, which is"):
        run_table(tmp_path, root, train=adam)
    assert list(tmp_path.iterdir()) == []


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MNIST is not in"):
        run_table(tmp_path, tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


class Told(Quiet):
    """Remembers what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def run_rows(home: Path, root: Path, name: str, rows: list[str], told: Told, **overrides: Any) -> list[dict[str, Any]]:
    values = {**TINY, "data": {**TINY["data"], "root": str(root)}, **overrides}
    recipe = load_recipe(name)
    return reproduce(recipe, rows, "smoke", values, home / "runs", home / "results", told, lambda: False)


SEQUENTIAL = ("lif_100", "lif_10", "klif_100")


def test_rows_without_data_are_left_out(tmp_path: Path, root: Path) -> None:
    told = Told()
    records = run_rows(tmp_path, root, "psn/sequential", list(SEQUENTIAL), told, model={"channels": 8})
    assert [record["row"] for record in records] == list(SEQUENTIAL)
    missing = [warning for warning in told.warnings if "CIFAR-100" in warning]
    assert len(missing) == 1
    assert missing[0].startswith("psn/sequential without lif_100, klif_100: CIFAR-100 is not in")
    for record in records[::2]:
        assert record["missing"].startswith("CIFAR-100 is not in")
        assert record["published"]["acc"] > 50
        assert "measured" not in record
    assert records[1]["measured"]["acc"] in (0, 25, 50, 75, 100)
    [folder] = (tmp_path / "runs" / "psn-sequential").iterdir()
    assert folder.name.startswith("lif_10-")
    assert [path.name for path in (tmp_path / "results").rglob("*.json")] == ["lif_10.smoke.seed1.json"]


def test_a_row_that_fails_leaves_the_others(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Run, *args: Any) -> None:
        if run.row == "s0t2b":
            raise UsageError("the loss is nan")
        real(run, *args)

    real = module.train
    told = Told()
    monkeypatch.setattr(module, "train", lambda run, *args: fail(run, *args) or run.summary())
    records = run_rows(tmp_path, root, "report/table2", ["s0t2b", "s0t2c"], told)
    assert records[0]["failed"] == "the loss is nan"
    assert "report/table2#s0t2b failed: the loss is nan" in told.warnings
    assert records[1]["measured"]["acc"] >= 0
    # Alone, or when no row is left, it is an error.
    with pytest.raises(UsageError, match="the loss is nan"):
        run_rows(tmp_path, root, "report/table2", ["s0t2b"], told)
    monkeypatch.setattr(module, "train", lambda run, *args: real(run, *args) and fail(run, *args))
    with pytest.raises(UsageError, match="no row 's0t2x'"):
        run_rows(tmp_path, root, "report/table2", ["s0t2b", "s0t2x"], told)


@pytest.mark.parametrize("row", ["psu", "ipsu", "rpsu"])
def test_costs_are_those_of_the_data_s_steps(tmp_path: Path, root: Path, row: str) -> None:
    # The network's own T is 15, the data have 100 steps, and IPSU has a weight for each of them.
    [record] = run_rows(tmp_path, root, "psu/fsdd", [row], Told())
    layers = [(80, 128), (128, 128), (128, 128), (128, 10)]
    assert record["macs"] == sum(a * b for a, b in layers)
    weights = 3 * (100 * 101 if row != "psu" else 0)  # gains of every pair of steps and their bias
    assert record["parameters"] == sum(a * b + b for a, b in layers) + weights


def test_operations_of_norms_count_the_data_s_steps(tmp_path: Path, root: Path) -> None:
    # T is 32, the columns of an image, whatever the network's own is.
    small = {"name": "sequential_cifar_net", "channels": 8, "T": 4}
    [record] = run_rows(tmp_path, root, "psn/sequential", ["lif_10"], Told(), model=small)
    norms, pooled = 3 * 8 * 32 + 3 * 8 * 16, 8 * 32 + 8 * 16  # elements of one step
    assert record["flops_s0"] - record["macs"] == 2 * 32 * norms + pooled
    [folder] = (tmp_path / "runs" / "psn-sequential").iterdir()
    write_report([folder], {}, Quiet())
    measured = json.loads((folder / "report.json").read_text())
    assert measured["cost"]["flops_M"] == record["measured"]["flops_M"]


def test_pre_training_is_reproduced(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [record] = run_rows(tmp_path, root, "spikformer_v2/pretrain", ["main"], Told())
    assert record["measured"]["acc"] is None
    assert record["macs"] is None
    assert record["parameters"] > 10_000
    print_table("a title", "a paper", "smoke", [record])
    assert "spikformer" in capsys.readouterr().out.lower()


# --- on the command line ----------------------------------------------------------------------------------------------


def spikeloom(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["spikeloom", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_the_printed_table(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    words = ["reproduce", "report/table2#s0t2b", *WORDS, f"data.root={root}"]
    assert spikeloom(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    record = json.loads(Path("results/report/table2/s0t2b.smoke.seed1.json").read_text())
    assert "SEW-ResNet-34" in out
    for number in (0.46, 72.2, 99.18):  # published
        assert f" {number} " in out
    for number in ("0.464", "72.20", "68.57", f"{record['measured']['acc']:.2f}"):  # measured
        assert f" {number} " in out
    assert "MNIST files of 8 images" in " ".join(out.split())
    assert f"results: {Path('results/report/table2')}" in out
    # As JSON, from the finished run; numbers only.
    assert spikeloom(monkeypatch, *words, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [record]
    assert captured.err == ""


OWN = """
title = "A table"
paper = "a paper"
command = "spikeloom reproduce own.toml"

[settings]
model = { name = "sequential_cifar_net", channels = 8 }
train = { epochs = 1, batch_size = 4, lr = 0.01, channels_last = false }

[budgets]

[rows.there]
system = "with data"
data = { name = "sequential_cifar10", subset = 4, test_subset = 4 }

[rows.absent]
system = "without data"
data = { name = "sequential_cifar100", subset = 4, test_subset = 4 }
published = { acc = 62.21 }

[rows.wild]
system = "too fast"
data = { name = "sequential_cifar10", subset = 8, test_subset = 4 }
train = { lr = 1e38, epochs = 3 }
"""


def test_the_table_is_printed_without_the_rows_that_have_no_numbers(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("own.toml").write_text(OWN.split("[rows.wild]")[0])
    assert spikeloom(monkeypatch, "reproduce", "own.toml", f"data.root={root}") == 0
    captured = capsys.readouterr()
    table = [line for line in captured.out.splitlines() if line.startswith("│")]
    assert any(" with data " in line for line in table)
    [absent] = [line for line in table if " without data " in line]
    assert " 62.21 " in absent
    assert " no data " in absent
    assert "results: results/own" in captured.out
    assert "without absent: CIFAR-100 is not in" in captured.err
    # A row that fails on the way is told, and seen in the exit code.
    Path("own.toml").write_text(OWN)
    assert spikeloom(monkeypatch, "reproduce", "own.toml", f"data.root={root}") == 2
    captured = capsys.readouterr()
    assert "own.toml#wild failed: the loss is" in captured.err
    [wild] = [line for line in captured.out.splitlines() if " too fast " in line]
    assert " failed " in wild
    assert any(" with data " in line and " CIFAR-10" in line for line in captured.out.splitlines())


def test_an_interrupted_command_says_how_to_continue(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(*args: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(module, "train", interrupted)
    assert spikeloom(monkeypatch, "reproduce", "report/table2#s0t2b", *WORDS, f"data.root={root}") == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the same command continues" in captured.err


def test_places_may_look_like_numbers(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    places = ["--runs=2026", "--results=11"]
    words = ["reproduce", "report/table2#s0t2b", *WORDS, f"data.root={root}", *places, "--json"]
    assert spikeloom(monkeypatch, *words) == 0, capsys.readouterr().err
    assert Path("11/report/table2/s0t2b.smoke.seed1.json").is_file()
    assert Path("2026/report-table2").is_dir()


def test_a_recipe_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(module.__file__).parent / "recipes" / "quickstart" / "digits.toml").read_text()
    Path("mine.toml").write_text(text)
    words = ["model.T=1", *WORDS, "--json"]
    for name in ("mine.toml", str(tmp_path / "mine.toml")):
        assert spikeloom(monkeypatch, "reproduce", name, *words) == 0, capsys.readouterr().err
    assert list(Path("results").rglob("main.smoke.seed1.json"))
    assert Path("mine.toml").read_text() == text


def test_what_a_row_publishes_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Energy and operations by the audit of the trained network, memory, time; nothing else."""
    monkeypatch.chdir(tmp_path)
    text = (Path(module.__file__).parent / "recipes" / "quickstart" / "digits.toml").read_text()
    columns = {"energy_uJ": 14.8, "ops_G": 1.0, "memory_GB": 9.64, "sec_per_epoch": 339.0, "hours": 5.0, "acc5": 84.5}
    columns |= {"acc_12": 90.0, "acc_288": 90.0, "rate": 0.2, "attention_ops_M": 6.3, "shortcut_rates": 0.0}
    published = ", ".join(f"{name} = {value}" for name, value in columns.items())
    Path("mine.toml").write_text(f"{text}published = {{ {published} }}\n")
    assert spikeloom(monkeypatch, "reproduce", "mine.toml", "model.T=2", "data.size=8", *WORDS) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    [record] = [json.loads(path.read_text()) for path in Path("results").rglob("*.json")]
    [summary] = [json.loads(path.read_text()) for path in Path("runs").rglob("summary.json")]
    images, _ = create_dataset("digits", None, "test", subset=4).batch([0, 1, 2, 3])
    found = audit(load(next(Path("runs").rglob("summary.json")).parent), images)
    assert record["measured"]["energy_uJ"] == pytest.approx(found.energy_pj / 1e6)
    assert record["measured"]["ops_G"] == pytest.approx(sum(row.macs + row.acs for row in found.rows) / 1e9)
    assert record["measured"]["memory_GB"] == summary["memory_MB"] / 1e3
    assert record["measured"]["sec_per_epoch"] == summary["seconds"] / summary["epochs"]
    assert record["measured"]["hours"] == summary["seconds"] / 3600
    assert "acc5" not in record["measured"], "of ten classes"
    assert "energy_mJ" not in record["measured"]
    folder = str(next(Path("runs").rglob("summary.json")).parent)
    assert spikeloom(monkeypatch, "evaluate", folder, "data.size=12", "--json") == 0
    assert record["measured"]["acc_12"] == json.loads(capsys.readouterr().out)["test_accuracy"]
    assert "acc_288" not in record["measured"], "more than twice the side of the training"
    assert 0 < record["measured"]["rate"] < 1
    assert {"attention_ops_M", "shortcut_rates"}.isdisjoint(record["measured"]), "it has neither"
    for head in ("energy uJ", "operations G", "memory GB", "s an epoch", "hours", "top-5 %"):
        assert head in printed
    assert f" {record['measured']['energy_uJ']:.2f} " in printed


@pytest.mark.parametrize(
    ("recipe", "model", "rule"),
    [
        ("report/table1", "report_vgg16", "report000"),
        ("spikingformer/table1", "spikingformer_8_384", "spikingformer"),
        ("spikingformer/table1", "spikformer_8_384", "appendixG_1"),
        ("spikformer/table2", "spikformer_4_256", "spikformer"),
        ("spikformer_v2/imagenet", "spikformer_v2_8_384", "spikformer"),
        ("syna/gesture", "syna_gesture", "syna"),
        ("psn/sequential", "sequential_cifar_net", "measured"),
        ("mine.toml", "vggsnn", "measured"),
    ],
)
def test_energy_is_counted_by_the_document_s_rule(recipe: str, model: str, rule: str) -> None:
    assert paper_rule(recipe, model) == rule


def test_results_that_cannot_be_written(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a regular file")
    words = ["reproduce", "report/table2#s0t2b", *WORDS, f"data.root={root}", "--results=file/below"]
    assert spikeloom(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = [line for line in captured.err.splitlines() if line.startswith("spikeloom: error:")]
    assert "file/below" in line
    assert not Path("runs").exists(), "the table was trained before the place of its results was tried"


# --- recipes that measure ---------------------------------------------------------------------------------------------

MEASURED = [name for name in list_recipes() if load_recipe(name).measures]


@pytest.mark.parametrize("name", MEASURED)
def test_every_measurement_takes_its_options(name: str) -> None:
    recipe = load_recipe(name)
    for row in recipe.rows:
        for budget in ("smoke", "short", "full"):
            module.check_measure(recipe, row, budget, {})
    with pytest.raises(UsageError, match=f"{name}.*measured, not trained"):
        recipe.resolve(next(iter(recipe.rows)))
    with pytest.raises(UsageError, match="unknown key 'no_such_option'"):
        module.check_measure(recipe, next(iter(recipe.rows)), "smoke", {"measure": {"no_such_option": 1}})


@pytest.mark.parametrize("data", [{"name": "cifar10", "root": "/there"}, {"name": "cifar10"}])
def test_a_measured_row_names_no_place_of_this_machine(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def measure(layout: str, images: int, n: int = 1, data: Any = None) -> Measured:
        given.append(data)
        return Measured()

    monkeypatch.setattr(module, "MEASUREMENTS", {"rates_by_depth": measure})
    overrides = {"measure": {"data": data}}
    recipe, row = load_recipe("sew/figure5_to_8"), "figure5_cifar"
    [record] = reproduce(recipe, [row], "smoke", overrides, tmp_path, tmp_path, Quiet(), lambda: False)
    assert given == [data]
    assert record["settings"]["measure"]["data"] == {"name": "cifar10"}


def test_a_measured_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["measure.lengths=[2, 5]", "measure.repeats=5", f"--results={tmp_path}", "budget=smoke"]
    assert spikeloom(monkeypatch, "reproduce", "paralif/speed", *words, "--json") == 0
    [record] = json.loads(capsys.readouterr().out)
    assert record["measured"]["acceleration_plain_lif_at_5"] > 0
    assert record["published"]["acceleration_plain_lif_at_5000"] == 200
    folder = tmp_path / "paralif" / "speed"
    assert json.loads((folder / "main.smoke.seed1.json").read_text()) == record
    assert record["figures"] == ["figures/main.smoke.seed1.speed.json"]
    assert list(tmp_path.rglob("*.html")) == []
    times = [row["paralif_ms"] for rows in record["tables"].values() for row in rows]
    assert read_figure(folder / record["figures"][0]).data[2].y == pytest.approx(times, rel=1e-5)
