"""Buffers of an engine: as large as the largest input needed, whatever came before."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.deploy import Engine, compile, load
from spikeloom.deploy.engine import engine as engine_module
from spikeloom.deploy.engine.ir import Conv, Mean, PadChannels, Plan, Value
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear
from spikeloom.neurons import IF, LIF
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]


class Padded(nn.Module):
    """A network with zero channels, whose buffers are written once, and a layer that runs densely."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.neuron, self.second, self.last = Conv2d(2, 6, 3, padding=1), LIF(), Conv2d(10, 10, 1), IF()
        self.pool, self.head = GlobalAvgPool(), Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(self.first(x)).flatten(0, 1)
        y = nn.functional.pad(y, (0, 0, 0, 0, 1, 3)).unflatten(0, x.shape[:2])
        return self.head(self.pool(self.last(self.second(y))))


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.manual_seed(1)
    model = Padded().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-8, 9, parameter.shape) / 8)
    engine = compile(model, inputs(2, 2), tune=False)
    assert any(isinstance(step, PadChannels) for step in engine.steps)
    return engine


def inputs(T: int, N: int) -> Tensor:
    return torch.randint(-8, 17, (T, N, 2, 4, 4), generator=torch.Generator().manual_seed(T * 100 + N)) / 8


def fresh(engine: Engine) -> Engine:
    return engine.with_steps(engine.steps)


def held(engine: Engine) -> int:
    return sum(arena.bytes() for arena in engine._idle)


@pytest.mark.parametrize("way", ["event", "dense"])
def test_the_largest_input_serves_the_smaller(engine: Engine, way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    many, alone = fresh(engine).with_ways(way), fresh(engine).with_ways(way)
    lengths = [(T, N) for T in (7, 1, 12, 3) for N in (2, 5, 1)]
    expected = {shape: alone.with_steps(alone.steps)(inputs(*shape)) for shape in lengths}
    for shape in lengths:
        assert torch.equal(many(inputs(*shape)), expected[shape])
    alone(inputs(12, 5))
    assert held(many) == held(alone)
    assert len(many._idle) == 1
    # In steady state nothing is allocated: every shape finds its buffers.
    monkeypatch.setattr(torch, "empty", None)
    for shape in (*lengths, *reversed(lengths)):
        assert torch.equal(many(inputs(*shape)), expected[shape])


def test_more_shapes_than_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spikeloom.deploy.engine.executor.SHAPES", 2)
    many = fresh(engine)
    for T in (5, 4, 3, 5, 2, 4):
        assert torch.equal(many(inputs(T, 2)), fresh(engine)(inputs(T, 2)))


def test_images_that_need_much_memory_go_by_fewer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    x, many = inputs(4, 9), fresh(engine)
    expected = engine(x)
    monkeypatch.setattr(engine_module, "MOST_BYTES", 2 * engine.cost.bytes * 4 // 2)
    assert torch.equal(many(x), expected)
    assert held(many) <= 2 * engine.cost.bytes * 2


# --- pickle and copy --------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.mark.parametrize("way", COPIES)
def test_an_engine_is_copied(engine: Engine, way: str) -> None:
    x = inputs(3, 2)
    for made in (engine, engine.tuned(x)):
        other = COPIES[way](made)
        assert torch.equal(other(x), made(x))
        assert other.layers() == made.layers()
        assert all(other.tensors[name] is not tensor for name, tensor in made.tensors.items())


@pytest.mark.parametrize("way", COPIES)
def test_a_stream_is_copied_where_it_stands(engine: Engine, way: str) -> None:
    x = inputs(6, 2)
    stream = engine.stream()
    stream(x[:2])
    other = COPIES[way](stream)
    after = stream(x[2:4])
    assert torch.equal(other(x[2:4]), after)
    assert torch.equal(other(x[4:]), stream(x[4:]))
    assert not torch.equal(engine.stream()(x[2:4]), after), "the potentials do not matter"


# --- what a file may cost ---------------------------------------------------------------------------------------------


def test_the_cost_of_an_image(engine: Engine) -> None:
    """By hand: 4x4 places, 2 steps, event layers as bytes and once more as numbers."""
    sizes = {
        "input": 2 * 4,
        "first": 6 * 1,
        "padded": 10 * 1 + 10 * 4,
        "second": 10 * 1,
        "mean": 10 / 16 * 4,
        "head": 4 / 16 * 4,
    }
    assert engine.cost.bytes == round(2 * 16 * sum(sizes.values()))
    products = 16 * (6 * 2 * 9 + 10 * 10) + 10 * 4
    moved = 16 * (2 + 6) + 16 * (6 + 10) + 16 * (10 + 10) + 16 * 10 + 10 + 10 + 4
    assert engine.cost.operations == 2 * (products + moved)


def test_a_file_may_cost_so_much(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    engine.save(path)
    bytes, operations = engine.cost
    assert torch.equal(load(path, bytes, operations)(inputs(2, 3)), engine(inputs(2, 3)))
    with pytest.raises(
        UsageError, match=f"engine: plan: an image takes {bytes:,} bytes of maps, the limit is {bytes - 1:,}"
    ):
        load(path, max_bytes=bytes - 1)
    with pytest.raises(UsageError, match=r"operations, the limit is 10: raise it by load\(..., max_operations=...\)"):
        load(path, max_operations=10)


@pytest.mark.parametrize(("T", "padding"), [(1 << 16, (1, 1)), (8, (1024, 1024))])
def test_plans_that_ask_for_too_much(tmp_path: Path, T: int, padding: tuple[int, int]) -> None:
    """Each would take gigabytes, or minutes, in the first call."""
    steps = (Conv(layer="conv", out=(1,), x=0, weight="w", padding=padding), Mean(layer="mean", out=(2,), x=1))
    plan = Plan(input=Value(height=16, width=16, channels=16, static=False), T=T, steps=steps)
    Engine(plan, {"w": torch.zeros(16, 16, 3, 3)}).save(tmp_path / "engine")
    with pytest.raises(UsageError, match=r"an image takes .* the limit is 2,147,483,648"):
        load(tmp_path / "engine")


# --- forks ------------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys
import torch
from spikeloom.deploy import load
from spikeloom.neurons import LIF

torch.set_num_threads(2)
x = torch.rand(8, 4, 8192)
engine, image = load(sys.argv[1]), torch.rand(2, 64, 2, 4, 4)
with torch.no_grad():
    run = lambda: (LIF()(x).numpy(), engine(image).numpy())
    expected = run()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        found = run()
        assert torch.get_num_threads() == 2, "it is the user's"
        os._exit(0 if all((a == b).all() for a, b in zip(found, expected)) else 1)
    _, status = os.waitpid(child, 0)
    assert all((a == b).all() for a, b in zip(run(), expected))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_was_forked(engine: Engine, tmp_path: Path) -> None:
    """OpenMP's threads do not survive a fork: kernels and engine run on the child's one thread."""
    engine.with_ways("dense").save(tmp_path / "engine")
    found = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "engine")], capture_output=True, text=True, timeout=180
    )
    assert found.returncode != -signal.SIGALRM, "the child hangs"
    assert found.returncode == 0, found.stderr
