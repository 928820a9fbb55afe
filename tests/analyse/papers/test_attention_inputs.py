"""What enters the blocks: counted exactly, drawn, and measured from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spikeloom.analyse import BlockInput, block_inputs, draw_block_inputs
from spikeloom.analyse.papers.attention_inputs import attention_inputs
from spikeloom.cli.progress import Quiet
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.train.loop import train
from spikeloom.train.recipe import check_settings
from spikeloom.train.run import Run


def lively(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = create_model(name, channels=32, heads=4, depth=2, scale=0.5)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 2.0, 3.0)
        nn.init.uniform_(norm.bias, 0.0, 0.5)
        norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(2, 3, 32, 32))
    return model


def test_counts() -> None:
    entry = BlockInput("here")
    entry.add(torch.tensor([0.0, 0.0, 1.0, 3.0]))
    assert entry.spikes is False
    entry.add(torch.tensor([[1.0, 0.5], [-1.0, 0.0]]))
    assert (entry.counts, entry.others, entry.total) == ([3, 2, 0, 1], 2, 8)
    assert entry.nonzero == 1 - 3 / 8


def test_integers_and_spikes() -> None:
    x = torch.randn(2, 3, 32, 32)
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("spikformer_2_384", "spikingformer_2_384"):
        model = lively(name)
        found = block_inputs(model, [x, x[:1]])
        assert model.training
        assert len(found) == 2
        seen[name] = []
        handle = model.get_submodule(found[0].name).q.register_forward_hook(
            lambda _m, args, _o, name=name: seen[name].append(args[0])
        )
        with torch.no_grad():
            model.eval()(x)
            model(x[:1])
        handle.remove()
        values = torch.cat([s.flatten() for s in seen[name]])
        assert found[0].counts == torch.bincount(values.long()).tolist()
        assert found[0].nonzero == pytest.approx((values != 0).float().mean().item())
        assert all(entry.spikes for entry in found) == (name == "spikingformer_2_384")
        assert all(entry.others == 0 for entry in found)
        figure = draw_block_inputs(found, name)
        assert [list(bar.y) for bar in figure.data] == [entry.counts for entry in found]
        assert figure.layout.yaxis.type == "log"


def test_of_a_run(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "data": {"name": "digits", "subset": 32, "test_subset": 8, "size": 16},
        "model": {"name": "spikformer_2_384", "channels": 16, "heads": 2, "T": 2},
        "train": {"epochs": 1, "batch_size": 16, "lr": 0.01},
    }
    run = Run.plan(tmp_path / "run", "here", "main", "full", check_settings(values, "here"))
    train(run, Quiet())
    measured = attention_inputs(str(run.folder), subset=20)
    assert set(measured.values) == {"nonzero_percent_block_1", "nonzero_percent_block_2", "largest", "spikes_only"}
    [table] = measured.tables.values()
    assert sum(row["count"] for row in table if row["block"] == 1) == 2 * 20 * 16 * 4 * 4
    assert "histograms" in measured.figures
    with pytest.raises(UsageError, match=r"give the folder of a trained transformer as measure\.run=RUN"):
        attention_inputs("")
