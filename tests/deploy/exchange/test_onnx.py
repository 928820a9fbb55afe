"""ONNX files: ONNX Runtime gives the network's logits, for batches of any size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_networks import SMALL, Net
from torch import Tensor, nn

from spikeloom.deploy import to_onnx
from spikeloom.deploy.exchange import graph as traced
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear, NormSpike, SEWBlock, basic_branch
from spikeloom.models import create_model
from spikeloom.neurons import (
    GLIF,
    IF,
    IPSU,
    KLIF,
    LIF,
    MLF,
    NEURONS,
    PLIF,
    PSN,
    PSU,
    RPSU,
    SPSN,
    DelayedResetLIF,
    LeakyIntegrator,
    MaskedPSN,
    Neuron,
    ParaLIF,
    RecurrentLIF,
    RecurrentParaLIF,
    SlidingPSN,
    SynapticLIF,
)

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="the extra `exchange` is not installed: ONNX is not tested")
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def check(model: nn.Module, example: Tensor, path: Path, axis: int = 0, deep: bool = False) -> Any:
    """Writes the file, compares it on a batch of one and on one of another size than the example's, and reads it.

    In `deep` networks a spike that rounding flips moves an image's logits: half of the images must have none.
    """
    modes = [module.training for module in model.modules()]
    written = to_onnx(model, example, path)
    assert [module.training for module in model.modules()] == modes
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", written.opset)]
    assert written.nodes == len(graph.graph.node)
    assert written.bytes == path.stat().st_size
    runner = session(path)
    for batch in (1, 16 if deep else 3):
        x = 3 * torch.rand([batch if a == axis else n for a, n in enumerate(example.shape)])
        with torch.no_grad():
            expected = model.eval()(x)
        (got,) = runner.run(["logits"], {"input": x.numpy()})
        assert expected.std() > 0
        assert got.shape == expected.shape
        found = torch.from_numpy(got)
        if deep:
            same = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).all(2).all(0)
            assert same.sum() >= batch // 2
            assert (found - expected).abs().max() < expected.std()
            found, expected = found[:, same], expected[:, same]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return graph


def net(*layers: nn.Module, dims: int = 2) -> Net:
    return Net(*layers, dims=dims, T=3)


def test_a_static_image_passes_the_stem_once(tmp_path: Path) -> None:
    block = SEWBlock(basic_branch(4, 4, 1, LIF), NormSpike(4, LIF), nn.Identity())
    model = net(Conv2d(2, 4, 3, padding=1), NormSpike(4, LIF), block, GlobalAvgPool(), Linear(4, 5), dims=4).train()
    graph = check(model, torch.rand(2, 2, 8, 8), tmp_path / "net.onnx").graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    assert shapes["input"] == ["batch", 2, 8, 8]
    assert shapes["logits"] == [3, "batch", 5]
    # The first one sees as many images as there are, the others as many for each step.
    assert shapes[convolutions[0].input[0]] == ["batch", 2, 8, 8]
    assert shapes[convolutions[1].input[0]] == ["3*batch", 4, 8, 8]


def test_layers_share_a_graph_but_not_their_values(tmp_path: Path) -> None:
    """Neurons of one kind with other parameters, constants and shapes; a sequence, not an image."""
    layers = [
        Linear(6, 8),
        PLIF(tau=1.5),
        Linear(8, 8),
        PLIF(tau=4.0),
        Linear(8, 9),
        SynapticLIF(0.002, 0.003, learn_tau=True),
        Linear(9, 5),
        SynapticLIF(0.02, 0.001, learn_tau=True),
        Linear(5, 5),
        SynapticLIF(0.002, 0.003),
        Linear(5, 5),
        SynapticLIF(0.02, 0.001),
        Linear(5, 4),
    ]
    for layer in layers[::2]:
        nn.init.normal_(layer.weight, 0.3)  # pyright: ignore
    graph = check(nn.Sequential(*layers), torch.rand(2, 2, 6), tmp_path / "net.onnx", axis=1).graph
    own = {tensor.name for tensor in graph.initializer}
    assert {"1/w", "3/w", "5/alpha", "7/alpha", "5/beta", "7/beta"} <= own


@pytest.mark.slow
def test_one_step(tmp_path: Path) -> None:
    check(nn.Sequential(Linear(6, 8), LIF(), Linear(8, 3)), torch.rand(1, 2, 6), tmp_path / "net.onnx", axis=1)


MADE: dict[str, Callable[[], Neuron]] = {
    "IF": IF,
    "LIF": functools.partial(LIF, v_reset=None, strict=True),
    "PLIF": PLIF,
    "MLF": MLF,
    "KLIF": KLIF,
    "PSN": lambda: PSN(3),
    "MaskedPSN": lambda: MaskedPSN(3, 2),
    "SlidingPSN": lambda: SlidingPSN(2),
    "PSU": PSU,
    "IPSU": lambda: IPSU(3),
    "RPSU": lambda: RPSU(3),
    "GLIF": lambda: GLIF(6, 3),
    "ParaLIF": functools.partial(ParaLIF, firing="td"),
    "SynapticLIF": functools.partial(SynapticLIF, v_threshold=0.05),
    "RecurrentLIF": lambda: RecurrentLIF(6),
    "RecurrentParaLIF": lambda: RecurrentParaLIF(6, firing="t"),
    "LeakyIntegrator": LeakyIntegrator,
    "DelayedResetLIF": functools.partial(DelayedResetLIF, 0.8, 0.5),
}


def test_every_neuron_is_tried() -> None:
    assert {*MADE, "SPSN"} == set(NEURONS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "PSN" else [pytest.mark.slow]) for n in MADE])
def test_neurons(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    check(net(Linear(4, 6), MADE[name](), Linear(6, 3)), torch.rand(2, 4), tmp_path / "net.onnx")


REGISTERED: dict[str, dict[str, Any]] = {
    "report_vgg16": {"T": 2},
    "report_sew_resnet34": {"T": 2},
    "report_ms_resnet34": {"T": 2},
    "ghostnet_snn": {"T": 2},
    "sew_7b": {"T": 2},
    "ds_resnet20": {"T": 2},
    "spikingformer_4_256": {"T": 2},
    "spikformer_v2_2_64": SMALL["spikformer_v2_2_64"],
    "syna_resnet18": {"T": 2},
    "psn_cifar_net": {"channels": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_networks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = create_model(name, **REGISTERED[name]).train()
    x = torch.rand(4, *((2, 128, 128) if name == "sew_7b" else (3, 32, 32)))
    with torch.no_grad():  # statistics with which neurons fire
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 1.5, 3.0)
                nn.init.uniform_(module.bias, 0.0, 1.0)
                module.momentum = 0.5
        model(x)
    check(model, x[:2], tmp_path / "net.onnx", deep=name == "ds_resnet20")


STOCHASTIC: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "SPSN": (SPSN, r"layer layers.1 \(SPSN\) draws random numbers"),
    "gs": (lambda: RecurrentParaLIF(6, "gs"), r"layer layers.1 \(RecurrentParaLIF\) draws random numbers"),
}


@pytest.mark.parametrize("name", ["SPSN", pytest.param("gs", marks=pytest.mark.slow)])
def test_random_numbers_are_refused(name: str, tmp_path: Path) -> None:
    make, message = STOCHASTIC[name]
    with pytest.raises(UsageError, match=message):
        to_onnx(net(Linear(4, 6), make()), torch.rand(2, 4), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class OfTwo(Neuron):
    def run(self, x: Tensor, state: Any, keep: bool) -> tuple[Tensor, None]:
        return x.reshape(3, 2, 6).cumsum(0), None


def test_other_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(UsageError, match=r"layer layers.1 \(Noise\) draws random numbers"):
        to_onnx(net(Linear(4, 6), Noise()), torch.rand(2, 4), path)
    with pytest.raises(UsageError, match=r"layer layers.1 \(OfTwo\) takes a batch of one size only"):
        to_onnx(net(Linear(4, 6), OfTwo()), torch.rand(2, 4), path)
    with pytest.raises(UsageError, match=r"Net cannot be traced on an input \(2, 5\): .*5"):
        to_onnx(net(Linear(4, 6)), torch.rand(2, 5), path)
    with pytest.raises(UsageError, match=r"cannot write .*nowhere/net.onnx"):
        to_onnx(net(Linear(4, 6)), torch.rand(2, 4), tmp_path / "nowhere" / "net.onnx")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(traced.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"'onnx' is not installed: pip install 'spikeloom\[exchange\]'"):
        to_onnx(net(Linear(4, 6)), torch.rand(2, 4), path)
    assert list(tmp_path.iterdir()) == []
