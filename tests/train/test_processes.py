"""Runs of several processes: the steps of one, one voice, one end, and the way from any number to another."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small_runs import SMALL, Told, equal, run_of, weights
from helpers.timeless import timeless
from helpers.two_processes import ONE_THREAD, TORCHRUN

from spikeloom.files import load_tensors
from spikeloom.train.build import build_model
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.recipe import check_settings
from spikeloom.train.run import Run

# The command line in every process; each leaves the digest of its weights, and how often it read each test image.
WORKER = """
import atexit, hashlib, json, os, runpy, sys

import torch

from spikeloom.analyse.report import render
from spikeloom.data.image_dataset import ImageDataset
from spikeloom.train import build, loop, setup

render.write_report = lambda *args: ("none", [])  # it reads images too
folder, sys.argv = sys.argv[1], ["spikeloom", *sys.argv[2:]]
kept, read, while_training = [], {}, {}
build_model, getitems = setup.build_model, ImageDataset.batch

def building(*args):
    kept.append(build_model(*args))
    return kept[-1]

def reading(self, indices):
    if not torch.is_grad_enabled():
        for index in indices:
            read[index] = read.get(index, 0) + 1
    return getitems(self, indices)

def leave():
    digest = hashlib.sha256()
    for name, tensor in kept[-1].state_dict().items():
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a model that is shared out
        digest.update(name.encode() + own.contiguous().numpy().tobytes())
    with open(f"{folder}/rank{os.environ['RANK']}.json", "w") as file:
        json.dump({"digest": digest.hexdigest(), "read": while_training}, file)

def training(run, progress, stop):
    steps, last = iter(range(1, 1000)), int(os.environ.get("STOP_AFTER", "0"))
    try:
        return train(run, progress, (lambda: next(steps) == last) if last else stop)
    finally:
        while_training.update(read)  # the report reads them once more

setup.build_model, ImageDataset.batch = building, reading
train, loop.train = loop.train, training
try:
    runpy.run_module("spikeloom", run_name="__main__", alter_sys=True)
finally:
    leave()
"""


def torchrun(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "worker.py").write_text(WORKER)
    return subprocess.run(
        [*TORCHRUN, str(folder / "worker.py"), str(folder), *words],
        env={**ONE_THREAD, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


TWO = [
    "train",
    "quickstart/digits",
    "data.subset=64",
    "data.test_subset=51",
    "data.size=16",
    "train.epochs=2",
    "model.name=colored_mnist_net",
    "model.T=2",
    "model.image_size=16",
    "train.batch_size=16",
    "train.augment=[]",
    "train.optimizer=adam",
    "train.lr=0.003",
    "train.weight_decay=0",
    "train.schedule=constant",
    "train.warmup_epochs=0",
]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    done = torchrun(tmp_path, *TWO, f"--out={tmp_path / 'run'}", "--json")
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["digest"] == ranks[1]["digest"]
    # Every test image once an epoch, in one process or the other.
    for index in range(51):
        assert sum(rank["read"].get(str(index), 0) for rank in ranks) == 2
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one process speaks
    summary = json.loads(line)
    run = Run.open(tmp_path / "run")
    digest = hashlib.sha256()
    model = build_model(run.settings, 1, 10)
    model.load_state_dict(weights(run))
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == ranks[0]["digest"]
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    evaluated = subprocess.run(
        [sys.executable, "-m", "spikeloom", "evaluate", str(run.folder), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(evaluated.stdout)["test_accuracy"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert json.loads(evaluated.stdout)["test_loss"] == pytest.approx(run.metrics()[-1]["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_processes_that_start_from_data_start_alike(tmp_path: Path) -> None:
    """Although each has images of its own: first filters and rates are those of the first process's."""
    words = ("train.whiten=true", "train.initial_rate=0.2", "train.epochs=1")
    done = torchrun(tmp_path, *TWO, *words, f"--out={tmp_path / 'run'}", "--json")
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["digest"] == ranks[1]["digest"]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    # Two of 16 images each are one of 32, up to the order of additions.
    done = torchrun(tmp_path, *TWO, "train.epochs=1", f"--out={tmp_path / 'two'}", "--json")
    assert done.returncode == 0, done.stderr
    two = Run.open(tmp_path / "two")
    train(run_of(tmp_path / "one", SMALL, data={"test_subset": 51}, train={"batch_size": 32}), Told())
    one = Run.open(tmp_path / "one")
    assert two.metrics()[0]["train_loss"] == pytest.approx(one.metrics()[0]["train_loss"], rel=1e-3)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_with_synced_norms_take_the_steps_of_one(tmp_path: Path) -> None:
    words = [word.replace("colored_mnist_net", "ms_resnet14") for word in TWO if "image_size" not in word]
    words += ["train.epochs=1", "train.optimizer=sgd"]
    for name, sync in (("synced", "true"), ("apart", "false")):
        done = torchrun(tmp_path, *words, f"train.sync_norm={sync}", f"--out={tmp_path / name}", "--json")
        assert done.returncode == 0, done.stderr
    settings = Run.open(tmp_path / "synced").settings.model_dump()
    settings["train"] |= {"batch_size": 32, "sync_norm": False}
    train(Run.plan(tmp_path / "one", "one", "main", "full", check_settings(settings, "one")), Told())
    one, synced, apart = (weights(Run.open(tmp_path / name)) for name in ("one", "synced", "apart"))
    # Statistics of each process by itself are others, and those of the first one stay.
    key = "stem_spike.norm.running_mean"
    torch.testing.assert_close(synced[key], one[key], rtol=1e-3, atol=1e-5)
    assert (apart[key] - one[key]).abs().max() > 20 * (synced[key] - one[key]).abs().max()


@pytest.mark.slow
def test_a_model_shared_out_takes_the_steps_of_copies(tmp_path: Path) -> None:
    """FSDP2: the same training, whole files, and the way back to copies in the middle of a run."""
    words = [word.replace("colored_mnist_net", "ms_resnet14") for word in TWO if "image_size" not in word]
    words += ["train.clip_grad=1", "data.validation=0.25", "data.test_subset=33"]
    for name, shard in (("copied", "false"), ("shared", "true")):
        done = torchrun(tmp_path, *words, f"train.shard={shard}", f"--out={tmp_path / name}", "--json")
        assert done.returncode == 0, done.stderr
    stopped = torchrun(tmp_path, *words, "train.shard=true", f"--out={tmp_path / 'both'}", "--json", STOP_AFTER="2")
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped; continue with") == 1
    done = torchrun(tmp_path, "train", f"--resume={tmp_path / 'both'}", "train.shard=false", "--json")
    assert done.returncode == 0, done.stderr
    copied = weights(Run.open(tmp_path / "copied"))
    for name in ("shared", "both"):
        found = weights(Run.open(tmp_path / name))
        assert found.keys() == copied.keys()
        for key, tensor in copied.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=2e-3, msg=lambda m, k=key: f"{k}: {m}")
    records = [Run.open(tmp_path / name).metrics()[-1]["train_loss"] for name in ("copied", "shared", "both")]
    assert records == pytest.approx([records[0]] * 3, rel=1e-3)


@pytest.mark.slow
def test_two_processes_go_on_as_one_and_back(tmp_path: Path) -> None:
    words = [*TWO, "train.total_batch=32", "train.epochs=3"]
    assert torchrun(tmp_path, *words, f"--out={tmp_path / 'whole'}", "--json").returncode == 0
    parts = tmp_path / "parts"
    assert torchrun(tmp_path, *words, f"--out={parts}", "--json", STOP_AFTER="1").returncode != 0
    run = Run.open(parts)
    steps = iter(range(1, 100))
    with pytest.raises(Interrupted):
        train(run, Told(), lambda: next(steps) == 3)
    assert torchrun(tmp_path, "train", f"--resume={parts}", "--json").returncode == 0
    whole = Run.open(tmp_path / "whole")
    assert [r["train_loss"] for r in run.metrics()] == pytest.approx(
        [r["train_loss"] for r in whole.metrics()], rel=1e-3
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*TWO, "train.epochs=100000", f"--out={run}"]
    program = [*TORCHRUN, "-m", "spikeloom", *words]
    started = subprocess.Popen(program, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 200
    while not (run / "checkpoint.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.2)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = started.communicate(timeout=30)
    assert started.returncode != 0
    assert error.count("another process of this run ended") == 1
    assert f"spikeloom train --resume {run}" in error


@pytest.mark.slow
def test_a_mistake_ends_both_processes(tmp_path: Path) -> None:
    done = torchrun(tmp_path, *TWO, "train.batch_size=64", f"--out={tmp_path / 'run'}")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("spikeloom: error:")]
    assert lines
    assert all("a batch of 128 images" in line for line in lines)


@pytest.mark.slow
def test_two_processes_continue(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torchrun(tmp_path, *TWO, f"--out={whole}", "--json").returncode == 0
    stopped = torchrun(tmp_path, *TWO, f"--out={parts}", "--json", STOP_AFTER="3")
    assert stopped.returncode != 0
    assert f"spikeloom train --resume {parts}" in stopped.stderr
    at = load_tensors(parts / "checkpoint.safetensors")[1]["position"]
    assert (at["epoch"], at["step"]) == (1, 1)  # in the middle of the second epoch
    done = torchrun(tmp_path, "train", f"--resume={parts}", "--json")
    assert done.returncode == 0, done.stderr
    assert equal(weights(Run.open(parts)), weights(Run.open(whole)))
    for first, second in zip(timeless(Run.open(parts).metrics()), timeless(Run.open(whole).metrics()), strict=True):
        assert first == pytest.approx(second)
