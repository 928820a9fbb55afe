"""The scripts in examples/ train on digits, and their networks are those of the other libraries."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spikingjelly_csnn", ("--channels", "16")),
        ("snntorch_convnet", ("--steps", "5")),
        ("snntorch_convnet", ("--steps", "5", "--loss", "count", "--epochs", "15")),  # nothing fires at first
        ("snntorch_leaky", ()),
        ("snntorch_leaky", ("--loss", "rate")),
        ("snntorch_leaky", ("--loss", "count")),
    ],
)
def test_an_example_learns(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    out = tmp_path / "run"
    common = ("--data", "digits", "--subset", "256", "--epochs", "5", "--out", str(out))
    summary = load(ROOT / "examples" / f"{name}.py").main([*common, *options])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in records]
    assert min(losses[1:]) < losses[0]
    assert summary["epochs"] == len(records)


def test_a_mistake_is_one_line() -> None:
    command = [sys.executable, str(ROOT / "examples" / "snntorch_leaky.py"), "--data", "digits", "--subset", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "subset must be an integer from 1" in result.stderr


def test_all_examples_are_run_and_listed() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    names = {path.stem for path in SCRIPTS}
    assert names == {"spikingjelly_csnn", "snntorch_convnet", "snntorch_leaky"}
    assert all(f"{name}.py" in page for name in names)
    assert all(len(path.read_text().splitlines()) <= 85 for path in SCRIPTS)


def test_networks_and_losses_are_theirs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("snntorch", reason="snnTorch is not installed")
        pytest.importorskip("spikingjelly", reason="SpikingJelly is not installed")
        bench = load(ROOT / "benchmarks" / "examples.py")
    x, y = torch.rand(3, 1, 28, 28), torch.tensor([3, 1, 4])
    for name, pair in bench.PAIRS.items():
        torch.manual_seed(1)
        theirs, ours = pair.theirs(), pair.ours()
        bench.same_start(theirs, ours)
        found, expected = ours(x), theirs(x)
        assert torch.allclose(found, expected, atol=1e-6), name
        steps = len(expected) if name == "leaky membrane" else 1  # a sum over steps there, a mean here
        our_loss, their_loss = pair.our_loss(found, y), pair.their_loss(expected, y) / steps
        assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5), name
        ours_grad = torch.autograd.grad(our_loss, list(ours.parameters()))
        grads = torch.autograd.grad(their_loss, list(theirs.parameters()))
        assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(ours_grad, grads, strict=True)), name
