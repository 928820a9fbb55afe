"""NeuroBench's harness on our networks, beside an audit of the same inputs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spikeloom
from spikeloom.analyse import Audit, audit, calibrated
from spikeloom.data import create_dataset
from spikeloom.errors import UsageError
from spikeloom.layers import AvgPool2d, Conv2d, Flatten, Linear, NormSpike
from spikeloom.neurons import LIF, LeakyIntegrator

pytest.importorskip("neurobench", reason="needs neurobench")
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import Footprint, ParameterCount
from neurobench.metrics.workload import (
    ActivationSparsity,
    ActivationSparsityByLayer,
    ClassificationAccuracy,
    SynapticOperations,
)
from neurobench.processors.postprocessors import ChooseMaxCount

from spikeloom.analyse.neurobench import HarnessModel

METRICS = [
    [Footprint, ParameterCount],
    [ActivationSparsity, ActivationSparsityByLayer, SynapticOperations, ClassificationAccuracy],
]


def harness(net: nn.Module, x: Tensor, y: Tensor, batch: int, encode: Any = None) -> dict[str, Any]:
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    with torch.no_grad():
        return Benchmark(HarnessModel(net, encode), loader, [], [ChooseMaxCount()], METRICS).run(quiet=True)


def spikes(*shape: int) -> Tensor:
    return (torch.rand(*shape) < 0.3).float()


def agrees(found: dict[str, Any], own: Audit, again: float = 1.0) -> None:
    """Whether all figures agree, where the encoder's operations are counted `again` times."""
    first = own.rows[0].effective * (again - 1)
    spiking = own.rows[0].input in ("binary", "silent")
    assert found["Footprint"] == own.footprint
    assert found["ParameterCount"] == own.parameters
    assert found["ActivationSparsity"] == pytest.approx(own.activation_sparsity, rel=1e-12)
    operations = found["SynapticOperations"]
    assert operations["Effective_ACs"] == pytest.approx(own.effective_acs + first * spiking, rel=1e-12)
    assert operations["Effective_MACs"] == pytest.approx(own.effective_macs + first * (not spiking), rel=1e-12)


def convolutions() -> nn.Module:
    net = nn.Sequential(
        *(Conv2d(2, 8, 3, padding=1), LIF()),
        *(Conv2d(8, 12, 3, stride=2, padding=1, groups=2, bias=False), NormSpike(12, LIF)),
        *(Flatten(), Linear(12 * 6 * 6, 20), LIF(), Linear(20, 5), LeakyIntegrator()),
    )
    with torch.no_grad():
        net[2].weight[::2, 1] = 0  # weights that are 0 take no part
        for layer in net:
            if isinstance(layer, Conv2d | Linear):
                layer.weight *= 3
    return net


@pytest.mark.parametrize("batch", [3, 6])
def test_both_count_the_same_of_binary_spikes(batch: int) -> None:
    torch.manual_seed(0)
    net, x, y = convolutions(), spikes(6, 4, 2, 11, 11), torch.zeros(6, dtype=torch.int64)
    found = harness(net, x, y, batch, lambda x: x.transpose(0, 1))
    own = audit(net, [(part.transpose(0, 1), y[:batch]) for part in x.split(batch)])
    assert own.effective_acs > 0
    assert own.effective_macs == 0
    assert 0 < own.activation_sparsity < 1
    agrees(found, own)
    assert sorted(found["ActivationSparsityByLayer"]) == ["1", "3.neuron", "6"]


def test_both_count_the_same_of_a_shipped_network() -> None:
    net = spikeloom.create_model("paralif_shd", weights="fsdd")
    torch.manual_seed(0)
    x, y = spikes(4, 50, 80), torch.zeros(4, dtype=torch.int64)
    agrees(harness(net, x, y, 2, lambda x: x.transpose(0, 1)), audit(net, [(x.transpose(0, 1), y)]))


def test_a_repeated_image_enters_the_first_layer_once_here_and_each_step_there() -> None:
    digits = create_dataset("digits", None, "test", size=28, subset=8)
    net = spikeloom.create_model("colored_mnist_net", weights="mnist")
    x, y = digits.batch(range(8))
    found, own = harness(net, x, y, 4), audit(net, (x, y))
    assert own.rows[0].steps == 1
    agrees(found, own, again=own.steps)
    assert 0 <= found["ClassificationAccuracy"] <= 1


def test_integers_are_macs_there_and_additions_here() -> None:
    digits = create_dataset("digits", None, "test", subset=4)
    net = spikeloom.create_model("report_sew_resnet34", weights="digits")
    x, y = digits.batch(range(4))
    found, own = harness(net, x, y, 4), audit(net, (x, y))
    integers = [row for row in own.rows if row.input == "integer"]
    assert integers
    assert all(row.macs == 0 and row.acs > 0 for row in integers)
    agrees(found, own, again=own.steps)
    assert found["SynapticOperations"]["Effective_MACs"] > own.rows[0].effective * own.steps


def test_pooled_spikes_are_macs_there_and_additions_here() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Conv2d(2, 4, 1), LIF(), AvgPool2d(2), Flatten(), Linear(4 * 4 * 4, 5))
    x, y = 4 * spikes(3, 3, 2, 8, 8), torch.zeros(3, dtype=torch.int64)
    found, own = harness(net, x, y, 3, lambda x: x.transpose(0, 1)), audit(net, [(x.transpose(0, 1), y)])
    last = own.rows[-1]
    assert (last.input, last.macs) == ("scaled", 0)
    assert last.acs > 0
    agrees(found, own)
    macs = found["SynapticOperations"]["Effective_MACs"]
    assert macs == pytest.approx(own.rows[0].effective + last.effective, rel=1e-12)


def test_products_of_attention_are_not_seen_there() -> None:
    torch.manual_seed(0)
    x, y = spikes(1, 2, 2, 32, 32), torch.zeros(1, dtype=torch.int64)
    net = calibrated(spikeloom.create_model("spikingformer_2_256_dvs", T=2), x.transpose(0, 1))
    found, own = harness(net, x, y, 1, lambda x: x.transpose(0, 1)), audit(net, [(x.transpose(0, 1), y)])
    products = [row for row in own.rows if row.kind == "matmul"]
    assert sum(row.effective for row in products) > 0
    assert found["Footprint"] == own.footprint
    assert found["ActivationSparsity"] == pytest.approx(own.activation_sparsity, rel=1e-12)
    seen = sum(row.effective for row in own.rows if row.kind != "matmul")
    counted = found["SynapticOperations"]
    assert counted["Effective_ACs"] + counted["Effective_MACs"] == pytest.approx(seen, rel=1e-12)


def test_without_neurobench_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neurobench.models", None)
    monkeypatch.delitem(sys.modules, "spikeloom.analyse.neurobench")
    with pytest.raises(UsageError, match=r"pip install 'spikeloom\[neurobench\]'"):
        import spikeloom.analyse.neurobench  # noqa: F401
