"""A run that is stopped, whenever and however, ends bit for bit where an unbroken run ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import spikeloom
from helpers.timeless import timeless

from spikeloom import cli
from spikeloom.errors import DataFileError
from spikeloom.files import load_tensors

STEPS, EPOCHS = 8, 3
# A network with batch norm and a random augmentation: running statistics and random numbers must continue too.
SETTINGS = [
    "quickstart/digits",
    "data.subset=64",
    "data.test_subset=40",
    "model.T=2",
    "train.batch_size=8",
    f"train.epochs={EPOCHS}",
    "train.checkpoint_minutes=0",
]
FILES = [
    "checkpoint.safetensors",
    "metrics.jsonl",
    "model.safetensors",
    "report.html",
    "report.json",
    "seconds.json",
    "settings.json",
    "summary.json",
    "tensorboard",
]

# Runs the command line in one process after the other, each of which kills itself while it writes. All have what the
# first one, which trains nothing, has loaded: that takes longer than their training.
SUICIDES = """
import json, os, signal, sys

import accelerate, sklearn.datasets, timm.scheduler.cosine_lr, torch.utils.tensorboard
import spikeloom.analyse.report.render, spikeloom.train.loop
from spikeloom import files
from spikeloom.cli import main

for stage, name, left, out in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

replace, save_file = os.replace, files.save_file

def at(path):
    global left
    left -= name in str(path)
    return left == 0 and name in str(path)

def half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if at(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def not_renamed(source, target, **options):
    if at(target):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)

if stage == "half written":
    files.save_file = half
else:
    os.replace = not_renamed

sys.argv = ["spikeloom", *sys.argv[2:], "--out=" + out]
main()
"""
DEATHS = [
    # Of 9 checkpoints an epoch the ninth is written after its evaluation, when its metrics are already there.
    ("half written", "checkpoint.safetensors", STEPS + 1, 0, STEPS),
    ("not renamed", "checkpoint.safetensors", STEPS + 4, 1, 2),
    ("not renamed", "summary.json", 1, EPOCHS, 0),
]


# Runs in this process and in others must add in the same order.
pytestmark = pytest.mark.usefixtures("one_thread")


def start(*words: str, threads: int = 1, script: str | None = None) -> subprocess.Popen[str]:
    program = ["-m", "spikeloom"] if script is None else ["-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [sys.executable, *program, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def position(run: Path) -> dict[str, Any]:
    return load_tensors(run / "checkpoint.safetensors")[1]["position"]


def wait_until_middle(process: subprocess.Popen[str], run: Path) -> None:
    """Returns as soon as a checkpoint from within the second epoch is there."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        # The library that reads opens the file twice: a checkpoint replaced in between looks damaged.
        with contextlib.suppress(DataFileError):
            # A record is written where an epoch ends: until then there is nothing to read.
            if (run / "metrics.jsonl").is_file() and (at := position(run)) and (at["epoch"], at["step"]) >= (1, 2):
                return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"the run never came to the middle of its second epoch: {process.communicate()}")


def resume_here(run: Path) -> None:
    """In this process, which did not begin it."""
    found = spikeloom("train", f"--resume={run}", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["run"] == str(run)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run measured, without times."""
    summary = timeless([json.loads((run / "summary.json").read_text())])[0]
    records = timeless([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 1))
    summary.pop("environment")
    summary.pop("memory_MB")
    return {"summary": summary, "metrics": records}


def assert_same_end(run: Path, unbroken: Path) -> None:
    for file in ("model.safetensors", "checkpoint.safetensors"):
        (tensors, _), (expected, _) = load_tensors(run / file), load_tensors(unbroken / file)
        assert list(tensors) == list(expected)
        for name, tensor in tensors.items():
            same = torch.equal(tensor.flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8))
            assert same, f"{file}: {name} differs"
        assert (run / file).read_bytes() == (unbroken / file).read_bytes(), f"{file}: equal tensors, other bytes"
    assert outcome(run) == outcome(unbroken)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    found = spikeloom("train", *SETTINGS, f"--out={run}", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["epochs"] == EPOCHS
    return run


def test_the_comparison_can_fail(unbroken: Path) -> None:
    # Weights are compared, not only file names: the trained model is not the one the run started from.
    tensors, _ = load_tensors(unbroken / "model.safetensors")
    assert any(name.endswith("running_var") for name in tensors)
    assert float(tensors["stem_spike.norm.running_var"].sub(1).abs().max()) > 0.1
    losses = [record["train_loss"] for record in outcome(unbroken)["metrics"]]
    assert len(set(losses)) == EPOCHS
    assert sorted(path.name for path in unbroken.iterdir()) == FILES


def test_sigkill_in_the_middle_of_an_epoch(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", *SETTINGS, f"--out={run}", "--json")
    wait_until_middle(process, run)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    at = position(run)
    assert 0 < at["epoch"] < EPOCHS or 0 < at["step"] < STEPS
    assert not (run / "summary.json").exists()
    resume_here(run)
    assert_same_end(run, unbroken)


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of processes that died as `DEATHS` says."""
    runs = [tmp_path_factory.mktemp("dead") / "run" for _ in DEATHS]
    plan = [(*death[:3], str(run)) for death, run in zip(DEATHS, runs, strict=True)]
    code, out, err = finish(start(json.dumps(plan), "train", *SETTINGS, "--json", script=SUICIDES))
    assert (code, out.split()) == (0, [str(-signal.SIGKILL)] * len(DEATHS)), err
    return runs


@pytest.mark.parametrize("number", range(len(DEATHS)), ids=lambda number: f"{DEATHS[number][1]} {DEATHS[number][0]}")
def test_sigkill_while_writing(unbroken: Path, dead: list[Path], number: int) -> None:
    run, (*_, epoch, step) = dead[number], DEATHS[number]
    at = position(run)  # the checkpoint before is whole
    assert (at["epoch"], at["step"]) == (epoch, step)
    resume_here(run)
    assert_same_end(run, unbroken)


def test_what_a_killed_process_left_is_cleared_away(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    # As `atomic` names them, of a process that is no more.
    for name in ("checkpoint.safetensors", "summary.json"):
        (run / f".{name}.4194304.tmp").write_bytes(bytes(1000))
    resume_here(run)
    assert_same_end(run, unbroken)
    assert sorted(path.name for path in run.iterdir()) == FILES


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stop_by_signal(unbroken: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    # Without checkpoints by the clock: the signal itself must write one.
    rare = [*SETTINGS[:-1], "train.checkpoint_minutes=1000"]
    process = start("train", *rare, f"--out={run}", "--json")
    deadline = time.monotonic() + 100
    while not (run / "checkpoint.safetensors").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 130, err
    assert out == ""
    assert f"spikeloom train --resume {run}" in err.splitlines()[-1]
    assert "Traceback" not in err
    at = position(run)
    assert at["epoch"] >= 1
    assert 0 < at["step"] < STEPS
    resume_here(run)
    assert_same_end(run, unbroken)


def test_a_finished_run_is_not_resumed(
    unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    monkeypatch.setattr(sys, "argv", ["spikeloom", "train", f"--resume={unbroken}"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("spikeloom: error:")
    assert "finished" in line
    assert {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


def test_a_run_continues_with_another_learning_rate_and_says_so(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for name in ("summary.json", "model.safetensors", "report.json", "report.html"):
        (run / name).unlink()
    words = ["train", f"--resume={run}", "train.lr=0.003", f"train.epochs={EPOCHS + 1}"]
    monkeypatch.setattr(sys, "argv", ["spikeloom", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    said = f"after epoch {EPOCHS}: train.epochs {EPOCHS + 1} instead of {EPOCHS}, train.lr 0.003 instead of 0.1"
    captured = capsys.readouterr()
    assert f"changed {said}" in captured.err
    assert f"changed {said}" in captured.out
    assert f"continued after {EPOCHS * STEPS} of {(EPOCHS + 1) * STEPS} steps" in captured.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, EPOCHS + 2))
    page = (run / "report.html").read_text()
    assert f"Settings were changed {said}" in page
    assert "No single command gives these settings" in page


@pytest.mark.slow
def test_sigkill_with_two_threads(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(start("train", *SETTINGS, f"--out={whole}", "--json", threads=2))[0] == 0
    for _ in range(2):
        process = (
            start("train", f"--resume={run}", "--json", threads=2)
            if run.exists()
            else start("train", *SETTINGS, f"--out={run}", "--json", threads=2)
        )
        wait_until_middle(process, run)
        process.kill()
        process.communicate()
    code, _, err = finish(start("train", f"--resume={run}", "--json", threads=2))
    assert code == 0, err
    assert_same_end(run, whole)
