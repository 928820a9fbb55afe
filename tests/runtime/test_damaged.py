"""Damaged files: PyTorch and the runtime refuse the same ones, and of those that they take they say the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.damaged_plans import changed_tensors, changed_text, write
from torch import Tensor

from spikeloom import create_model, runtime
from spikeloom.deploy import Engine, compile, load
from spikeloom.errors import UsageError
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the runtime is not tested"),
]

LIMITS = {"max_bytes": 64 << 20, "max_operations": 10**9}


@pytest.fixture(scope="module")
def small() -> tuple[Engine, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    model = create_model("spikingformer_4_256", T=2, channels=16, heads=2, depth=1)
    return compile(model, x, tune=False, portable=True), x


def in_pytorch(path: Path, x: Tensor) -> tuple[str, Any]:
    try:
        engine = load(path, **LIMITS)
    except UsageError as error:
        return "refused", str(error)
    try:
        return "ran", engine(x).float().numpy()
    except ValueError as error:
        return "another input", str(error)


def in_runtime(path: Path, x: Tensor) -> tuple[str, Any]:
    try:
        network = runtime.load(path, **LIMITS)
    except runtime.NetworkError as error:
        return "refused", str(error)
    try:
        return "ran", network(x.numpy())
    except runtime.NetworkError as error:
        return "another input", str(error)


def agree(path: Path, x: Tensor) -> str:
    """What both make of a file."""
    (found, mine), (expected, theirs) = in_runtime(path, x), in_pytorch(path, x)
    assert found == expected, (mine, theirs)
    if found == "ran":
        assert np.array_equal(mine, theirs, equal_nan=True)
    else:
        assert "\n" not in mine
        assert 10 < len(mine) < 400
    return found


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_plans_and_tensors(small: tuple[Engine, Tensor], count: int, tmp_path: Path) -> None:
    engine, x = small
    plan, tensors = json.loads(engine._plan.model_dump_json()), dict(engine.tensors)
    chance, found = random.Random(count), Counter[str]()
    for i in range(count):
        if i % 4:
            write(tmp_path / "net", changed_text(plan, chance, i), tensors)
        else:
            write(tmp_path / "net", json.dumps(plan), changed_tensors(tensors, chance))
        found[agree(tmp_path / "net", x)] += 1
    assert found["refused"] > count / 2
    assert found["ran"] > count / 30


def changed_bytes(whole: bytes, header: int, chance: random.Random) -> bytes:
    """A file cut, or with some bytes of its header or anywhere replaced."""
    data = bytearray(whole)
    if chance.random() < 0.2:
        return bytes(data[: chance.randrange(len(data))])
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(header if chance.random() < 0.8 else len(data))
        data[place] = chance.choice((chance.randrange(256), *b'0129-eE.,:{}[]"\\u '))
    return bytes(data)


def test_bytes(small: tuple[Engine, Tensor], tmp_path: Path) -> None:
    """PyTorch's reader is another one here (of safetensors), and its words for a header differ."""
    engine, x = small
    engine.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance, found = random.Random(5), Counter[str]()
    for _ in range(1000):
        (tmp_path / "net").write_bytes(changed_bytes(whole, header, chance))
        kind, mine = in_runtime(tmp_path / "net", x)
        found[kind] += 1
        if kind == "ran":
            assert np.array_equal(mine, in_pytorch(tmp_path / "net", x)[1], equal_nan=True)
    assert found["refused"] > 500
    assert found["ran"] > 50


JSON: dict[str, Callable[[str], str]] = {
    "a key twice": lambda plan: plan.replace('"T":', '"T":1,"T":', 1),
    "values inside values": lambda plan: "[" * 100 + plan + "]" * 100,
    "is no object|no object": lambda plan: f"[{plan}]",
    "more than one value": lambda plan: plan + "1",
    "begins with 0": lambda plan: plan.replace('"T":', '"T":0', 1),
    "out of range": lambda plan: plan.replace('"T":', '"T":1e999,"U":', 1),
    "control character": lambda plan: plan.replace('"steps"', '"st\neps"', 1),
    "half a character": lambda plan: plan.replace('"steps"', '"\\ud800"', 1),
    "unknown escape": lambda plan: plan.replace('"steps"', '"\\x"', 1),
    "unknown word|no value": lambda plan: plan.replace('"T":2', '"T":NaN', 1),
    "a text without an end": lambda plan: '"' + plan.replace('"', "'"),
}


@pytest.mark.parametrize("why", JSON)
def test_what_is_no_json(why: str, small: tuple[Engine, Tensor], tmp_path: Path) -> None:
    engine, _ = small
    plan = JSON[why](engine._plan.model_dump_json())
    write(tmp_path / "net", plan, dict(engine.tensors))
    with pytest.raises(runtime.NetworkError, match=why):
        runtime.load(tmp_path / "net")
