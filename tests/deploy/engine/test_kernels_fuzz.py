"""The event engine's kernels and threads under sanitizers, in a build of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "native"


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "native"])
def test_random_shapes_under_sanitizers(level: str, tmp_path: Path) -> None:
    """No byte outside its buffer is touched, and every result is that of plain loops (native/fuzz)."""
    assert built_and_run(f"events_fuzz_{level}", tmp_path) == "2000 cases\n"


@pytest.mark.slow
def test_many_callers_share_workers_under_a_sanitizer(tmp_path: Path) -> None:
    """Every piece runs once, what it reads and writes is ordered, and no caller waits for a busy worker."""
    assert built_and_run("workers_stress", tmp_path) == "every piece ran once\n"


def built_and_run(target: str, folder: Path) -> str:
    """What a program of native/fuzz prints."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("NO CMAKE OR COMPILER: the kernels are not fuzzed")
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True)
    if nanobind.returncode:
        pytest.skip("NO NANOBIND: the kernels are not fuzzed")
    words = [
        f"-Dnanobind_DIR={nanobind.stdout.strip()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DSPIKELOOM_FUZZ=ON",
    ]
    printed = ""
    for command in (
        ["cmake", "-S", str(NATIVE), "-B", str(folder), *words],
        ["cmake", "--build", str(folder), "--target", target],
        [str(folder / target), "2000"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        printed = done.stdout
    return printed
