"""One process at a time writes a run's folder, and a lock does not outlive its process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.two_processes import ONE_THREAD, TORCHRUN

from spikeloom.cli.progress import Quiet
from spikeloom.errors import UsageError
from spikeloom.train import lock
from spikeloom.train.lock import locked
from spikeloom.train.loop import train
from spikeloom.train.recipe import check_settings
from spikeloom.train.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "data": {"name": "digits", "subset": 32, "test_subset": 20, "size": 16},
    "model": {"name": "colored_mnist_net", "T": 2, "image_size": 16},
    "train": {"batch_size": 16, "epochs": 1, "optimizer": "adam", "lr": 0.003, "schedule": "constant"},
}
HOLD = """
import os, runpy, sys, time
from pathlib import Path

locked = runpy.run_path(sys.argv.pop(1))["locked"]  # without torch

with locked(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        os.write(1, f"{os.getpid()}\\n".encode())
    elif len(sys.argv) == 2:
        print("held", flush=True)
    time.sleep(100)
"""
TURNS = """
import runpy, sys, time
from pathlib import Path
from spikeloom.errors import UsageError

locked = runpy.run_path(sys.argv.pop(1))["locked"]  # without torch
folder, overlaps, left = Path(sys.argv[1]), 0, 300
while left:
    try:
        with locked(folder):
            mark = folder / "inside"
            overlaps += mark.exists()
            mark.touch()
            mark.unlink(missing_ok=True)
        left -= 1
    except UsageError:
        time.sleep(0)
print(overlaps)
"""


RESUME = """
import os, sys
from spikeloom.errors import UsageError
from spikeloom.cli.progress import Quiet
from spikeloom.train.loop import train
from spikeloom.train.run import Run

try:
    train(Run.open(sys.argv[1]), Quiet())
except UsageError as error:
    print(f"{os.environ['RANK']}: {error}\\n", end="")
"""


def planned(folder: Path, seed: int = 1) -> Run:
    return Run.plan(folder, "quickstart/digits", "main", "full", check_settings({**SETTINGS, "seed": seed}, "here"))


def start(script: str, *words: Any) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", script, lock.__file__, *map(str, words)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_holds_it_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path):
        words = rf"^{tmp_path} is in use by process {os.getpid()} on \S+: wait until it ends or stop it, or choose"
        with pytest.raises(UsageError, match=words), locked(tmp_path):
            pass
        with locked(tmp_path.parent):  # another folder
            pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_it_ends_with_its_process(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path)
    assert first_line(process) == "held"
    with pytest.raises(UsageError, match=f"in use by process {process.pid} "), locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").exists()  # left behind, and no hindrance
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_do_not_hold_it(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path, "with a child")
    child = int(first_line(process))
    try:
        process.kill()
        process.wait()
        with locked(tmp_path):
            os.kill(child, 0)  # still there
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_many_take_turns(tmp_path: Path) -> None:
    """The file goes with every lock, and others wait at it: still no two are inside."""
    processes = [start(TURNS, tmp_path) for _ in range(3)]
    assert [first_line(process) for process in processes] == ["0"] * 3
    assert [process.wait(60) for process in processes] == [0] * 3
    for process in processes:
        process.communicate()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_running_is_not_resumed(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    with run.writing():
        before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
        with pytest.raises(UsageError, match="is in use by process"):
            train(Run.open(run.folder), Quiet())
        assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    assert train(Run.open(run.folder), Quiet())["epochs"] == 1


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second, same = planned(folder), planned(folder, seed=2), planned(folder)  # all before any begins
    with first.writing(), pytest.raises(UsageError, match="is in use"):
        train(second, Quiet())
    with pytest.raises(UsageError, match="is not empty: choose another folder with --out"):
        train(second, Quiet())
    assert Run.open(folder) == first
    assert train(same, Quiet())["seed"] == 1
    assert not (folder / ".lock").exists()


def test_what_a_killed_process_left_is_no_run(tmp_path: Path) -> None:
    for name in (".lock", ".settings.json.4194304.tmp"):
        (tmp_path / name).touch()
    train(planned(tmp_path), Quiet())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    with pytest.raises(UsageError, match="is not empty"):
        planned(tmp_path)


def test_a_run_that_stops_lets_go(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(run, Quiet(), lambda: bool(1 // 0))
    assert train(Run.open(run.folder), Quiet())["epochs"] == 1


@pytest.mark.slow
def test_all_processes_of_a_distributed_run_end(tmp_path: Path) -> None:
    """The main process holds the folder for all; where it cannot, each ends with a line."""
    run = planned(tmp_path / "run")
    script = tmp_path / "resume.py"
    script.write_text(RESUME)
    program = [*TORCHRUN, script, run.folder]
    with run.writing():
        done = subprocess.run(program, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300)
    first, second = sorted(done.stdout.splitlines())
    assert first.startswith(f"0: {run.folder} is in use by process {os.getpid()} on {socket.gethostname()}: wait until")
    assert second == f"1: the main process cannot write {run.folder}"
    done = subprocess.run(program, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert run.summary() is not None
    assert not (run.folder / ".lock").exists()
