"""The event engine: the same numbers as the network itself, whatever the shape, and no harm from bad files."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import lively, shortened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spikeloom import Stream, create_model
from spikeloom.deploy import Engine, compile, exact, fold, load
from spikeloom.deploy.engine import engine as engine_module
from spikeloom.deploy.engine import executor, pack
from spikeloom.deploy.engine.ir import Conv, Neuron, PadChannels, Plan, PlanError, Pool, Value
from spikeloom.errors import UsageError
from spikeloom.layers import COMBINE, Conv2d, GlobalAvgPool, Linear, MaxPool2d, NormSpike, SEWBlock
from spikeloom.neurons import IF, KLIF, LIF, MLF, PLIF
from spikeloom.ops import _dispatch
from spikeloom.ops.scan.reference import scan_reference
from spikeloom.surrogates import ATan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "report_vgg16": ({"T": 2}, (3, 32, 32)),
    "report_vanilla_resnet34": ({"T": 2}, (3, 32, 32)),
    "report_sew_resnet34": ({"T": 3}, (3, 20, 20)),
    "report_ms_resnet34": ({"T": 3}, (3, 20, 20)),
    "ghostnet_snn": ({"T": 2}, (3, 32, 32)),
    "ghostnet_dfc": ({"T": 2}, (3, 32, 32)),
    "ghostnet_channel_mlp": ({"T": 2}, (3, 32, 32)),
    "sew_7b": ({"T": 2, "combine": "iand"}, (2, 128, 128)),
    "ds_resnet20": ({"T": 2}, (3, 16, 16)),
    "ms_resnet20": ({"T": 2}, (3, 17, 17)),
    "tdbn_resnet19": ({"T": 1}, (3, 16, 16)),
    "colored_mnist_net": ({"T": 2}, (3, 28, 28)),
    "spikformer_4_256": ({"T": 2, "channels": 64, "heads": 2, "depth": 2}, (3, 32, 32)),
    "spikingformer_4_256": ({"T": 2, "channels": 64, "heads": 2, "depth": 2}, (3, 32, 32)),
}


@torch.no_grad()
def on_a_grid(model: nn.Module, x: Tensor) -> nn.Module:
    """The folded model with weights in multiples of 1/64: its sums are exact, in whatever order they are taken."""
    folded = fold(lively(model, x))
    for parameter in folded.parameters():
        if parameter.dim():
            parameter.copy_((parameter * 64).round() / 64)
    for module in folded.modules():
        if isinstance(module, Conv2d):
            module.dense = True  # minimal filtering multiplies by fractions that are not on the grid
    return folded


# What repeats a block stands here for the whole network, and one of three GhostNets, which share their blocks, for all:
# `torch.export` takes its time for each layer. The whole ones are slow tests.
SHORTENED = {"report_vanilla_resnet34": 2, "report_sew_resnet34": 2, "report_ms_resnet34": 2}
SHORTENED |= {"ghostnet_dfc": 1, "ds_resnet20": 1}
WHOLE = (*SHORTENED, "ghostnet_snn", "ghostnet_channel_mlp")
CASES = [
    *(pytest.param(name, False, id=name) for name in NETWORKS if name in SHORTENED or name not in WHOLE),
    *(pytest.param(name, True, id=f"{name}, whole", marks=pytest.mark.slow) for name in WHOLE),
]


@pytest.mark.parametrize(("name", "whole"), CASES)
def test_a_network_is_the_same_to_the_bit(name: str, whole: bool) -> None:
    options, shape = NETWORKS[name]
    x = torch.rand(3, *shape)
    model = create_model(name, **options)
    if name in SHORTENED and not whole:
        model = shortened(model, SHORTENED[name])
    model = lively(model, x)
    twin = exact(model.to(memory_format=torch.channels_last), x)
    changed = sum(int((a != b).sum()) for a, b in zip(fold(model).parameters(), twin.parameters(), strict=True))
    assert changed > 10_000
    engine = compile(twin, x, tune=False)
    with torch.no_grad():
        expected, stream = twin(x), Stream(twin)
        steps = [stream(x.unsqueeze(0)) for _ in range(2)]
    assert expected.abs().max() > 0, "a silent network shows nothing"
    assert torch.equal(engine(x), expected)
    assert torch.equal(engine(x[:1]), engine(x)[:, :1]), "an image does not depend on its batch"
    stepping = engine.stream()
    for step in steps:
        assert torch.equal(stepping(x), step)
    ways = [step.way for step in engine.steps if isinstance(step, Conv)]
    assert ways.count("event") > len(ways) / 2


@torch.no_grad()
def test_sums_of_exact_weights_do_not_depend_on_their_order() -> None:
    model = nn.Sequential(Linear(999, 33), LIF(), Linear(33, 999), LIF(), Linear(999, 7))
    twin = exact(model, torch.rand(1, 4, 999))
    layers = [pair for pair in zip(model, twin, strict=True) if isinstance(pair[0], Linear)]
    assert torch.equal(layers[0][0].weight, layers[0][1].weight), "it reads real values"
    spikes = (torch.rand(1, 50, 999) < 0.5).float()
    for before, after in layers[1:]:
        x, most = spikes[..., : before.in_features], before.weight.abs().sum(1, keepdim=True) + before.bias.abs().max()
        whole = x.double() @ after.weight.double().T + after.bias.double()
        in_order = [
            torch.cumsum(x[:, :, None, order] * after.weight[:, order], -1)[..., -1] + after.bias
            for order in (torch.arange(x.shape[-1]), torch.randperm(x.shape[-1]))
        ]
        for sums in (*in_order, after(x)):
            assert torch.equal(sums.double(), whole)
        assert ((before.weight - after.weight).abs() <= most * 2.0**-24).all()
        rounded = before(x).double() != x.double() @ before.weight.double().T + before.bias
        assert rounded.float().mean() > 0.5, "any weights would do"


def test_tuning_changes_nothing_but_the_way() -> None:
    x = torch.rand(4, 3, 16, 16)
    model = on_a_grid(create_model("ms_resnet20", T=2), x)
    engine = compile(model, x)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)
    layers = engine.layers()
    convs = [layer for layer in layers if layer["step"].startswith("conv")]
    assert convs[0]["way"] != "event", "an image is real-valued"
    assert convs[0]["event_ms"] is None
    can = [layer for layer in convs if layer["event_ms"] is not None]
    assert len(can) == 18, "all but the stem, two shortcuts on the membrane, and the head"
    for layer in can:
        assert layer["way"] == ("event" if layer["event_ms"] < layer["dense_ms"] else "dense")
        assert 0 <= layer["active"] < 1
    assert engine.plan().count("\n") == len(layers)


@pytest.mark.parametrize("far", [0, pack.FAR])
@pytest.mark.parametrize("tune", [True, False])
@torch.no_grad()
def test_rounded_weights_are_those_of_the_rounded_network(
    tune: bool, far: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "FAR", far)
    x = torch.randint(0, 9, (4, 3, 20, 20)) / 8
    model = on_a_grid(shortened(create_model("report_sew_resnet34", T=2)), x)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for weight in weights:
        weight.add_(torch.randint(-1, 2, weight.shape) / 2**16)
    engine = compile(model, x, tune, weights="bf16")
    different = 0
    for weight in weights:
        rounded = weight.bfloat16().float()
        different += int((rounded != weight).sum())
        weight.copy_(rounded)
    assert different > 10_000, "weights that are bfloat16 already show nothing"
    torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_sequence() -> None:
    x = torch.randint(0, 3, (5, 2, 2, 16, 16)).float()
    model = on_a_grid(create_model("ds_resnet14_dvs", T=5), x)
    engine = compile(model, x, tune=False)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(engine(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(engine(x[:3]), expected[:3], rtol=1e-6, atol=1e-6)
    stream = engine.stream()
    chunks = torch.cat([stream(part) for part in x.split((1, 3, 1))])
    torch.testing.assert_close(chunks, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="carries 2 images, got 1"):
        stream(x[:, :1])


class _Small(nn.Module):
    """A stem, and behind it a block and a head for each combine function, whose logits are summed."""

    def __init__(self, neuron: Any, *combines: str):
        super().__init__()
        self.stem, self.first = Conv2d(2, 12, 3, padding=1), NormSpike(12, neuron)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                SEWBlock(Conv2d(12, 12, 3, padding=1), NormSpike(12, neuron), nn.Identity(), combine),
                MaxPool2d(2),
                GlobalAvgPool(),
                Linear(12, 5),
            )
            for combine in combines
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.first(self.stem(x))
        logits = self.blocks[0](s)
        for block in self.blocks[1:]:
            logits = logits + block(s)
        return logits


NEURONS = {
    "IF": IF,
    "LIF": LIF,
    "PLIF": PLIF,
    "MLF": lambda: MLF(tau=2.0, v_threshold=(0.25, 0.5, 1.0)),
    "soft reset": lambda: LIF(v_reset=None),
    "reset below": lambda: LIF(v_reset=-0.5),
    "strict": lambda: IF(strict=True),
    "no input decay": lambda: LIF(decay_input=False, v_threshold=0.5),
}


@pytest.mark.parametrize("neuron", NEURONS)
def test_neurons_and_shortcuts(neuron: str) -> None:
    combines = ("add", "and") if neuron == "MLF" else COMBINE  # the others are of 0 and 1
    x = torch.randint(-8, 9, (4, 2, 2, 9, 7)) / 4
    model = on_a_grid(_Small(NEURONS[neuron], *combines), x)
    with torch.no_grad():
        expected = model(x)
        first = model.first(model.stem(x))
        for block in model.blocks:
            assert block(first).std() > 0, "a silent block shows nothing"  # pyright: ignore
    torch.testing.assert_close(compile(model, x, tune=False)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def of_images() -> tuple[Engine, Tensor]:
    """The engine of a small network, and 19 images."""
    torch.manual_seed(0)
    x = torch.rand(19, 3, 17, 17)
    return compile(on_a_grid(create_model("ms_resnet14", T=2), x), x, tune=False), x


def test_one_engine_in_many_threads(of_images: tuple[Engine, Tensor]) -> None:
    engine, x = of_images[0], of_images[1][:16]
    expected = [engine(part) for part in x.split(4)]
    found: list[list[Tensor]] = [[] for _ in range(4)]

    def work(results: list[Tensor], part: Tensor) -> None:
        results.extend(engine(part) for _ in range(5))

    threads = [threading.Thread(target=work, args=args) for args in zip(found, x.split(4), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[i]) for i, results in enumerate(found) for y in results)
    assert all(len(results) == 5 for results in found)


@pytest.mark.parametrize("large", [False, True])
def test_layers_of_pytorch_run_on_one_thread_unless_they_are_large(
    large: bool, of_images: tuple[Engine, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP's threads would stay on the cores of the engine's; what the caller set is there again after the run."""
    engine, x = of_images
    expected = engine(x[:2])
    conv2d, found = executor.F.conv2d, list[int]()

    def watched(*args: Any) -> Tensor:
        found.append(torch.get_num_threads())
        return conv2d(*args)

    monkeypatch.setattr(executor.F, "conv2d", watched)
    monkeypatch.setattr(executor, "LARGE", 0 if large else 10**12)
    try:
        torch.set_num_threads(2)
        assert torch.equal(copy.copy(engine)(x[:2]), expected)
        assert set(found) == {2 if large else 1}
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(executor.F, "conv2d", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine(x[:3])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_many_images_go_in_even_parts_of_the_right_size(
    of_images: tuple[Engine, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "FEWEST", 2)
    monkeypatch.setattr(engine_module, "MOST", 8)
    engine, x = of_images
    expected = torch.cat([engine(part) for part in x.split(1)], 1)
    sizes: list[int] = []
    run = executor.Executor.__call__

    def counted(self: executor.Executor, x: Tensor, states: executor.States | None = None) -> Tensor:
        sizes.append(x.shape[1])
        return run(self, x, states)

    monkeypatch.setattr(executor.Executor, "__call__", counted)
    assert torch.equal(engine(x), expected)
    assert sizes == [7, 6, 6]
    sizes.clear()
    largest = max(2 * value.size * (1 if value.spikes else 4) for value in engine.values[1:])
    monkeypatch.setattr(engine_module, "MAP_BYTES", 3 * largest)
    assert torch.equal(engine(x), expected)
    assert sizes == [3, 3, 3, 3, 3, 2, 2]


# --- kernels ----------------------------------------------------------------------------------------------------------

SHAPES = [
    # T, N, H, W, C, C', kernel, stride, padding, depthwise
    (1, 1, 1, 1, 1, 1, (1, 1), 1, (0, 0), False),
    (3, 2, 5, 7, 3, 17, (3, 3), 1, (1, 1), False),
    (2, 1, 6, 5, 64, 33, (3, 3), 2, (1, 1), False),
    (4, 3, 4, 4, 65, 16, (3, 3), 1, (0, 0), False),
    (2, 2, 9, 9, 20, 50, (5, 5), 1, (2, 2), False),
    (2, 1, 8, 8, 16, 16, (7, 7), 2, (3, 3), False),
    (1, 5, 1, 1, 130, 70, (1, 1), 1, (0, 0), False),
    (2, 2, 1, 11, 12, 40, (1, 3), 1, (0, 1), False),
    (2, 2, 6, 6, 8, 5, (2, 2), 2, (0, 0), False),
    (2, 2, 6, 6, 8, 130, (2, 2), 1, (1, 1), False),
    (3, 2, 7, 5, 19, 19, (3, 3), 1, (1, 1), True),
    (2, 1, 9, 9, 36, 36, (5, 5), 2, (2, 2), True),
    (6, 9, 16, 16, 32, 32, (3, 3), 1, (1, 1), False),
    (2, 3, 3, 3, 200, 128, (3, 3), 1, (1, 1), False),
    # By lists of single places: one part of the channels, and several; a row and a column of outputs that see nothing.
    (3, 2, 4, 5, 257, 33, (3, 3), 1, (1, 1), False),
    (2, 5, 7, 6, 300, 70, (3, 3), 2, (1, 1), False),
    (2, 2, 1, 9, 256, 5, (1, 4), 3, (0, 2), False),
    (3, 1, 5, 5, 600, 40, (1, 1), 2, (1, 1), False),
    (5, 40, 3, 3, 129, 17, (1, 1), 1, (0, 0), False),
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def halves_for_small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "FAR", 0)


@pytest.mark.parametrize("level", [] if _dispatch.native is None else _dispatch.native.levels())
@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_convolution_with_all_that_may_follow(native: Any, shape: Any, most: int, level: str) -> None:
    T, N, H, W, C, out, kernel, stride, padding, depthwise = shape
    native.set_level(level)
    groups = C if depthwise else 1
    spikes = (torch.rand(T, N, C, H, W) < 0.3) * torch.randint(1, most + 1, (T, N, C, H, W))
    weight = torch.randint(-8, 9, (out, C // groups, *kernel)) / 16
    bias = torch.randint(-8, 9, (out,)) / 16
    sums = F.conv2d(spikes.flatten(0, 1).float(), weight, bias, stride, padding, 1, groups).unflatten(0, (T, N))
    identity = torch.eye(out)[:, :, None, None]
    thresholds = (0.5, 1.0, 1.5)
    neuron = Neuron(decay=0.5, gain=0.5, threshold=thresholds, v_reset=0.0, strict_firing=False)
    conv: dict[str, Any] = {
        "x": 1,
        "weight": "w",
        "bias": "b",
        "stride": stride,
        "padding": padding,
        "groups": groups,
        "way": "event",
    }
    plan = Plan(
        input=Value(height=H, width=W, channels=C),
        T=T,
        steps=(
            # Spikes from the input: IF without memory, threshold k for the k-th level.
            _fire(
                0,
                Neuron(
                    decay=0.0,
                    gain=1.0,
                    threshold=tuple(map(float, range(1, most + 1))),
                    v_reset=None,
                    strict_firing=False,
                ),
                1,
            ),
            Conv(layer="sums", out=(2,), **conv),
            Conv(layer="fires", out=(3, 4), residual=2, neuron=neuron, **conv),
            Conv(layer="again", out=(5,), x=4, weight="i", way="event", residual=4, keep_sum=False, neuron=neuron),
            _mean(5, 6),
        ),
    )
    # The weights are multiples of 1/16: as bfloat16 they are the same.
    tensors = {"w": weight, "b": bias, "i": identity}
    engines = [Engine(plan, tensors | {name: tensors[name].to(dtype) for name in "wi"}) for dtype in DTYPES]
    fired, _ = scan_reference(2 * sums, None, 0.5, 0.5, thresholds, 0.0, ATan(), True)
    again, _ = scan_reference(2 * fired, None, 0.5, 0.5, thresholds, 0.0, ATan(), True)
    for engine in engines:
        for _ in range(2):  # the second time in memory that has been written
            torch.testing.assert_close(engine(spikes.float()), again.flatten(3).mean(3), rtol=1e-6, atol=1e-6)


def _fire(x: int, neuron: Neuron, out: int) -> Any:
    from spikeloom.deploy.engine.ir import Fire

    return Fire(layer="input", out=(out,), x=x, keep_sum=False, neuron=neuron)


def _mean(x: int, out: int) -> Any:
    from spikeloom.deploy.engine.ir import Mean

    return Mean(layer="mean", out=(out,), x=x)


def test_a_sum_takes_the_place_of_a_shortcut_that_nobody_reads_again() -> None:
    conv: dict[str, Any] = {"weight": "w", "padding": (0, 0), "way": "event"}
    neuron = Neuron(decay=0.0, gain=1.0, threshold=(1.0,), v_reset=None, strict_firing=False)
    steps = (
        _fire(0, neuron, 1),
        Conv(layer="first", out=(2,), x=1, **conv),
        Conv(layer="over the first", out=(3,), x=1, residual=2, **conv),
        Conv(layer="over the second", out=(4, 5), x=1, residual=3, neuron=neuron, **conv),
        Conv(layer="read again", out=(6,), x=5, residual=4, **conv),
        Conv(layer="over spikes", out=(7,), x=5, residual=1, **conv),
        PadChannels(layer="with zeros around", out=(8,), x=4, before=1, behind=1),
        Conv(layer="over zeros", out=(9,), x=5, residual=8, weight="wide", padding=(0, 0), way="event"),
        _mean(9, 10),
    )
    plan = Plan(input=Value(height=2, width=3, channels=4), T=2, steps=steps)
    weights = {"w": torch.randn(4, 4, 1, 1), "wide": torch.randn(6, 4, 1, 1)}
    values = plan.values(weights)
    assert plan.in_place(values) == [(3, 2), (4, 3)]
    engine = Engine(plan, weights)
    x = torch.rand(2, 3, 4, 2, 3) * 2
    assert torch.equal(engine(x), engine(x))
    a = (x >= 1).float()
    w, wide = weights["w"][..., 0, 0], weights["wide"][..., 0, 0]
    once = torch.einsum("oc,tnchw->tnohw", w, a)
    third = 3 * once
    expected = torch.einsum("oc,tnchw->tnohw", wide, (third >= 1).float()) + F.pad(third, (0, 0, 0, 0, 1, 1))
    torch.testing.assert_close(engine(x), expected.flatten(3).mean(3))


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["int4", "fp16", None])
def test_unknown_weights(weights: Any) -> None:
    with pytest.raises(UsageError, match="weights must be one of fp32, bf16, int8, got"):
        compile(create_model("report_sew_resnet34", weights="digits"), torch.rand(1, 1, 8, 8), weights=weights)


def test_a_layer_that_it_does_not_know() -> None:
    x = torch.rand(2, 2, 2, 9, 7)
    with pytest.raises(UsageError, match=r"^first\.neuron: the event engine has no step for spikeloom::scan"):
        compile(_Small(KLIF, "add"), x)


def test_an_example_of_one_image() -> None:
    x = torch.rand(3, 3, 16, 16)
    model = on_a_grid(create_model("ms_resnet14", T=2), x)
    engine = compile(model, x[:1], tune=False)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_network_that_gives_something_else() -> None:
    with pytest.raises(UsageError, match=r"example \(1, 3, 16, 16\): the network must take"):
        compile(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 16, 16))


def test_an_input_of_another_shape(of_images: tuple[Engine, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"takes \[N, 3, 17, 17\], got \(2, 3, 17, 18\)"):
        of_images[0](torch.rand(2, 3, 17, 18))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    options = {"T": 2, "channels": 16, "heads": 2, "depth": 1}
    engine = compile(on_a_grid(create_model("spikingformer_4_256", **options), x), x, tune=False)
    path = tmp_path_factory.mktemp("engine") / "net.safetensors"
    engine.save(path)
    return path, engine, x


def test_a_file_gives_the_same_engine(saved: tuple[Path, Engine, Tensor], tmp_path: Path) -> None:
    path, engine, x = saved
    assert torch.equal(load(path)(x), engine(x))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    model = create_model("spikingformer_4_256", T=2, channels=16, heads=2, depth=1)
    half = compile(model, x, tune=False, weights="bf16")
    half.save(tmp_path / "half")
    assert torch.equal(load(tmp_path / "half")(x), half(x))
    assert (tmp_path / "half").stat().st_size < 0.7 * path.stat().st_size, "16 bits a weight"


def test_weights_of_another_type(saved: tuple[Path, Engine, Tensor]) -> None:
    _, engine, _ = saved
    plan, tensors = engine._plan, engine._tensors
    conv = next(step for step in plan.steps if isinstance(step, Conv) and step.bias is not None)
    for name, message in ((conv.weight, "weight is not float32 or bfloat16"), (conv.bias, "bias is not float32")):
        assert name is not None
        with pytest.raises(PlanError, match=message):
            Engine(plan, tensors | {name: tensors[name].half()})


def test_files_that_are_no_engines(saved: tuple[Path, Engine, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none")
    other = tmp_path / "other"
    save_file({"w": torch.zeros(1)}, other)
    with pytest.raises(UsageError, match="not an event engine"):
        load(other)
    other.write_bytes(b"\x80\x04 pickled")
    with pytest.raises(UsageError, match="not a safetensors file"):
        load(other)


Change = tuple[tuple[Any, ...], Any, str]
CHANGES: list[Change] = [
    (("steps", 0, "x"), 99, "reads what no step before it makes"),
    (("steps", 0, "x"), -1, r"steps.0.conv.x: Input should be greater"),
    (("steps", 1, "out"), [0], "its results must be values 2 and on"),
    (("steps", 0, "weight"), "nothing", "the weight 'nothing' is missing"),
    (("steps", 0, "stride"), 0, "steps.0.conv.stride"),
    (("steps", 0, "stride"), 1 << 40, "steps.0.conv.stride"),
    (("steps", 0, "padding"), [1 << 20, 0], "steps.0.conv.padding"),
    (("steps", 0, "groups"), 2, "channels do not fit"),
    (("steps", 0, "op"), "exec", "does not match any of the expected tags"),
    (("steps", 0, "code"), "import os", "Extra inputs are not permitted"),
    (("steps", 1, "neuron", "threshold"), [0.1] * 17, "threshold"),
    (("steps", 1, "neuron", "decay"), float("nan"), "decay"),
    (("input", "channels"), 1 << 30, "input.channels"),
    (("input", "most"), 300, "input.most"),
    (("T",), 0, "T: "),
    (("steps",), [], "steps: "),
]


@pytest.mark.parametrize(("place", "value", "message"), CHANGES, ids=[str(c[0]) for c in CHANGES])
def test_a_hostile_plan(
    saved: tuple[Path, Engine, Tensor], tmp_path: Path, place: Any, value: Any, message: str
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(_with_plan(saved[0], place, value))
    with pytest.raises(UsageError, match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


def _with_plan(path: Path, place: tuple[Any, ...], value: Any) -> bytes:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plan = json.loads(metadata["plan"])
    inner = plan
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return save(tensors, {**metadata, "plan": json.dumps(plan)})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file(saved: tuple[Path, Engine, Tensor], tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed anywhere, or the end missing: an error, or an engine that still runs within its buffers."""
    path, _, x = saved
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, max(0, min(header, len(content)) - 1)))
        if content:
            content[place] = data.draw(st.integers(0, 255))
    bad = tmp_path / "damaged"
    bad.write_bytes(bytes(content))
    try:
        engine = load(bad)
    except UsageError:
        return
    with contextlib.suppress(ValueError):  # an input of another shape
        engine(x)


def test_a_window_larger_than_its_input() -> None:
    value = Value(height=4, width=4, channels=3)
    plan = Plan(input=value, T=1, steps=(Pool(layer="pool", out=(1,), x=0, op="max_pool", kernel=5, stride=1),))
    with pytest.raises(PlanError, match="pool: the window is larger"):
        plan.values({})


def test_maps_beyond_any_memory() -> None:
    value = Value(height=1 << 12, width=1 << 12, channels=16)
    plan = Plan(input=value, T=64, steps=(Pool(layer="pool", out=(1,), x=0, op="max_pool", kernel=2, stride=2),))
    with pytest.raises(PlanError, match="pool: more than 4294967296 elements for one image"):
        plan.values({})


def test_what_is_shown_of_an_engine_is_short(of_images: tuple[Engine, Tensor]) -> None:
    engine, x = of_images
    shown = "Engine(3x17x17 -> 10, 2 steps of an image, 17 layers, 12 of them by events)"
    assert repr(engine) == shown
    assert repr(engine.with_ways("dense")) == shown.replace("12 of", "0 of")
    stream = engine.stream()
    assert repr(stream) == f"EngineStream({shown}, at rest)"
    stream(x[:2])
    assert repr(stream) == f"EngineStream({shown}, neurons remember)"
    of_sequences = compile(_Small(LIF, "add"), torch.rand(2, 2, 2, 9, 7), tune=False)
    assert "2x9x7 -> 5, sequences, 6 layers" in repr(of_sequences)
