"""Networks without PyTorch: the bits of the engine in PyTorch, whatever the plan, the numbers and the threads."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_plans import RandomPlan
from helpers.small_networks import lively, shortened
from torch import Tensor

from spikeloom import create_model, runtime
from spikeloom.deploy import Engine, compile, load
from spikeloom.deploy.engine import ir
from spikeloom.deploy.engine.ir import PlanError, Value
from spikeloom.ops import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the runtime is not tested")


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    runtime.set_threads(number)
    yield
    torch.set_num_threads(before)
    runtime.set_threads(0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with on_threads(request.param):
        yield request.param


def assert_same(engine: Engine, path: Path, x: Tensor, note: object = "") -> None:
    """That the file of an engine says the same to the bit: whole, for one image, and as a stream."""
    engine.save(path)
    network, reference, images = runtime.load(path), load(path), 0 if engine.values[0].static else 1
    for part in (x, x.narrow(images, 0, 1)):
        found, expected = network(part.numpy()), reference(part).float().numpy()
        assert found.shape == expected.shape
        assert np.array_equal(found, expected, equal_nan=True), note
    stream, other = network.stream(), reference.stream()
    for _ in range(2):
        assert np.array_equal(stream(x.numpy()), other(x).float().numpy()), note


@pytest.mark.parametrize("level", _dispatch.native.levels() if _dispatch.native is not None else [])
def test_random_plans(level: str, threads: int, tmp_path: Path) -> None:
    steps, before = Counter[str](), runtime.level()
    runtime.level(level)  # the library is the one of the engine
    assert _dispatch.native.level() == level
    try:
        for seed in range(60):
            torch.manual_seed(seed)
            made = RandomPlan(random.Random(1000 * threads + seed))
            T = 1 + seed % 3
            try:
                engine = Engine(made.plan(T), made.tensors).with_ways("direct").with_ways("event")
            except PlanError:
                continue
            x = made.example(T, 1 + seed % 4)
            assert_same(engine, tmp_path / "engine", x, seed)
            steps.update(step.op for step in engine.steps)
    finally:
        runtime.level(before)
    assert len(steps) >= 14, steps


def test_steps_that_random_plans_lack(threads: int, tmp_path: Path) -> None:
    neuron = ir.Neuron(decay=0.5, gain=1.0, threshold=(0.25, 0.5), v_reset=None, strict_firing=True)
    one = neuron.model_copy(update={"threshold": (0.5,), "v_reset": -0.125})
    options: dict[str, Any] = {"weight": "w", "bias": "b", "padding": (1, 1), "way": "direct", "layer": "conv"}
    integers = options | {"weight": "small", "scale": "s"}
    pool = {"kernel": 3, "stride": 2, "padding": 1, "ceil": True}
    steps = (
        ir.Conv(x=0, out=(1, 2), neuron=one, **options),
        ir.Conv(x=0, out=(3,), keep_sum=False, neuron=one, **options | {"weight": "half"}),
        ir.Conv(x=2, out=(4,), keep_sum=False, neuron=neuron, residual=1, **integers),
        ir.Join(op="or", xs=(2, 3), out=(5,), layer="or"),
        ir.Attention(q=5, k=2, v=4, heads=2, scale=0.3, out=(6,), layer="attention"),
        ir.Pool(op="avg_pool", x=6, out=(7,), layer="pool", count_padding=False, **pool),
        ir.Pool(op="avg_pool", x=4, out=(8,), layer="pool", count_padding=True, **pool),
        ir.Join(op="mul", xs=(7, 8), out=(9,), layer="mul"),
        ir.Affine(op="affine", x=9, weight="k", bias="k", out=(10,), layer="affine"),
        ir.Affine(op="divide", x=10, weight="k", out=(11,), layer="divide"),
        ir.Map(op="sigmoid", x=11, out=(12,), layer="map"),
        ir.Map(op="shift", x=12, high=-0.3, out=(13,), layer="map"),
        ir.Map(op="clamp", x=13, low=-0.2, high=0.4, out=(14,), layer="map"),
        ir.Pool(op="max_pool", x=14, out=(15,), kernel=2, stride=1, padding=1, layer="pool"),
        ir.Fire(x=15, out=(16, 17), neuron=neuron, residual=15, layer="fire"),
        ir.Time(op="time_sum", x=16, out=(18,), layer="time"),
        ir.Join(op="cat", xs=(18, 17, 15), out=(19,), layer="cat"),
        ir.Mean(x=19, out=(20,), layer="mean"),
        ir.Time(op="time_mean", x=20, out=(21,), layer="time"),
    )
    tensors = {
        "w": torch.randn(6, 3, 3, 3),
        "half": torch.randn(6, 3, 3, 3).bfloat16(),
        "small": torch.randint(-127, 128, (6, 6, 3, 3), dtype=torch.int8),
        "s": torch.rand(6) / 99,
        "b": torch.randn(6) / 9,
        "k": torch.rand(1, 4, 1) + 0.5,
    }
    for static in (True, False):
        value = Value(height=7, width=7, channels=3, static=static)
        engine = Engine(ir.Plan(input=value, T=3, per_step=False, steps=steps), tensors)
        assert_same(engine, tmp_path / "engine", torch.randn(*(() if static else (4,)), 5, 3, 7, 7))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("cifar10_net", {}, (3, 3, 16, 16)),
        ("report_sew_resnet34", {"T": 2}, (3, 3, 16, 16)),
        ("spikingformer_4_256", {"T": 2, "channels": 32, "heads": 2, "depth": 1}, (3, 3, 16, 16)),
        ("sew_7b", {}, (2, 2, 2, 128, 128)),
        pytest.param("ghostnet_dfc", {"T": 2}, (3, 3, 32, 32), marks=pytest.mark.slow),
    ],
)
def test_networks(name: str, options: dict[str, Any], shape: tuple[int, ...], weights: Any, tmp_path: Path) -> None:
    x = torch.rand(shape)
    model = create_model(name, **options)
    if name == "report_sew_resnet34":
        model = shortened(model, 1)
    engine = compile(lively(model, x), x, weights=weights, tune=False, portable=True)
    for number in (1, 2):
        with on_threads(number):
            assert engine(x).std() > 0
            assert_same(engine, tmp_path / "engine", x)


def test_pytorch_is_not_needed(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 2, 2)
    file, image, engine = tmp_path / "net", tmp_path / "image.npy", compile(_Features(), x, portable=True)
    engine.save(file)
    np.save(image, x[0].numpy())
    code = (
        "import sys; from spikeloom import runtime; import numpy; "
        f"print(runtime.load({str(file)!r})(numpy.load({str(image)!r})[None]).tolist()); "
        "assert not {'torch', 'pydantic', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(engine(x[:1]).tolist())
    for words, status in (([file, image], 0), ([tmp_path / "none", image], 2), ([file, file], 2), ([image, image], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "spikeloom.runtime", *map(str, words)], capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert (done.stdout if status == 0 else done.stderr).count("\n") == 1
    assert done.stderr.startswith("error: ")


class _Features(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from spikeloom.layers import Conv2d, GlobalAvgPool, Linear
        from spikeloom.neurons import LIF

        self.conv, self.neuron, self.pool, self.head = Conv2d(3, 6, 1), LIF(), GlobalAvgPool(), Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        from spikeloom.encode import as_sequence

        return self.head(self.pool(self.neuron(self.conv(as_sequence(x, 3, 4)))))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[runtime.Network, Engine]:
    path = tmp_path_factory.mktemp("network") / "net"
    engine = compile(_Features().eval(), torch.rand(2, 3, 4, 4), portable=True)
    engine.save(path)
    return runtime.load(path), engine


def test_what_it_takes(network: tuple[runtime.Network, Engine], tmp_path: Path) -> None:
    net, engine = network
    assert repr(net) == "Network(3x4x4 -> 5, 3 steps of an image)"
    assert net.info["bytes"] == engine.cost.bytes
    assert net.info["operations"] == engine.cost.operations
    for wrong in (np.zeros((2, 3, 4, 5)), np.zeros((3, 4, 4)), np.zeros((0, 3, 4, 4)), np.array("x"), np.zeros(())):
        with pytest.raises(runtime.NetworkError, match=r"takes \[N, 3, 4, 4\]"):
            net(wrong)
    whole = np.arange(96).reshape(2, 3, 4, 4)
    assert np.array_equal(net(whole), engine(torch.tensor(whole)).numpy())
    assert np.array_equal(net(whole[:, :, ::-1]), engine(torch.tensor(whole).flip(2)).numpy())
    stream = net.stream()
    stream(whole)
    with pytest.raises(runtime.NetworkError, match="carries 2 images, got 1"):
        stream(whole[:1])
    with pytest.raises(runtime.NetworkError, match="no instruction level avx1024"):
        runtime.level("avx1024")
    with pytest.raises(runtime.NetworkError, match="threads must be"):
        runtime.set_threads(-1)
    with pytest.raises(runtime.NetworkError, match="no such file"):
        runtime.load(tmp_path / "none")
    engine.save(tmp_path / "net")
    with pytest.raises(runtime.NetworkError, match=r"bytes of maps, the limit is 10: raise max_bytes"):
        runtime.load(tmp_path / "net", max_bytes=10)
    with pytest.raises(runtime.NetworkError, match=r"operations, the limit is 10: raise max_operations"):
        runtime.load(tmp_path / "net", max_operations=10)


def test_a_stream_outlives_its_network(network: tuple[runtime.Network, Engine], tmp_path: Path) -> None:
    engine = network[1]
    engine.save(tmp_path / "net")
    x = np.ones((2, 3, 4, 4), np.float32)
    stream, other = runtime.load(tmp_path / "net").stream(), engine.stream()
    for _ in range(3):
        assert np.array_equal(stream(x), other(torch.tensor(x)).numpy())


def test_threads_share_a_network(network: tuple[runtime.Network, Engine]) -> None:
    net, engine = network
    xs = [torch.rand(n, 3, 4, 4) for n in (1, 2, 3, 70)]
    expected, wrong = [engine(x).numpy() for x in xs], list[int]()

    def work(k: int) -> None:
        wrong.extend(k for _ in range(50) if not np.array_equal(net(xs[k].numpy()), expected[k]))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path, wrong: float) -> None:
    x = torch.rand(2, 1, 8, 8)
    compile(create_model("report_sew_resnet34", weights="digits"), x).save(tmp_path / "net.safetensors")
    x[1, 0, 3, 4] = wrong
    network = runtime.load(tmp_path / "net.safetensors")
    for run in (network, network.stream()):
        with pytest.raises(runtime.NetworkError, match="NaN or infinite"):
            run(x)
    engine = load(tmp_path / "net.safetensors")
    for run in (engine, engine.stream()):
        with pytest.raises(ValueError, match="NaN or infinite"):
            run(x)
