"""Models as other processes get them: pickled, copied, saved whole."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from helpers.spawned import SMALL, described, run_them
from torch import nn

from spikeloom.layers import COMBINE
from spikeloom.models import create_model, list_models


@pytest.fixture(scope="module")
def every_model() -> dict[str, nn.Module]:
    """Every registered model, without memory for its weights."""
    with torch.device("meta"):
        return {name: create_model(name) for name in list_models()}


def test_every_model_pickles(every_model: dict[str, nn.Module]) -> None:
    for name, model in every_model.items():
        assert described(pickle.loads(pickle.dumps(model))) == described(model), name


@pytest.mark.parametrize("combine", COMBINE)
@torch.no_grad()
def test_a_model_copied_and_saved_whole_gives_the_same_logits(combine: str) -> None:
    model = create_model("sew_resnet_cifar", n=1, T=3, combine=combine).train()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = torch.rand(2, 3, 16, 16)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)


def test_every_model_reaches_a_spawned_process(every_model: dict[str, nn.Module], tmp_path: Path) -> None:
    small = {f"small {name}": create_model(name, **{"T": 2, **options}).eval() for name, options in SMALL.items()}
    x, file = torch.rand(1, 3, 32, 32) * 3, tmp_path / "found.pt"
    process = torch.multiprocessing.get_context("spawn").Process(
        target=run_them, args=({**every_model, **small}, x, file)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    found = torch.load(file)
    assert found["described"] == [described(model) for model in every_model.values()]
    with torch.no_grad():
        for (name, model), logits in zip(small.items(), found["logits"], strict=True):
            assert torch.equal(logits, model(x)), name
