"""The same run, engine and graph are the same bytes, whatever process writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import sys
from pathlib import Path

import torch
from torch import nn

from spikeloom import deploy
from spikeloom.layers import BatchNorm, Conv2d, Flatten, Linear
from spikeloom.neurons import LIF
from spikeloom.cli.progress import Quiet
from spikeloom.train.loop import train
from spikeloom.train.recipe import check_settings
from spikeloom.train.run import Run

torch.set_num_threads(1)
folder = Path(sys.argv[1])
settings = {
    "data": {"name": "digits", "subset": 64, "test_subset": 20},
    "model": {"name": "report_sew_resnet34", "T": 2},
    "train": {"batch_size": 16, "epochs": 1, "lr": 0.1, "augment": [{"name": "random_crop", "padding": 1}]},
}
train(Run.plan(folder, "quickstart/digits", "main", "full", check_settings(settings, "here")), Quiet())
torch.manual_seed(0)
network = nn.Sequential(Conv2d(2, 4, 3), BatchNorm(4), LIF(), Flatten(), Linear(144, 3)).eval()
x = torch.ones(2, 3, 2, 8, 8)
deploy.compile(network, x, tune=False).save(folder / "engine.safetensors")
deploy.write_nir(deploy.to_nir(network, x), folder / "net.nir")
deploy.to_onnx(network, x, folder / "net.onnx")
"""
FILES = ("model.safetensors", "checkpoint.safetensors", "engine.safetensors", "net.nir", "net.onnx")


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("nir", reason="the extra `exchange` is not installed: its files are not compared")
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):  # of hashes, and with them the order of sets
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", WRITE, str(folder)], env=environment, check=True)
    for name in FILES:
        first, *others = ((folder / name).read_bytes() for folder in folders)
        assert all(other == first for other in others), name
