"""The event engine's kernels in builds of their own: under sanitizers, and on another processor by emulation."""

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
    for command in (
        ["cmake", "-S", str(NATIVE), "-B", str(tmp_path), *words],
        ["cmake", "--build", str(tmp_path), "--target", f"events_fuzz_{level}"],
        [str(tmp_path / f"events_fuzz_{level}"), "2000"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout == "2000 cases\n"


@pytest.mark.slow
def test_threads_under_their_sanitizer(tmp_path: Path) -> None:
    """Callers that share layers with threads: no race, and every piece is done once (native/fuzz/team_fuzz.cpp)."""
    compiler, program = shutil.which("c++"), tmp_path / "team_fuzz"
    if compiler is None:
        pytest.skip("NO COMPILER: the threads are not tried under their sanitizer")
    sources = [str(NATIVE / "fuzz" / "team_fuzz.cpp"), str(NATIVE / "team.cpp")]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{NATIVE}"]
    done = subprocess.run([compiler, *flags, *sources, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([str(program), "3000"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3000 calls\n"), done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_random_shapes_on_aarch64(tmp_path: Path) -> None:
    """Every kernel compiles for aarch64, and those of the engine give the results of plain loops under emulation."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("NO g++-aarch64-linux-gnu OR qemu-user: nothing is run for aarch64")
    flags = ["-O1", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-DSPIKELOOM_LEVEL=baseline", f"-I{NATIVE}"]
    sources = sorted(path for part in ("neurons", "conv", "engine") for path in (NATIVE / part).glob("*.cpp"))
    for source in [NATIVE / "kernels.cpp", NATIVE / "team.cpp", *sources]:
        target = tmp_path / f"{source.parent.name}-{source.stem}.o"
        done = subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    fuzzer = tmp_path / "fuzz"
    objects = [*tmp_path.glob("engine-*.o"), tmp_path / "native-team.o"]
    parts = [str(NATIVE / "fuzz" / "events_fuzz.cpp"), *map(str, objects)]
    done = subprocess.run([compiler, *flags, *parts, "-static", "-o", str(fuzzer)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([emulator, str(fuzzer), "300"], capture_output=True, text=True)
    assert done.stdout == "300 cases\n", done.stdout + done.stderr
