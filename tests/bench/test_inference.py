"""The benchmark of the engine beside its rivals: each runs the network that it was given. Times are not tested."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.small_networks import Net
from torch import Tensor, nn

from spikeloom.analyse.load import Target
from spikeloom.deploy import compile
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear, NormSpike
from spikeloom.neurons import LIF

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
EAGER = ["engine", "network", "dense", "bf16"]
EXPORTED = ("onnx", "onnx_int8", "openvino", "openvino_bf16", "openvino_int8")
OTHERS = {"spikingjelly", "compiled"}

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rivals() -> ModuleType:
    return load("rivals")


@pytest.fixture
def inference(rivals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "rivals", rivals)  # as the script finds it, in its own folder
    return load("inference")


def net() -> nn.Module:
    """An image for two steps, two convolutions with neurons."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inside in (3, 8):
        layers += [Conv2d(inside, 8, 3, padding=1, bias=False), NormSpike(8, LIF)]
    return Net(*layers, GlobalAvgPool(), Linear(8, 10), T=2).eval()


def test_rivals_run_the_network(rivals: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(
            package, reason="the extra `exchange` is not installed: rivals of the engine are NOT tested"
        )
    for package in ("openvino", "nncf"):
        pytest.importorskip(
            package, reason=f"{package} (extra `bench`) IS MISSING: rivals of the engine are NOT tested"
        )
    model, x = net(), 3 * torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        first = model(x[:1])
    found = rivals.contenders(model, compile(model, x), x, list(x.split(1)), OTHERS)
    told = capfd.readouterr().out
    assert [name for name in EXPORTED if name not in found] == ([] if not told else ["openvino_bf16"])
    assert told in ("", "openvino_bf16 is left out: this processor has no bfloat16 instructions\n")
    for name, on in found.items():
        for inputs, wanted in ((x, expected), (x[:1], first)):
            logits = torch.as_tensor(on(inputs)()).float()
            assert logits.shape == wanted.shape, name
            assert logits.isfinite().all(), name
            if name in (*rivals.FLOAT32, "engine", "network"):
                torch.testing.assert_close(
                    logits, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )
            else:
                # Rounded to 8 bits, some neurons fire at another step.
                assert (logits - wanted).abs().mean() < 0.5 * wanted.abs().mean(), name


def test_a_rival_that_cannot_is_left_out_with_a_line(
    rivals: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> bytes:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(rivals, "onnx_file", refused)
    model, x = net(), torch.rand(2, 3, 8, 8)
    found = rivals.contenders(model, compile(model, x), x, [], OTHERS)
    assert list(found) == [*EAGER, "engine_int8"]
    assert capsys.readouterr().out.splitlines() == [f"{name} is left out: no such operator" for name in EXPORTED]


def test_columns_of_int8(inference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "engine": 2.0,
        "dense": 9.0,
        "openvino": 8.0,
        "bf16": 7.0,
        "openvino_bf16": 6.0,
        "onnx_int8": 5.0,
        "openvino_int8": 3.0,
        "sparse": 1.0,
    }
    monkeypatch.setattr(inference, "medians", lambda runs, *_, **__: {name: times[name] for name in runs})
    monkeypatch.setattr(inference, "event_layers", lambda *_: (1.0, 0.25))
    monkeypatch.setattr(inference, "at_rate", lambda *_: lambda x: x)
    model, x = net(), torch.rand(4, 3, 8, 8)
    target = made(model, x, torch.zeros(4, dtype=torch.int64))
    one, many = inference.times(target, compile(model, x), {name: shape_of for name in times if name != "sparse"}, 5)
    assert (one["batch"], many["batch"]) == (1, 64)
    assert (one["best float32"], one["engine times faster"]) == ("openvino", 4)
    assert (one["best int8"], one["times faster than int8"]) == ("openvino_int8", 1.5)
    assert one["than bf16"] == 3
    earlier = {
        "kernels": "here",
        "run": "earlier",
        "batch": 1,
        "engine times faster": 1,
        "at 4% active times faster": 1,
    }
    *_, mean, without = inference.means(
        [earlier, *({"kernels": "here", **one, "run": "a"}, {**many, "kernels": "here"})]
    )
    assert (mean["batch"], mean["engine times faster"], mean["times faster than int8"]) == (1, 2, 1.5)
    assert without["batch"] == 64


def test_accuracies_are_those_of_whole_batches(inference: ModuleType) -> None:
    x = torch.eye(5)
    y = torch.tensor([0, 1, 0, 0, 4])  # of the first four, which are two batches, half are right
    row = inference.accuracies(made(nn.Identity(), x, y), {"same": lambda x: lambda: x, "as numpy": lambda x: x.numpy})
    assert row == {"run": "a run", "images": 4, "same %": 50, "as numpy %": 50}


def test_quantisers_see_training_images(inference: ModuleType) -> None:
    from spikeloom.data import create_dataset

    seen = inference.calibration("weights:report_sew_resnet34/digits", {})
    assert len(seen) == inference.CALIBRATION
    dataset = create_dataset("digits", None, "train")
    torch.testing.assert_close(seen[0], dataset.encode(dataset.batch([0])[0]))
    assert len({x.numpy().tobytes() for x in seen}) > 250


def shape_of(x: Tensor) -> object:
    return lambda: x.shape


def made(model: nn.Module, x: Tensor, y: Tensor) -> Target:
    def batches():
        return zip(x.split(2), y.split(2), strict=True)

    return Target("a run", True, "inputs", (), model, batches, len(x), False, tuple(x.shape[1:]))
