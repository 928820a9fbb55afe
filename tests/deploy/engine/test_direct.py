"""Layers that run by multiplications of ours: convolutions of any shape, the same sums however the work is shared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.deploy import Engine, compile
from spikeloom.deploy.engine.ir import Conv, Flatten, Mean, Plan, Value
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear
from spikeloom.neurons import IF
from spikeloom.ops import _dispatch

pytestmark = pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested")


@pytest.fixture(params=_dispatch.native.levels() if _dispatch.native is not None else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _dispatch.native.level()
    _dispatch.native.set_level(request.param)
    yield request.param
    _dispatch.native.set_level(before)


class Layer:
    """A convolution of a random shape, and its input."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        chance = random.Random(seed)
        self.sides = chance.randint(1, 9), chance.randint(1, 9)
        channels = chance.choice((1, 2, 3, 6, 16, 33))
        kernel = tuple(chance.randint(1, min(4, side)) for side in self.sides)
        self.groups = chance.choice([d for d in (1, 1, 2, 3, channels) if channels % d == 0])
        out = self.groups * chance.choice((1, 3, 5, 16, 17, 40, 64, 70))
        self.padding, self.stride = (chance.randint(0, 3), chance.randint(0, 3)), chance.randint(1, 3)
        self.most = chance.choice((None, 3))
        shape = (chance.randint(1, 3), chance.randint(1, 4), channels, *self.sides)
        self.x = torch.randn(shape) if self.most is None else torch.randint(0, 4, shape).float()
        self.weight, self.bias = torch.randn(out, channels // self.groups, *kernel), torch.randn(out)

    def engine(self) -> Engine:
        height, width = self.sides
        options = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
        step = Conv(layer="conv", out=(1,), x=0, weight="w", bias="b", way="direct", **options)
        value = Value(height=height, width=width, channels=self.x.shape[2], most=self.most)
        plan = Plan(input=value, T=1, steps=(step, Flatten(layer="flat", out=(2,), x=1)))
        return Engine(plan, {"w": self.weight, "b": self.bias})

    def expected(self) -> Tensor:
        x = self.x.flatten(0, 1).double()
        found = F.conv2d(x, self.weight.double(), self.bias.double(), self.stride, self.padding, 1, self.groups)
        return found.permute(0, 2, 3, 1).flatten(1).unflatten(0, self.x.shape[:2])


def test_sums_are_those_of_a_convolution(level: str, one_thread: None) -> None:
    for seed in range(150):
        layer = Layer(seed)
        found, expected = layer.engine()(layer.x), layer.expected()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4, msg=f"{seed}")


def test_many_inputs_are_added_in_pieces(level: str, one_thread: None) -> None:
    for inputs, outputs in ((767, 5), (769, 64), (4608, 20), (3000, 130)):
        x, weight = torch.randn(1, 5, inputs, 1, 1), torch.randn(outputs, inputs, 1, 1)
        step = Conv(layer="linear", out=(1,), x=0, weight="w", way="direct")
        plan = Plan(input=Value(height=1, width=1, channels=inputs), T=1, steps=(step,))
        expected = F.linear(x.flatten(2).double(), weight.flatten(1).double())
        torch.testing.assert_close(Engine(plan, {"w": weight})(x).double(), expected, rtol=1e-5, atol=2e-3)


def test_threads_and_vectors_change_no_bit() -> None:
    vectors = [level for level in _dispatch.native.levels() if level != "baseline"]
    before, threads = _dispatch.native.level(), torch.get_num_threads()
    try:
        for seed in range(40):
            layer, found = Layer(seed), list[Tensor]()
            for level in vectors:
                _dispatch.native.set_level(level)
                for count in (1, 2):
                    torch.set_num_threads(count)
                    found.append(layer.engine()(layer.x))
            assert all(torch.equal(found[0], other) for other in found[1:]), seed
    finally:
        _dispatch.native.set_level(before)
        torch.set_num_threads(threads)


def test_means_of_many_places_do_not_drift(level: str) -> None:
    x = torch.rand(1, 2, 5, 200, 150)
    plan = Plan(input=Value(height=200, width=150, channels=5), T=1, steps=(Mean(layer="mean", out=(1,), x=0),))
    expected = x.double().mean((3, 4)).float()
    torch.testing.assert_close(Engine(plan, {})(x), expected, rtol=3e-7, atol=0)


def test_a_portable_engine_has_no_layer_of_pytorch() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Conv2d(3, 20, 3, padding=1), IF(), GlobalAvgPool(), Linear(20, 10)).eval()
    x = torch.rand(4, 2, 3, 8, 8)
    for tune in (True, False):
        engine = compile(model, x, tune=tune, portable=True)
        ways = [step.way for step in engine.steps if isinstance(step, Conv)]
        assert ways[0] == "direct"
        assert "dense" not in ways
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-4, atol=1e-4)
    timed = compile(model, x, portable=True).layers()[0]
    assert timed["way"] == "direct"
    assert timed["direct_ms"] > 0
    assert timed["dense_ms"] is None


@pytest.mark.parametrize(
    ("weights", "portable", "measured"),
    [
        ("fp32", None, {"dense", "direct"}),
        ("bf16", None, {"dense", "direct"}),
        ("int8", None, {"dense", "direct"}),
        ("fp32", False, {"dense"}),
        ("fp32", True, {"direct"}),
        ("int8", True, {"direct"}),
    ],
)
def test_real_layers_run_by_the_faster_kernel(
    weights: Literal["fp32", "bf16", "int8"], portable: bool | None, measured: set[str]
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Conv2d(2, 20, 3, padding=1), IF(), Conv2d(20, 16, 3), IF(), GlobalAvgPool()).eval()
    x = torch.rand(4, 2, 2, 8, 8)
    real, spiking = compile(model, x, weights=weights, portable=portable).layers()[:2]
    assert {way for way in ("event", "dense", "direct") if real[f"{way}_ms"] is not None} == measured
    assert real["way"] == min(measured, key=lambda way: real[f"{way}_ms"])
    assert spiking["event_ms"] is not None
    assert (spiking["direct_ms"] is None) == (portable is not True)
