"""How threads share the work of an engine."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikeloom.deploy import Engine
from spikeloom.deploy.engine import executor
from spikeloom.deploy.engine.ir import Attention, Conv, Fire, Mean, Neuron, Plan, Pool, Value
from spikeloom.ops import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested")

NEURON = Neuron(decay=0.5, gain=1.0, threshold=(0.7,), v_reset=0.0, strict_firing=False)


@pytest.fixture(autouse=True)
def own_threads() -> Generator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def conv(at: int, groups: int = 1) -> Conv:
    return Conv(
        layer=f"conv{at}",
        out=(at + 1,),
        x=at,
        weight=f"w{at}",
        padding=(1, 1),
        groups=groups,
        way="event",
        keep_sum=False,
        neuron=NEURON,
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Every kernel of the engine, with weights whose sums round."""
    torch.manual_seed(3)
    steps = (
        Fire(layer="input", out=(1,), x=0, keep_sum=False, neuron=NEURON),
        conv(1),  # columns of the window
        Pool(layer="pool", out=(3,), x=2, op="max_pool", kernel=2, stride=2),
        conv(3),
        conv(4),  # lists
        conv(5, groups=256),
        Attention(layer="attention", out=(7,), q=6, k=5, v=4, heads=4, scale=0.125),
        Mean(layer="mean", out=(8,), x=7),
    )
    shapes = {1: (64, 64), 3: (256, 64), 4: (256, 256), 5: (256, 1)}
    tensors = {
        f"w{at}": torch.randn(out, inside, 3, 3) * math.sqrt(5 / (9 * inside)) for at, (out, inside) in shapes.items()
    }
    return Engine(Plan(input=Value(height=16, width=16, channels=64, static=False), T=3, steps=steps), tensors)


def images(N: int) -> Tensor:
    return torch.rand(3, N, 64, 16, 16, generator=torch.Generator().manual_seed(N))


@pytest.mark.parametrize("openmp", [False, True])
@pytest.mark.parametrize("N", [1, 3, 20])
def test_any_number_of_threads_gives_the_same_bits(
    engine: Engine, N: int, openmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(N)
    torch.set_num_threads(1)
    expected = engine(x)
    assert len(expected.unique()) > 100
    with engine.executor(3, N) as run:
        run(x.permute(0, 1, 3, 4, 2))
        assert 0.02 < run.densities()[5] < 0.9, "a silent layer shows nothing"
    monkeypatch.setattr(executor, "ALONE", -1 if openmp else 1 << 60)
    monkeypatch.setattr(executor, "SMALL", 0.0)
    copy = Engine(engine._plan, engine.tensors)  # pyright: ignore[reportPrivateUsage]
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        with copy.executor(3, N) as run:
            assert run.openmp == openmp
        for _ in range(3):  # the first call tells how long a layer takes
            assert torch.equal(copy(x), expected)


def test_pytorch_has_as_many_threads_as_before(engine: Engine) -> None:
    torch.set_num_threads(2)
    with engine.executor(3, 1) as run:
        assert run.openmp == (torch.get_num_threads() == 2)
    engine(images(1))
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), engine.executor(3, 1):
        _ = 1 / 0
    assert torch.get_num_threads() == 2


STRESS = """
import os, signal, sys, threading
import torch
from spikeloom.deploy import load

engine = load(sys.argv[1])
images = [torch.rand(3, n, 64, 16, 16) for n in (1, 2, 5)]
torch.set_num_threads(1)
expected = [engine(x) for x in images]
wrong = []

def right(threads):
    torch.set_num_threads(threads)
    return all(torch.equal(engine(x), y) for x, y in zip(images, expected))

def work(threads):
    for _ in range(20):
        if not right(threads):
            wrong.append(threads)

threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 2, 3, 4, 8)]
for thread in threads:
    thread.start()
while any(thread.is_alive() for thread in threads):  # forks in the middle of calls
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        os._exit(0 if right(2) and right(4) else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        wrong.append("child")
sys.exit(repr(wrong) if wrong else 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_many_threads_and_forks(engine: Engine, tmp_path: Path) -> None:
    """Callers with other numbers of threads share one pool of them, while children are forked."""
    engine.save(tmp_path / "engine")
    found = subprocess.run(
        [sys.executable, "-c", STRESS, str(tmp_path / "engine")], capture_output=True, text=True, timeout=600
    )
    assert found.returncode != -signal.SIGALRM, "a child hangs"
    assert found.returncode == 0, found.stderr
