"""Sweeps and comparisons: every combination is a run, a stopped sweep goes on, the table is of what the runs say."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import SMALL, spikeloom

from spikeloom.errors import UsageError
from spikeloom.search import parse_space
from spikeloom.sweep import Trial, parse_grid, table
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = [word for word in SMALL if not word.startswith("train.lr")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_words_of_a_grid() -> None:
    fixed, axes = parse_grid(["train.lr=1e-3, 3e-3", "seed=1..3", "train.epochs=2", "train.milestones=[1.0,2.0]"])
    assert fixed == ["train.epochs=2", "train.milestones=[1.0,2.0]"]
    assert axes == {"train.lr": ["1e-3", "3e-3"], "seed": ["1", "2", "3"]}
    _, axes = parse_grid(['train.augment=[{name="a",p=1},{name="b"}],[]'])
    assert axes == {"train.augment": ['[{name="a",p=1},{name="b"}]', "[]"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.lr=0.1"], "name settings with several values, such as"),
        (["train.lr=0.1,"], "train.lr=0.1,: a value is missing or stands twice"),
        (["seed=1,1"], "a value is missing or stands twice"),
        (["seed=3..1"], "3..1: the first number must be below the last"),
        (["seed=1..100", "train.lr=1,2,3,4,5,6,7,8,9,10,11"], "the sweep has 1100 combinations, and at most 1000 are"),
        (["seed=1..2000"], r"1..2000 has 2000 values, and a sweep at most 1000 combinations"),
        (["seed=0..1000"], r"0..1000 has 1001 values"),
    ],
)
def test_a_grid_that_is_none(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_grid(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.lr=1,2",), "name a recipe, for example: spikeloom sweep quickstart/digits"),
        (("quickstart/digits", "train.lr=0.1,high"), "train.lr: Input should be a valid number"),
        (("quickstart/digits", "train.epoch=1,2"), "unknown key 'train.epoch'; did you mean epochs"),
        (("quickstart/digits", "budget=smoke,full"), "a sweep has one budget"),
        (("report/table2", "seed=1,2"), "report/table2 has several rows: name one"),
    ],
)
def test_a_mistake_starts_nothing(words: tuple[str, ...], message: str) -> None:
    result = spikeloom("sweep", *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not Path("runs").exists()


def test_the_table_has_mean_and_deviation_of_seeds_and_the_best_first() -> None:
    def trial(lr: str, seed: int, accuracy: float | None, **more: float) -> Trial:
        found = None if accuracy is None else {"test_accuracy": accuracy, "test_loss": 1.0, "seconds": 2.0, **more}
        return Trial({"train.lr": lr, "seed": str(seed)}, Path(f"{lr}-{seed}"), found)

    rows = table(
        [trial("1", 1, 50.0), trial("1", 2, 60.0), trial("2", 1, 70.0), trial("2", 2, None), trial("3", 1, None)]
    )
    assert rows == [
        {"settings": {"train.lr": "2"}, "runs": 1, "failed": 1, "accuracy": 70.0, "deviation": None, "seconds": 2.0},
        {
            "settings": {"train.lr": "1"},
            "runs": 2,
            "failed": 0,
            "accuracy": 55.0,
            "deviation": pytest.approx(50**0.5),
            "seconds": 2.0,
        },
        {"settings": {"train.lr": "3"}, "runs": 0, "failed": 1},
    ]
    # The validation part ranks, not the test part.
    by_validation = table(
        [trial("1", 1, 50.0, validation_accuracy=80.0), trial("2", 1, 60.0, validation_accuracy=70.0)]
    )
    assert [row["settings"]["train.lr"] for row in by_validation] == ["1", "2"]


def test_a_sweep_its_table_and_a_comparison() -> None:
    words = (*OURS, "train.lr=0.003", "seed=1..2", "train.epochs=1")
    result = spikeloom("sweep", *words, "--json")
    assert result.code == 0, result.err
    [row] = json.loads(result.out)["rows"]
    folders = [Path("runs/sweep/quickstart/digits") / f"seed={seed}" for seed in (1, 2)]
    found = [(Run.open(folder).summary() or {})["test_accuracy"] for folder in folders]
    assert row["runs"] == 2
    assert row["accuracy"] == pytest.approx(statistics.mean(found))
    assert row["deviation"] == pytest.approx(statistics.stdev(found))
    again = spikeloom("sweep", *words)
    assert again.code == 0
    assert "2 runs, 2 of them finished" in again.err
    assert f"{row['accuracy']:.2f}" in again.out
    other = spikeloom("sweep", *words, "train.batch_size=8")
    assert other.code == 2
    assert "seed=1 holds a run with other settings" in other.err

    records = json.loads(spikeloom("compare", *map(str, folders), "--json").out)
    assert [list(record) for record in records] == [
        ["run", "seed", "accuracy", "validation", "epochs", "seconds", "parameters", "state"]
    ] * 2
    assert [record["run"] for record in records] == [str(folder) for folder in folders]
    assert [record["seed"] for record in records] == [1, 2]
    assert [record["accuracy"] for record in records] == found
    shown = spikeloom("compare", *map(str, folders)).out
    assert "seed" in shown
    assert "momentum" not in shown
    assert spikeloom("compare", str(folders[0])).code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.epochs=1",), "name what to search, such as"),
        (("train.lr=1e-1..1e-3",), "train.lr=1e-1..1e-3: the first number must be below the last"),
        (("train.lr=1e-3..1e-1", "seed=1..3"), "a search does not choose seed or budget"),
        (("train.rate=1e-3..1e-1",), "unknown key 'train.rate'"),
        (("train.lr=-1..1",), "greater than 0"),
    ],
)
def test_a_search_that_is_none(words: tuple[str, ...], message: str) -> None:
    pytest.importorskip("optuna", reason="needs Optuna")
    result = spikeloom("sweep", "quickstart/digits", "--search=3", *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not Path("runs").exists()


def test_ranges_are_by_their_logarithm_where_they_are_wide() -> None:
    optuna = pytest.importorskip("optuna", reason="needs Optuna")
    fixed, space = parse_space(["train.lr=1e-3..1e-1", "a=0.1..0.9", "T=2..6", "n=a,b", "train.epochs=2"], optuna)
    assert fixed == ["train.epochs=2"]
    kinds = optuna.distributions
    assert space == {
        "train.lr": kinds.FloatDistribution(1e-3, 1e-1, log=True),
        "a": kinds.FloatDistribution(0.1, 0.9),
        "T": kinds.IntDistribution(2, 6),
        "n": kinds.CategoricalDistribution(("a", "b")),
    }


@pytest.mark.slow
def test_a_search_and_its_continuation() -> None:
    pytest.importorskip("optuna", reason="needs Optuna")
    words = (*OURS, "train.lr=1e-3..1e-1", "train.epochs=1")
    place = Path("runs/sweep/quickstart/digits")
    first = spikeloom("sweep", *words, "--search=1", "--json")
    assert first.code == 0, first.err
    assert len(json.loads(first.out)["rows"]) == 1
    again = spikeloom("sweep", *words, "--search=3", "--jobs=2", "--json")
    assert "3 runs, 1 of them finished" in again.err
    rows = json.loads(again.out)["rows"]
    assert len({row["settings"]["train.lr"] for row in rows}) == 3
    assert [row["accuracy"] for row in rows] == sorted((row["accuracy"] for row in rows), reverse=True)
    assert json.loads(first.out)["rows"][0] in rows
    rates = [Run.open(folder).settings.train.lr for folder in place.glob("lr=*/")]
    assert len(rates) == 3
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert "3 runs, 3 of them finished" in spikeloom("sweep", *words, "--search=3").err


@pytest.mark.slow
def test_a_search_ends_where_there_is_no_more_to_try() -> None:
    pytest.importorskip("optuna", reason="needs Optuna")
    result = spikeloom("sweep", *OURS, "train.lr=0.01,0.02", "train.epochs=1", "--search=4", "--json")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["rows"]) == 2


def test_without_optuna_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = spikeloom("sweep", "quickstart/digits", "--search=3", "train.lr=1e-3..1e-1")
    assert result.code == 2
    assert "pip install 'spikeloom[sweep]'" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_fails_is_in_the_table() -> None:
    # 64 images, in a batch of 128: `train` refuses it.
    result = spikeloom("sweep", *OURS, "train.lr=0.003", "train.epochs=1", "train.batch_size=16,128", "--jobs=1")
    assert result.code == 1
    assert "train.batch_size=128: failed: a batch of 128 images" in result.err
    assert "0, 1 failed" in result.out
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    words = [*OURS, "train.lr=0.003,0.002", "train.epochs=60", "data.subset=512", "--jobs=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "spikeloom", "sweep", *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    place = tmp_path / "runs/sweep/quickstart/digits"
    deadline = time.monotonic() + 120
    while len(list(place.glob("*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; the same command continues" in err
    done = [len(Run.open(folder).metrics()) for folder in place.iterdir() if folder.is_dir()]
    assert len(done) == 2
    assert all(0 < epochs < 60 for epochs in done)
    assert not any((folder / ".lock").exists() and _held(folder / ".lock") for folder in place.iterdir())


def _held(path: Path) -> bool:
    """Whether the process that wrote a lock is alive."""
    digits = "".join(character for character in path.read_text().split()[0] if character.isdigit())
    try:
        os.kill(int(digits), 0)
    except (OSError, ValueError):
        return False
    return True
