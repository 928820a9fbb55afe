"""Rates and gradients by depth: what is read off at each block, and what is said of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spikeloom.analyse.papers.depth import gradients_by_depth, rates_by_depth
from spikeloom.analyse.papers.gradients import (
    BlockGradient,
    block_gradients,
    draw_gradients,
    growth,
    identity_regions,
    keeps_shape,
    residual_blocks,
    verdict,
)
from spikeloom.analyse.papers.rates import block_rates, draw_rates
from spikeloom.errors import UsageError
from spikeloom.models import create_model
from spikeloom.train.losses import sdt


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 16, 16) * 2, torch.tensor([1, 3])


def places(*norms: float, change: int | None = None) -> list[BlockGradient]:
    """Gradients at the inputs of blocks, the first of which changes the shape, and at the last one's output."""
    last = len(norms) - 1
    return [BlockGradient(str(i), n, i not in (0, change, last)) for i, n in enumerate(norms)]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("sew_resnet_cifar", {"n": 2}), ("ms_resnet14", {}), ("ms_resnet14", {"shortcut": "plain"}), ("sew_7b", {})],
)
def test_shapes_of_blocks(name: str, overrides: dict[str, object]) -> None:
    model = create_model(name, T=2, num_classes=5, **overrides)
    x = torch.rand(2, 2, 2, 128, 128) if name == "sew_7b" else torch.rand(2, 2, 3, 16, 16)
    seen = [rate.same_shape for rate in block_rates(model, x)]
    assert seen == ([True] * 7 if name == "sew_7b" else [True, True, False, True, False, True])


def test_gradients_are_those_of_autograd() -> None:
    (x, y), model = batch(), create_model("sew_resnet_cifar", n=2, T=3).train()
    kept: list[Tensor] = []

    def keep(module: object, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    handles = [block.register_forward_pre_hook(keep) for block in residual_blocks(model).values()]
    sdt(model(x), y).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = block_gradients(model, x, y, sdt)
    assert [row.block for row in found] == [*(f"blocks.{i}" for i in range(6)), "output"]
    assert [row.norm for row in found[:-1]] == pytest.approx([t.grad.norm().item() for t in kept], rel=1e-4)  # pyright: ignore
    assert all(p.grad is None for p in model.parameters())


def test_membrane_blocks_at_zero_init_keep_the_gradient() -> None:
    found = block_gradients(create_model("ms_resnet20", T=2).train(), *batch(), sdt)
    for region in identity_regions(found):
        assert {row.norm for row in region} == {region[0].norm}
    assert verdict(found) == "flat"


def test_rates_of_add_blocks_add_up() -> None:
    (x, _), model = batch(), create_model("sew_resnet_cifar", n=3, T=3).train()
    rates = block_rates(model, x)
    assert max(rate.branch for rate in rates) > 0.05
    for before, after in itertools.pairwise(rates):
        if after.same_shape:
            assert after.output == pytest.approx(before.output + after.branch, rel=1e-6)
    vanilla = block_rates(create_model("spiking_resnet_cifar", n=1, T=3).train(), x)
    assert all(rate.output == rate.branch for rate in vanilla)


def test_regions_and_growth() -> None:
    found = places(1, 8, 4, 2, 100, 9, 3, change=4)
    assert [[row.block for row in region] for region in identity_regions(found)] == [["1", "2", "3", "4"], ["5", "6"]]
    # From block to block back to the input: 2, 2, 1/50 over three blocks, then 3 over one.
    three = -sum((i - 1.5) * math.log(n) for i, n in enumerate((8, 4, 2, 100))) / 5
    assert growth(found) == pytest.approx((3 * three + math.log(3)) / 4)
    assert growth(places(1, 8, 4, 2, 1)) == pytest.approx(math.log(2))
    assert growth(places(1, 1, 0, 2, 1)) == -math.inf
    with pytest.raises(UsageError, match="every block of this network changes the shape"):
        growth([BlockGradient("0", 1.0, False)] * 3)


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ((1.0,) * 9, "flat"),
        (tuple(1.01**i for i in range(12)), "decays"),
        (tuple(1.3**-i for i in range(12)), "explodes"),
        (tuple(1.05**-i for i in range(12)), "grows slowly"),
        ((0.0, 0.0, *(1.0,) * 6), "vanishes"),
        ((*(0.5,) * 8, 0.6, 0.8, 1.0), "decays, then flat"),
    ],
)
def test_verdicts(norms: tuple[float, ...], said: str) -> None:
    assert verdict(places(*norms)) == said


def test_networks_without_blocks() -> None:
    with pytest.raises(UsageError, match="SpikingVGG has no residual blocks: name a residual network"):
        block_rates(create_model("report_vgg16"), torch.rand(1, 3, 32, 32))


def test_figures() -> None:
    (x, y), model = batch(), create_model("sew_resnet_cifar", n=1, T=2).train()
    gradients, rates = block_gradients(model, x, y, sdt), block_rates(model, x)
    figure = draw_gradients({"a": gradients, "b": gradients}, "title")
    assert [len(trace.y) for trace in figure.data] == [4, 4]
    assert figure.data[0].marker.symbol == ("circle", "diamond-open", "diamond-open", "circle")
    assert [trace.y for trace in draw_rates({"a": rates}, "title").data] == [
        tuple(rate.branch for rate in rates),
        tuple(rate.output for rate in rates),
    ]


def test_measured_of_the_smallest_networks() -> None:
    found = gradients_by_depth(n=1, images=2)
    assert [len(rows) for rows in found.tables.values()] == [8, 8, 8]
    assert set(found.figures) == {"fig6", "fig7", "fig8"}
    assert str(found.values["fig 8: ADD, no zero-init"]).endswith("larger than in fig 6")


@pytest.mark.slow
def test_measured_as_the_paper_says() -> None:
    torch.manual_seed(1)
    found = gradients_by_depth(n=5, images=2)
    for figure in ("fig 6", "fig 7", "fig 8"):
        assert {found.values[f"{figure}: {g}, zero-init"] for g in ("ADD", "AND", "IAND")} == {"flat"}
    assert found.values["fig 8: Spiking, zero-init"] == found.values["fig 8: Spiking, no zero-init"] == "explodes"
    assert found.values["fig 7: Spiking, zero-init"] == "decays"
    assert found.values["fig 6: ADD, no zero-init"] in ("grows slowly", "explodes")
    assert str(found.values["fig 8: ADD, no zero-init"]).endswith(", larger than in fig 6")


def test_measured_rates_are_as_the_paper_says() -> None:
    torch.manual_seed(1)
    rates = rates_by_depth(n=5, images=2)
    assert rates.values["zero-init: O of all four is one curve"] is True
    assert rates.values["zero-init: O is constant where shapes stay"] is True
    assert rates.values["no zero-init: O of ADD"] == "grows"
    assert rates.values["no zero-init: O of AND"] == "silent"
    assert len(rates.figures["rates"].data) == 16


@pytest.mark.slow
def test_the_layout_of_the_paper() -> None:
    with torch.device("meta"):
        blocks = residual_blocks(create_model("sew_resnet152")).values()
    assert [i for i, block in enumerate(blocks) if not keeps_shape(block)] == [0, 3, 11, 47]
