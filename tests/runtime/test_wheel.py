"""The package `spikeloom-runtime`: built, installed beside NumPy alone, and run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spikeloom import create_model
from spikeloom.deploy import compile
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: nothing writes these networks"),
]

ROOT = Path(__file__).parents[2]


def check(*words: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_package_runs_beside_numpy_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    engine = compile(create_model("cifar10_net").eval(), images, tune=False, portable=True)
    engine.save(tmp_path / "net.safetensors")
    np.save(tmp_path / "images.npy", images.numpy())

    check(sys.executable, "-m", "pip", "wheel", ROOT / "packaging" / "runtime", "--no-deps", "-w", tmp_path)
    [wheel] = tmp_path.glob("spikeloom_runtime-*.whl")
    assert wheel.stat().st_size <= 5_000_000
    check(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    check(python, "-m", "pip", "install", wheel)
    installed = {line.partition("==")[0] for line in check(python, "-m", "pip", "list", "--format=freeze").splitlines()}
    assert installed - {"pip", "setuptools"} == {"numpy", "spikeloom-runtime"}

    out = check(python, "-m", "spikeloom.runtime", tmp_path / "net.safetensors", tmp_path / "images.npy")
    logits = engine(images).mean(0)
    assert [line.split(":")[1].split(",")[0] for line in out.splitlines()] == [
        f" class {label}" for label in logits.argmax(1).tolist()
    ]
    printed = [[float(word) for word in line.partition("logits ")[2].split()] for line in out.splitlines()]
    torch.testing.assert_close(torch.tensor(printed), logits, rtol=0, atol=6e-5)
