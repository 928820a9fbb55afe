"""Natural pruning: silent shortcuts go, nothing else changes, and what is not silent stays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from spikeloom.analyse import MEASUREMENTS, draw_pruning, prune_silent_shortcuts
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.models.syna import SynAUnit

UNITS = ("blocks.2", "blocks.4", "blocks.6")
# Conv1x1 and norm of each shortcut, and the two matrices of its time attention at T = 4.
SIZES = {"blocks.2": 64 * 128 + 2 * 128 + 8, "blocks.4": 128 * 256 + 2 * 256 + 8, "blocks.6": 256 * 512 + 2 * 512 + 8}


def syna(shut: tuple[str, ...], **overrides: object) -> nn.Module:
    """A small input's network whose units fire, some of its gates shut."""
    torch.manual_seed(1)
    model = create_model("syna_resnet18", T=4, **overrides).train()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
            norm.bias.fill_(0.5)
        for name in UNITS:
            unit = model.get_submodule(name)
            assert isinstance(unit, SynAUnit)
            assert isinstance(unit.shortcut, nn.Sequential)
            unit.shortcut[1].bias.fill_(-50.0 if name in shut else 1.0)  # pyright: ignore
            # Open, as far as it is the gate that decides.
            for p in unit.shortcut[2].parameters():
                p.fill_(1.0)
        model(torch.rand(4, 3, 16, 16) * 4)
    return model


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for size in (3, 2):
        yield torch.rand(size, 3, 16, 16, generator=generator) * 4, torch.zeros(size, dtype=torch.int64)


@pytest.mark.parametrize("shut", [(), UNITS[:1], UNITS[2:], UNITS])
def test_silent_shortcuts_go(shut: tuple[str, ...]) -> None:
    model = syna(shut).eval()
    keys = set(model.state_dict())
    found = prune_silent_shortcuts(model, batches)
    assert found.removed == shut
    assert [found.rates[name] == 0 for name in UNITS] == [name in shut for name in UNITS]
    assert found.images == 5
    assert found.parameters == sum(SIZES[name] for name in shut)
    [bars] = draw_pruning(found).data
    assert dict(zip(bars.x, bars.y, strict=True)) == found.rates
    assert [text == "removed" for text in bars.text] == [name in shut for name in UNITS]
    assert set(model.state_dict()) == keys, "the model itself is left as it was"
    assert not any(module._forward_hooks for module in [*model.modules(), *found.model.modules()])
    gone = {key for key in keys if key.startswith(tuple(f"{name}.shortcut." for name in shut))} if shut else set()
    assert set(found.model.state_dict()) == keys - gone
    with torch.no_grad():
        for x, _ in batches():
            logits = model(x)
            assert logits.abs().max() > 0
            assert torch.equal(found.model(x), logits)


def test_rates_are_those_of_the_shortcuts() -> None:
    model = syna(UNITS[:1]).eval()
    outputs: list[Tensor] = []
    handle = model.get_submodule("blocks.4.shortcut").register_forward_hook(lambda _m, _a, out: outputs.append(out))
    with torch.no_grad():
        for x, _ in batches():
            model(x)
    handle.remove()
    rate = torch.cat([out.flatten() for out in outputs]).double().mean().item()
    assert rate > 0
    assert prune_silent_shortcuts(model, batches).rates["blocks.4"] == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("combine", ["add", "and", "iand", "or"])
def test_a_shortcut_that_the_sum_needs_stays(combine: str) -> None:
    found = prune_silent_shortcuts(syna(UNITS, combine=combine), batches)
    assert found.rates["blocks.2"] == 0
    # AND and IAND with nothing give nothing: the shortcut is not idle.
    assert found.removed == (UNITS if combine in ("add", "or") else ())


def test_training_mode_is_not_measured() -> None:
    model = syna(UNITS[:1]).train()
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    assert prune_silent_shortcuts(model, batches).removed == UNITS[:1]
    assert model.training
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers())


def test_nothing_to_prune() -> None:
    with pytest.raises(UsageError, match="no shortcut of a SynA unit to prune; syna_resnet18 has three"):
        prune_silent_shortcuts(create_model("ds_resnet14"), batches)
    with pytest.raises(UsageError, match="needs at least one batch"):
        prune_silent_shortcuts(create_model("syna_resnet18", T=4), lambda: iter(()))


def test_the_measurement_of_an_untrained_network() -> None:
    found = MEASUREMENTS["natural_pruning"](network="syna_resnet18", images=3, data={"name": "digits"})
    [rows] = found.tables.values()
    assert [row["unit"] for row in rows] == [*UNITS]
    assert found.values["images"] == 3
    assert found.values["removed"] == sum(row["removed"] for row in rows)
    assert all(row["removed"] == (row["rate"] == 0) for row in rows)
