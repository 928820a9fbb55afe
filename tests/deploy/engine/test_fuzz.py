"""Random changes to engine files, and random plans: an error of one line, or an engine that runs and is right."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_plans import RandomPlan
from safetensors.torch import save
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


def write(path: Path, plan: str, tensors: dict[str, Tensor]) -> None:
    metadata = {"format": "spikeloom event engine 1", "plan": plan}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


STRANGE: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    64,
    255,
    256,
    1000,
    1024,
    1 << 16,
    1 << 20,
    1 << 31,
    1 << 63,
    10**30,
    -(1 << 40),
    0.5,
    -0.0,
    1e38,
    1e-45,
    1e300,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "conv",
    "x" * 10_000,
    [],
    [1],
    [1, 2, 3],
    {},
    {"x": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inner for place in places(part, (*path, key))]


def changed(plan: Any, chance: random.Random) -> Any:
    """The plan with one to three values replaced, removed or doubled."""
    plan = json.loads(json.dumps(plan))
    for _ in range(chance.randint(1, 3)):
        *outer, key = chance.choice(places(plan))
        parent = plan
        for part in outer:
            parent = parent[part]
        what = chance.random()
        if what < 0.1:
            del parent[key]
        elif what < 0.2 and isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(parent[key])))
        elif what < 0.4 and isinstance(parent[key], int):
            parent[key] += chance.choice((-1, 1))
        else:
            parent[key] = chance.choice(STRANGE)
    return plan


def test_plans(small: tuple[dict[str, Any], dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    plan, tensors, x = small
    chance, found = random.Random(23), list[str]()
    for i in range(3000):
        text = json.dumps(changed(plan, chance))
        if i % 100 == 0:  # a number of thousands of digits
            text = text.replace("2", "2" * chance.choice((4000, 5000)), 1)
        write(tmp_path / "engine", text, tensors)
        found.append(survives(tmp_path / "engine", x))
    assert set(found) == {"refused", "another input", "ran"}
    assert found.count("refused") > 1000
    assert found.count("ran") > 100


def test_tensors(small: tuple[dict[str, Any], dict[str, Tensor], Tensor], tmp_path: Path) -> None:
    plan, tensors, x = small
    chance, found = random.Random(23), list[str]()
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda t: t[:0],
        lambda t: t[:1],
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t.transpose(0, -1),
        lambda t: t.half(),
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.bfloat16(),
        lambda t: t * torch.nan,
        lambda t: t * torch.inf,
        lambda t: t * 1e38,
        lambda t: torch.zeros_like(t),
        lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
        lambda t: t.repeat(*[1] * (t.dim() - 1), 3),
        lambda t: t.sum(),
    )
    for _ in range(1000):
        bad = dict(tensors)
        for name in chance.sample(sorted(bad), chance.randint(1, 2)):
            if chance.random() < 0.1:
                del bad[name]
            else:
                bad[name] = chance.choice(changes)(bad[name])
        write(tmp_path / "engine", json.dumps(plan), bad)
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
