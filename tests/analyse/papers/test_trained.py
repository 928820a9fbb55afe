"""Rates of blocks and of attention, and sizes of attention's products, of trained networks."""

from __future__ import annotations

import pytest
import torch

from spikeloom.analyse.papers.trained import product_sizes, rates_of_attention, sizes_of_attention, trained_rates
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.neurons import PSN

SEW = "weights:report_sew_resnet34/digits"
DIGITS = {"name": "digits", "size": 32}


def test_rates_of_a_trained_network() -> None:
    found = trained_rates([SEW], images=4)
    [(title, rows)] = found.tables.items()
    assert title == "rates of quickstart/digits (full)"
    assert len(rows) == 15
    largest = max(row["branch"] for row in rows)
    assert 0 < largest < 0.25
    assert found.values["largest rate of A in quickstart/digits (full)"] == largest
    assert found.values["blocks of quickstart/digits (full) with A at most 0.25"] == "15 of 15"
    assert {trace.name for trace in found.figures["rates"].data} == {"quickstart/digits (full)"}


def test_rates_of_attention_are_those_of_its_neurons() -> None:
    found = rates_of_attention(["spikformer_2_384"], DIGITS, images=3)
    [(_, rows)] = found.tables.items()
    assert len(rows) == 2
    assert all(0 < row[key] < 1 for row in rows for key in ("queries", "keys", "values"))
    mean = sum(row["keys"] for row in rows) / 2
    assert found.values["mean rate of keys in spikformer_2_384, untrained"] == pytest.approx(mean)


def test_sizes_are_of_what_the_neurons_behind_get() -> None:
    model = create_model("spikformer_2_384", attention="relu").eval()
    x = torch.rand(2, 3, 32, 32)
    outputs: list[torch.Tensor] = []
    product = next(m for name, m in model.named_modules() if name.endswith(".product"))
    handle = product.register_forward_hook(lambda _module, _args, out: outputs.append(out))
    found = product_sizes(model, x)
    handle.remove()
    [out] = outputs
    assert len(found) == 2
    assert found[0].mean == pytest.approx(out.abs().mean().item())
    assert found[0].largest == out.abs().max().item()
    # sigmoid(4 u)'s derivative is below a hundredth of its peak where 4 |u| > 5.981
    far = ((out - 0.5).abs() > 5.9805 / 4).float().mean().item()
    assert found[0].far == pytest.approx(far, abs=1e-3)


def test_the_maps_that_diverge_are_larger() -> None:
    found = sizes_of_attention(["spikformer_2_384"], DIGITS, images=2, maps=["ssa", "identity", "leaky_relu"])
    part = {
        kind: found.values[f"part without gradient in spikformer_2_384, untrained, map {kind}"]
        for kind in ("ssa", "identity", "leaky_relu")
    }
    assert part["ssa"] < 0.05 < 0.15 < min(part["identity"], part["leaky_relu"])  # pyright: ignore
    assert len(found.figures["sizes"].data) == 3


@pytest.mark.parametrize("measure", [rates_of_attention, sizes_of_attention])
def test_networks_without_attention(measure) -> None:
    with pytest.raises(UsageError, match=r"quickstart/digits \(full\) has no spiking self-attention"):
        measure([SEW], images=2)


def test_sizes_behind_neurons_without_a_threshold() -> None:
    model = create_model("spikformer_2_384", neuron=lambda: PSN(4))
    with pytest.raises(UsageError, match="its neurons have no single threshold"):
        product_sizes(model.eval(), torch.rand(1, 3, 32, 32))


def test_no_network() -> None:
    with pytest.raises(UsageError, match=r"name the networks to measure: 'measure\.networks="):
        trained_rates([])
