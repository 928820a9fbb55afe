"""GhostNets, DS-ResNet, SynA-ResNet, ResNet-19 and VGGSNN: counts, and what their papers say of their blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_networks import in_order
from torch import Tensor, nn

from spikeloom.layers import COMBINE, SEWBlock, SpatialAttention, SynapticAttention, TdBN, VanillaBlock
from spikeloom.models import create_model
from spikeloom.models.ds_resnet import ds_block, ds_mlf
from spikeloom.models.ghostnet import ChannelWeights, GhostBottleneck, GhostModule
from spikeloom.models.syna import SynAUnit
from spikeloom.neurons import MLF, Neuron
from spikeloom.stream import Stream

GESTURE: dict[str, Any] = {"layout": "gesture", "T": 32, "in_channels": 2, "num_classes": 11}
DVS: dict[str, Any] = {"layout": "cifar10_dvs", "in_channels": 2}
GHOSTS = ("ghostnet_snn", "ghostnet_dfc", "ghostnet_channel_mlp")


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("ghostnet_snn", {}, 3_912_650),
        ("ghostnet_snn", {"variant": "H"}, 3_914_318),
        ("ghostnet_snn", {"literal": True, "spiking_se": True}, 3_912_650),
        ("ghostnet_dfc", {}, 4_887_050),
        ("ghostnet_channel_mlp", {}, 4_650_298),
        ("ghostnet_channel_mlp", {"inner_residual": True}, 4_650_298),
        ("report_sew_resnet34_ghost", {}, 240_922),
        ("report_sew_resnet34_ghost", {"in_channels": 1}, 240_778),
        ("report_sew_resnet34_ghost", {"ghost_stem": False}, 241_034),
        ("report_sew_resnet34_ghost", {"ghost_stem": False, "in_channels": 1}, 240_746),
        ("report_sew_resnet34_ghost", {"outer_norm": False}, 238_650),
        ("report_sew_resnet34_ghost", {"outer_norm": False, "in_channels": 1}, 238_506),
        ("syna_resnet18", {}, 11_175_370),
        ("syna_resnet18", {"attention": None}, 11_173_962),
        ("syna_resnet18", GESTURE, 11_183_115),
        ("syna_resnet18", {**GESTURE, "attention": None}, 11_179_019),
        ("syna_resnet18", DVS, 11_174_794),
        ("syna_resnet18", {**DVS, "attention": None}, 11_173_386),
        ("syna_resnet18", {"attention": None, "in_channels": 1}, 11_172_810),
        # 8 MA and 3 IA: a channel's score has 16 C weights, a space's 18.
        ("syna_resnet18", {"attention": "channel"}, 11_173_962 + 16 * (2 * (64 + 128 + 256 + 512) + 128 + 256 + 512)),
        ("syna_resnet18", {"attention": "space"}, 11_173_962 + 11 * 18),
        ("ds_resnet14", {}, 2_777_674),
        ("ds_resnet20", {}, 4_327_754),
        ("ds_resnet20", {"width": 16}, 272_474),
        ("ds_resnet32", {}, 7_427_914),
        ("ds_resnet44", {}, 10_528_074),
        ("ds_resnet68", {}, 16_728_394),
        ("ds_resnet20", {"sam": True}, 4_327_950),
        ("ds_resnet20", {"vanilla": True}, 4_327_754),
        ("ds_resnet20_gesture", {}, 272_395),
        ("ds_resnet20_gesture", {"sam": True}, 272_591),
        ("ds_resnet14_dvs", {}, 696_330),
        ("ds_resnet14_dvs", {"sam": True}, 696_526),
        ("tdbn_resnet19", {}, 12_630_858),
        ("tdbn_resnet19", {"norm": "batch"}, 12_630_858),
        ("vggsnn", {}, 9_271_498),
        ("vggsnn", {"bias": False}, 9_268_746),
        ("vggsnn", {"pool": False}, 9_271_498),
    ],
)
def test_published_parameter_counts(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, **options).parameters()) == count


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        *((name, {}, ((3, 32, 32), (3, 45, 37))) for name in (*GHOSTS, "report_sew_resnet34_ghost")),
        ("ds_resnet14", {"sam": True}, ((3, 16, 16), (3, 9, 14))),
        ("ds_resnet20_gesture", {}, ((2, 32, 32), (2, 9, 14))),
        ("syna_resnet18", {}, ((3, 8, 8), (3, 9, 14))),
        ("tdbn_resnet19", {}, ((3, 8, 8), (3, 9, 14))),
    ],
)
def test_two_sizes_of_input(name: str, options: dict[str, Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    torch.manual_seed(1)
    model = create_model(name, T=2, num_classes=7, **options).train()
    for shape in shapes:
        out = model(torch.rand(2, *shape) * 4)
        assert out.shape == (2, 2, 7)
        assert out.isfinite().all()
        out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def outputs_of(model: nn.Module, kind: type[nn.Module], x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in model.modules() if isinstance(m, kind)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def whole(x: Tensor) -> bool:
    return torch.equal(x, x.round())


# --- GhostNets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_channels", [1, 2, 9, 10])
def test_ghost_module(out_channels: int) -> None:
    module = GhostModule(6, out_channels, nn.Identity if out_channels == 9 else lambda _: nn.Tanh(), kernel=3, stride=2)
    x, half = torch.randn(3, 2, 6, 7, 5), math.ceil(out_channels / 2)
    y = module(x)
    assert y.shape == (3, 2, out_channels, 4, 3)
    primary = module.primary(x)
    assert torch.equal(y[:, :, :half], primary[:, :, :out_channels])
    assert torch.equal(y[:, :, half:], module.cheap(primary)[:, :, : out_channels - half])
    # C_in m k^2 + 9 m weights.
    assert sum(p.numel() for p in module.parameters()) == 6 * half * 9 + 9 * half


def ghost(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = create_model(name, T=2, **options).train()
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32) * 4)
    return model


def test_a_gate_of_ones_and_an_mlp_of_one_change_nothing() -> None:
    plain, x = ghost("ghostnet_snn").eval(), torch.rand(2, 3, 32, 32) * 4
    gated, weighed, inner = (
        ghost("ghostnet_dfc"),
        ghost("ghostnet_channel_mlp"),
        ghost("ghostnet_channel_mlp", inner_residual=True),
    )
    for module in gated.modules():
        if isinstance(module, GhostModule) and module.gate is not None:
            module.gate = Ones()
    for model, value in ((weighed, 1.0), (inner, 0.0)):
        with_mlp = [
            m for m in model.modules() if isinstance(m, ChannelWeights) and isinstance(m.weights[-1], nn.Identity)
        ]
        assert len(with_mlp) == 16
        for m in with_mlp:
            nn.init.zeros_(m.weights[3].weight)  # pyright: ignore
            nn.init.constant_(m.weights[3].bias, value)  # pyright: ignore
    with torch.no_grad():
        expected = plain(x)
        assert expected.std() > 0
        for model in (gated, weighed, inner):
            copy_weights(plain, model)
            assert torch.equal(model.eval()(x), expected)


class Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(())


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Those of a GhostNet into one with parts in between, which are left alone."""
    own = [m for m in target.modules() if len([*m.children()]) == 0 and [*m.parameters()]]
    extra = {
        id(layer)
        for m in target.modules()
        if isinstance(m, ChannelWeights) and isinstance(m.weights[-1], nn.Identity)
        for layer in m.modules()
    }
    own = [m for m in own if id(m) not in extra]
    theirs = [m for m in source.modules() if len([*m.children()]) == 0 and [*m.parameters()]]
    # Bottlenecks are built in one order, but a branch's last part may stand behind its shortcut.
    for a, b in zip(theirs, own, strict=True):
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("name", ["ghostnet_snn", "ghostnet_dfc"])
def test_blocks_add_spikes_unless_literal(name: str) -> None:
    x = torch.rand(2, 3, 32, 32) * 4
    blocks = outputs_of(ghost(name), GhostBottleneck, x)
    assert len(blocks) == 16
    assert blocks[3].max() > 0
    for i, block in enumerate(blocks):
        assert whole(block)
        assert block.min() >= 0
        assert block.max() <= i + 2
    assert not any(whole(block) for block in outputs_of(ghost(name, literal=True), GhostBottleneck, x)[:8])


@pytest.mark.parametrize(("options", "layers"), [({}, 81), ({"spiking_se": True}, 95), ({"literal": True}, 40)])
def test_where_the_neurons_are(options: dict[str, Any], layers: int) -> None:
    # Stem, 2 in each of 32 Ghost modules, 4 strides, 2 in each of 5 shortcuts, before and in the head; 2 in each of 7
    # squeezes. Literal: stem, the first Ghost modules, the first half of shortcuts, before and in the head.
    with torch.device("meta"):
        model = create_model("ghostnet_snn", **options)
    assert sum(isinstance(m, Neuron) for m in model.modules()) == layers


def test_a_spiking_squeeze_gates_by_spikes() -> None:
    for spiking in (True, False):
        model = ghost("ghostnet_snn", spiking_se=spiking)
        factors = outputs_of(model, type(ghost_gate(spiking)), torch.rand(2, 3, 32, 32) * 4)
        assert factors
        assert all((f.min() >= 0) and (f.max() <= 1) for f in factors)
        assert all(whole(f) for f in factors) == spiking


def ghost_gate(spiking: bool) -> nn.Module:
    return create_model("ghostnet_snn").head[1].neuron if spiking else nn.Hardtanh()  # pyright: ignore


def test_places_of_the_channel_mlp() -> None:
    with torch.device("meta"):
        for where, count in (("gm1", 16), ("gm2", 16), ("both", 32)):
            model = create_model("ghostnet_channel_mlp", where=where, ratio=0.5)
            mlps = [
                m for m in model.modules() if isinstance(m, ChannelWeights) and isinstance(m.weights[-1], nn.Identity)
            ]
            assert len(mlps) == count
            assert all(m.weights[1].out_features * 2 == m.weights[1].in_features for m in mlps)  # pyright: ignore


@pytest.mark.parametrize("options", [{}, {"ghost_stem": False}, {"outer_norm": False}])
def test_sew_resnet_of_ghost_modules(options: dict[str, bool]) -> None:
    torch.manual_seed(1)
    model = create_model("report_sew_resnet34_ghost", T=2, **options).train()
    modules = [m for m in model.modules() if isinstance(m, GhostModule)]
    assert len(modules) == (30 if options == {"ghost_stem": False} else 31)
    blocks = outputs_of(model, SEWBlock, torch.rand(2, 3, 16, 16) * 4)
    assert len(blocks) == 15
    for b, out in enumerate(blocks, start=1):
        assert whole(out)
        assert out.min() >= 0
        assert out.max() <= b + 1
    assert blocks[4].max() > 1


# --- DS-ResNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "counts"),
    [
        ("ds_resnet14", (3, 16, 16), (2, 2, 2)),
        ("ds_resnet20_gesture", (2, 32, 32), (3, 3, 3)),
    ],
)
def test_ds_blocks_count_spikes(name: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    blocks = outputs_of(create_model(name, T=3).train(), SEWBlock, torch.rand(3, *shape) * 8)
    # Each block adds an MLF to what came, a shape-changing one an MLF to an MLF; the stem is one.
    bounds = [3 * (k + 2) for count in counts for k in range(count)]
    assert len(blocks) == len(bounds)
    for out, bound in zip(blocks, bounds, strict=True):
        assert whole(out)
        assert out.min() >= 0
        assert out.max() <= bound
    assert blocks[counts[0] - 1].max() > 3


@pytest.mark.parametrize("vanilla", [False, True])
def test_a_ds_block_without_its_branch_is_the_identity(vanilla: bool) -> None:
    block, s = ds_block(6, 6, 1, ds_mlf, vanilla), torch.randint(0, 4, (3, 2, 6, 5, 5)).float()
    assert isinstance(block, VanillaBlock if vanilla else SEWBlock)
    nn.init.zeros_(block.spike.norm.weight)  # pyright: ignore
    nn.init.zeros_(block.spike.norm.bias)  # pyright: ignore
    assert torch.equal(block(s), s) == (not vanilla)


def test_one_level_is_a_lif() -> None:
    torch.manual_seed(1)
    model = create_model("ds_resnet14", T=2, neuron=functools.partial(MLF, v_threshold=(0.6,))).train()
    x, y = torch.rand(4, 3, 8, 8) * 4, torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x).mean(0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for out in outputs_of(model, MLF, x):
        assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_places_of_spatial_attention() -> None:
    def places(sam: bool | str) -> list[str]:
        model = create_model("ds_resnet20", sam=sam)
        return [name for name, m in model.named_modules() if isinstance(m, SpatialAttention)]

    assert places(True) == places("stages") == ["blocks.3", "blocks.7"]
    assert places("blocks") == [f"blocks.{n}.branch.3" for n in range(9)]
    assert not any(isinstance(m, SpatialAttention) for m in create_model("ds_resnet20").modules())


def test_the_input_of_gestures_is_normalised_by_constants() -> None:
    model = create_model("ds_resnet20_gesture", T=4).train()
    seen: list[Tensor] = []
    model.stem[1].register_forward_hook(lambda _m, args, _o: seen.append(args[0]))  # pyright: ignore
    with torch.no_grad():
        model(torch.poisson(torch.rand(4, 3, 2, 8, 8) * 3))
    mean, std = seen[0].mean((0, 1, 3, 4)), seen[0].std((0, 1, 3, 4), correction=0)
    torch.testing.assert_close(mean, torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, torch.full((2,), 0.6), rtol=1e-4, atol=0)
    assert not any(name.startswith("stem.0") for name, _ in model.named_parameters())
    create_model("ds_resnet20_gesture").load_state_dict(model.state_dict())


# --- ResNet-19 and VGGSNN ---------------------------------------------------------------------------------------------


def test_two_added_branches_keep_the_deviation_of_one() -> None:
    torch.manual_seed(1)
    block = next(m for m in create_model("tdbn_resnet19").modules() if isinstance(m, VanillaBlock)).train()
    sums: list[Tensor] = []
    block.spike.neuron.register_forward_hook(lambda _m, args, _o: sums.append(args[0]))
    with torch.no_grad():
        block((torch.rand(4, 4, 64, 8, 8) < 0.3).float())
    assert isinstance(block.spike.norm, TdBN)
    # The branches are not quite independent.
    assert sums[0].std().item() == pytest.approx(1, abs=0.1)
    assert not any(isinstance(m, TdBN) for m in create_model("tdbn_resnet19", norm="batch").modules())


@pytest.mark.parametrize("pool", [True, False])
def test_vggsnn_takes_one_size(pool: bool) -> None:
    model = create_model("vggsnn", image_size=32, pool=pool, T=2)
    assert model(torch.rand(3, 1, 2, 32, 32)).shape == (3, 1, 10)
    assert model.head.in_features == 512 * 4
    with pytest.raises(ValueError, match=r"made for frames of 32x32, got 48x32: set model\.image_size"):
        model(torch.rand(3, 1, 2, 48, 32))
    with pytest.raises(ValueError, match="image_size must be a multiple of 16, got 40"):
        create_model("vggsnn", image_size=40)


# --- SynA-ResNet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "maps", "modules"),
    [
        ({}, (3, 32, 32), (32, 16, 8, 4), 11),
        ({"in_channels": 1, "attention": None}, (1, 28, 28), (28, 14, 7, 4), 0),
        (GESTURE, (2, 128, 128), (32, 16, 8, 4), 8),
        (DVS, (2, 128, 128), (12, 6, 3, 2), 11),
        ({"ma": False}, (3, 8, 8), (8, 4, 2, 1), 3),
        ({"ia": False}, (3, 8, 8), (8, 4, 2, 1), 8),
    ],
)
def test_layouts_of_syna(options: dict[str, Any], shape: tuple[int, ...], maps: tuple[int, ...], modules: int) -> None:
    model = create_model("syna_resnet18", **{**options, "T": 1}).eval()
    units = outputs_of(model, SynAUnit, torch.rand(1, *shape))
    assert tuple(out.shape[-1] for out in units[::2]) == maps
    assert sum(isinstance(m, SynapticAttention) for m in model.modules()) == modules
    shortcuts = [i for i, m in enumerate(model.blocks) if m.shortcut is not None]  # pyright: ignore
    assert shortcuts == [2, 4, 6]


def test_kernels_of_space_attention() -> None:
    with torch.device("meta"):
        model = create_model("syna_resnet18", **GESTURE, attention="space")
    kernels = [m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 2][1:]
    assert kernels == [7, 7, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("attention", ["time", "channel", "space"])
def test_syna_with_attention(attention: str, T: int) -> None:
    torch.manual_seed(1)
    model = create_model("syna_resnet18", T=T, attention=attention).train()
    x = (torch.rand(2, 3, 8, 8) * 8).requires_grad_()
    out = model(x)
    assert out.shape == (T, 2, 10)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if T > 2:
        return
    model.eval()
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        assert torch.equal(torch.export.export(model, (x,)).module()(in_order(x)), first)
    with pytest.raises(RuntimeError, match="cannot run under a Stream; a model without it can step"):
        Stream(model)(x)


def test_time_attention_has_one_length() -> None:
    with pytest.raises(ValueError, match="this TimeScore is made for T = 16 steps, got 4"):
        create_model("syna_resnet18")(torch.rand(4, 1, 3, 8, 8))


@pytest.mark.parametrize("combine", ["or", "add", "and", "iand"])
def test_every_convolution_but_the_stem_receives_spikes(combine: str) -> None:
    torch.manual_seed(1)
    model = create_model("syna_resnet18", T=2, combine=combine).train()
    seen: list[Tensor] = []
    convolutions = [m for m in model.blocks.modules() if isinstance(m, nn.Conv2d)]  # pyright: ignore
    for m in convolutions:
        m.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        model(torch.rand(4, 3, 8, 8) * 8)
    assert len(seen) == len(convolutions) == 19
    assert all(whole(x) and x.min() >= 0 for x in seen)
    assert 1 <= max(x.max().item() for x in seen) <= (2 if combine == "add" else 1)


@pytest.mark.parametrize("a", [0.0, 1.0])
@pytest.mark.parametrize("b", [0.0, 1.0])
def test_or_and_its_gradients(a: float, b: float) -> None:
    combine: Callable[[Tensor, Tensor], Tensor] = COMBINE["or"]
    x, y = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    out = combine(x, y)
    out.backward()
    assert out.item() == max(a, b)
    assert (x.grad, y.grad) == (1 - b, 1 - a)
