"""Random changes to engine files, and random plans: an error of one line, or an engine that runs and is right."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damaged_plans import changed_tensors, changed_text, write
from helpers.random_plans import RandomPlan
from torch import Tensor

from spikeloom import create_model
from spikeloom.deploy import Engine, compile, load
from spikeloom.deploy.engine.ir import Conv, PlanError
from spikeloom.errors import UsageError
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]

SECONDS = 5.0  # that a run of what the limits below let through may take
LIMITS = {"max_bytes": 64 << 20, "max_operations": 10**9}


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Plan, weights and input of an engine with most kinds of steps."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    engine = compile(create_model("spikingformer_4_256", T=2, channels=16, heads=2, depth=1), x, tune=False)
    return json.loads(engine._plan.model_dump_json()), dict(engine.tensors), x


def survives(path: Path, x: Tensor) -> str:
    """Loads and runs an engine's file; says what became of it."""
    try:
        engine = load(path, **LIMITS)
    except UsageError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"refused with {error}"
    start = time.perf_counter()
    try:
        engine(x)
    except ValueError as error:
        return "another input" if "this engine takes" in str(error) else f"failed with {error}"
    return "ran" if time.perf_counter() - start < SECONDS else "ran for long"


def test_plans(small: tuple[dict[str, Any], dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    plan, tensors, x = small
    chance, found = random.Random(23), list[str]()
    for i in range(3000):
        write(tmp_path / "engine", changed_text(plan, chance, i), tensors)
        found.append(survives(tmp_path / "engine", x))
    assert set(found) == {"refused", "another input", "ran"}
    assert found.count("refused") > 1000
    assert found.count("ran") > 100


def test_tensors(small: tuple[dict[str, Any], dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    plan, tensors, x = small
    chance, found = random.Random(23), list[str]()
    for _ in range(1000):
        write(tmp_path / "engine", json.dumps(plan), changed_tensors(tensors, chance))
        found.append(survives(tmp_path / "engine", x))
    assert set(found) == {"refused", "ran"}
    assert found.count("refused") > 500
    assert found.count("ran") > 100


# --- plans that fit ---------------------------------------------------------------------------------------------------


def test_events_and_dense_layers_say_the_same() -> None:
    ran = event_layers = 0
    numbers = Counter[torch.dtype]()
    for seed in range(2500):
        torch.manual_seed(seed)
        made = RandomPlan(random.Random(seed))
        T, N = 1 + seed % 3, 1 + seed % 2
        plan = made.plan(T)
        try:
            dense = Engine(plan, made.tensors)
        except PlanError:
            continue
        events = dense.with_ways("event")
        x = made.example(T, N)
        assert torch.equal(events(x), dense(x)), seed
        ran += 1
        numbers.update(packed.weight.dtype for packed in events._packed.values())
        event_layers += sum(isinstance(step, Conv) and step.way == "event" for step in events.steps)
    assert ran > 2000
    assert event_layers > 2000
    assert numbers[torch.int16] > 300
