"""The benchmark of whole training steps: a contender that cannot be compiled is said to be so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def training() -> ModuleType:
    pytest.importorskip("spikingjelly", reason="SPIKINGJELLY MISSING: the training benchmark is NOT tested")
    path = Path(__file__).parents[2] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("training_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(training.NETWORKS, "tiny", (lambda: training.SEW18(2, (8,), 1), 2))
    return training


def compiled(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    """Puts another backend in the compiler's place, which takes a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))


def test_the_compiled_rival_is_the_eager_one(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []
    compiled(monkeypatch, lambda graph, inputs: graphs.append(graph) or graph)
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    with tiny.backend("reference"):
        outputs = [tiny.build("tiny", name)(x) for name in ("spikingjelly", tiny.COMPILED)]
    assert graphs
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("fails", [False, True])
def test_a_row_says_what_cannot_be_compiled(tiny: ModuleType, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: nn.Module, inputs: object) -> object:
        if fails:
            raise RuntimeError("no compiler here")
        return graph

    compiled(monkeypatch, backend)
    row = tiny.measure("tiny", "fp32", ("ours", tiny.COMPILED), 5, memory=False)
    assert row["ours_ms"] > 0
    if fails:
        assert "no compiler here" in row[tiny.COMPILED]
        assert not any(key.startswith(f"{tiny.COMPILED}_") or key.endswith(f"to_{tiny.COMPILED}") for key in row)
    else:
        assert row[f"{tiny.COMPILED}_ms"] > 0
        assert row[f"ours_to_{tiny.COMPILED}"] > 0


def test_a_clock_around_native_calls(tiny: ModuleType, native: Any) -> None:
    found = tiny.native_split(tiny.step_of("tiny", "ours", "fp32"), 1)
    assert found["norm + neuron"] > 0
    assert tiny._dispatch.native is native
    assert not any(tiny.native_split(tiny.step_of("tiny", "relu", "fp32"), 1).values()), "the rival has none of ours"
