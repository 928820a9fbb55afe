"""Columns of published tables that are measured of a run: attention and shortcuts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import spikeloom

from spikeloom.analyse import Costs, audit
from spikeloom.analyse.audit.attention_products import attention_maps
from spikeloom.analyse.load import open_target
from spikeloom.layers import SpikingSelfAttention
from spikeloom.neurons import LIF
from spikeloom.record import Recorder

T, D, HEADS = 3, 32, 2


@pytest.mark.parametrize("side", [4, 6])  # as many tokens as channels of a head, and more: both orders of the products
def test_a_real_map_is_one_product(side: int) -> None:
    model = SpikingSelfAttention(D, HEADS, LIF, variant="softmax").eval()
    (found,) = attention_maps(audit(model, torch.rand(T, 1, D, side, side), batch_axis=1).rows, Costs())
    assert found.operations == T * side**4 * D
    assert found.energy_pj == pytest.approx(4.6 * found.operations)


@pytest.mark.parametrize("side", [4, 6])
def test_a_map_of_spikes_counts_those_of_the_quieter_operand(side: int) -> None:
    torch.manual_seed(1)
    model = SpikingSelfAttention(D, HEADS, lambda: LIF(decay_input=False), v_threshold=0.5).eval()
    x = torch.randn(T, 1, D, side, side) * 6
    with Recorder(model, only=["q_spike.neuron", "k_spike.neuron"]) as record:
        model(x)
    rates = [spikes[0].mean().item() for spikes in record.spikes.values()]
    assert 0 < min(rates) < max(rates)
    (found,) = attention_maps(audit(model, x, batch_axis=1).rows, Costs())
    assert found.operations == pytest.approx(min(rates) * T * side**4 * D, rel=1e-5)
    assert found.energy_pj == pytest.approx(0.9 * found.operations)


def measured(model: str, published: str, neuron: str = "") -> tuple[dict[str, Any], str]:
    """What is recorded and printed of a recipe of one's own in the working folder, in which `runs` has the run."""
    Path("mine.toml").write_text(f"""
title = "own"
paper = "own"
command = "own"
[settings]
data = {{ name = "digits", subset = 4, test_subset = 4 }}
model = {{ {model} }}
{neuron}
train = {{ epochs = 1, batch_size = 2, optimizer = "sgd", lr = 0.01 }}
[budgets.full]
[rows.main]
system = "own"
published = {{ {published} }}
""")
    code, out, err = spikeloom("reproduce", "mine.toml")
    assert code == 0, err
    [record] = [json.loads(path.read_text()) for path in Path("results").rglob("*.json")]
    return record["measured"], out


def test_the_rates_of_shortcuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    model = 'name = "syna_resnet18", T = 1, attention = "none"'
    neuron = 'neuron = { name = "IF", v_threshold = 0.01 }'  # fires though its norms have hardly been trained
    values, printed = measured(model, 'shortcut_rates = "0 0 0"', neuron)
    found = values["shortcut_rates"]
    assert found in printed
    target = open_target(next(Path("runs").rglob("summary.json")).parent, {"images": 4})
    with Recorder(target.model.eval()) as record:
        target.model(next(target.batches())[0])
    ends = [spikes[0].mean().item() for name, spikes in record.spikes.items() if "shortcut" in name]
    assert len(ends) == 3
    assert [float(rate) for rate in found.split()] == pytest.approx(ends, abs=6e-5)
    assert any(ends)


def test_the_columns_of_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = 'name = "spikformer_2_384", channels = 32, heads = 16, depth = 2, T = 2, attention = "identity"'
    found, _ = measured(model, "attention_ops_M = 6.3, attention_energy_uJ = 29.0")
    tokens = 2 * 2  # 8x8 pixels, pooled twice
    assert found["attention_ops_M"] == pytest.approx(2 * tokens**2 * 32 / 1e6)
    assert found["attention_energy_uJ"] == pytest.approx(4.6 * found["attention_ops_M"])
