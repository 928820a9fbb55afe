"""SEW ResNet, Spiking ResNet, the networks of event frames, MS-ResNet: counts, shapes, and what their papers claim."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import in_order
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers import (
    MembraneBlock,
    NormSpike,
    PlainBlock,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    bottleneck_branch,
    start_as_identity,
)
from spikeloom.layers.residual_blocks import Block
from spikeloom.models import create_model
from spikeloom.models._ann_weights import load_ann
from spikeloom.models.sew_resnet import flat_if
from spikeloom.neurons import IF, LIF, PLIF, PSN, Neuron
from spikeloom.stream import Stream
from spikeloom.surrogates import FlatATan

COUNTS: dict[str, tuple[int, int]] = {  # parameters, neuron layers
    **{f"{kind}_resnet18": (11_689_512, 20 if kind == "sew" else 17) for kind in ("sew", "spiking")},
    **{f"{kind}_resnet34": (21_797_672, 36 if kind == "sew" else 33) for kind in ("sew", "spiking")},
    **{f"{kind}_resnet50": (25_557_032, 53 if kind == "sew" else 49) for kind in ("sew", "spiking")},
    **{f"{kind}_resnet101": (44_549_160, 104 if kind == "sew" else 100) for kind in ("sew", "spiking")},
    **{f"{kind}_resnet152": (60_192_808, 155 if kind == "sew" else 151) for kind in ("sew", "spiking")},
    "sew_7b": (130_426, 15),
    "spiking_7b": (130_426, 15),
    "plain_7b": (130_426, 15),
    "sew_wide_7b": (1_192_218, 16),
    "sew_probe": (186_858, 21),
    "spiking_probe": (186_858, 21),
    "sew_resnet_cifar": (2_411_226, 153),
    "spiking_resnet_cifar": (2_411_226, 151),
    "ms_resnet18": (11_693_736, 17),
    "ms_resnet34": (21_801_896, 33),
    "ms_resnet104": (77_284_264, 103),
    "ms_resnet14": (175_258, 13),
    "ms_resnet20": (272_474, 19),
    "ms_resnet32": (466_906, 31),
    "ms_resnet44": (661_338, 43),
    "ms_resnet56": (855_770, 55),
    "ms_resnet110": (1_730_714, 109),
    "ms_resnet482": (7_758_106, 481),
}
VARIANTS: list[tuple[str, dict[str, Any], int]] = [
    ("ms_resnet104", {"stem": "3x3"}, 77_350_504),
    ("sew_7b", {"neuron": IF}, 130_411),
    ("sew_7b", {"neuron": IF, "up_kernel": 3}, 130_923),
    ("sew_wide_7b", {"neuron": IF}, 1_192_202),
    ("sew_wide_7b", {"up_kernel": 3}, 1_258_778),
    ("ms_resnet20", {"shortcut": "vanilla"}, 272_474),
    ("ms_resnet20", {"shortcut": "without_lif"}, 272_474),
    ("ms_resnet20", {"shortcut": "plain"}, 272_474 - (16 * 32 + 2 * 32 + 32 * 64 + 2 * 64)),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def neurons(model: nn.Module) -> list[Neuron]:
    return [m for m in model.modules() if isinstance(m, Neuron)]


def blocks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Block)]


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_published_counts(name: str, counts: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = create_model(name)
    assert (parameters(model), len(neurons(model))) == counts


@pytest.mark.parametrize(("name", "overrides", "count"), VARIANTS)
def test_counts_of_variants(name: str, overrides: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert parameters(create_model(name, **overrides)) == count


# --- every network ----------------------------------------------------------------------------------------------------

QUICK = ("sew_resnet18", "spiking_resnet18", "sew_probe", "spiking_probe", "ms_resnet18", "ms_resnet14")
RUN: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in QUICK),
    ("sew_resnet_cifar", {"n": 1, "combine": "iand"}),
    ("spiking_resnet_cifar", {"n": 1}),
    ("ms_resnet104", {"counts": (1, 1, 1, 1), "stem": "3x3"}),
    *(("ms_resnet14", {"shortcut": arm}) for arm in ("without_lif", "vanilla", "plain")),
    ("sew_probe", {"combine": "and"}),
]


def frames(name: str, T: int, side: tuple[int, int]) -> Tensor:
    events = "7b" in name
    small = (32, 32) if "_resnet" not in name else side
    return torch.rand(T, 2, 2 if events else 3, *((128 + side[0], 128 + side[1]) if events else small)) * 2


def runs_everywhere(name: str, overrides: dict[str, Any], T: int, side: tuple[int, int], exported: bool = True) -> None:
    x = frames(name, T, side)
    model = create_model(name, T=T, num_classes=7, **overrides).train()
    image = x[0].clone().requires_grad_()
    out = model(image)
    assert out.shape == (T, 2, 7)
    out.square().sum().backward()
    assert image.grad is not None
    for tensor in (out, image.grad, *(p.grad for p in model.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()
    with torch.no_grad():
        for p in model.parameters():  # what zero-init silenced speaks
            p.add_(torch.randn_like(p) * 0.1)
        for _ in range(2):
            model(x)
        model = model.eval()
        if exported:
            program = torch.export.export(model, (x,))
            assert torch.equal(program.module()(in_order(x)), model(x))
        model, x = model.double(), x.double()
        whole, stream = model(x), Stream(model)
        parts = torch.cat([stream(x[:1]), *([stream(x[1:])] if T > 1 else [])])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("number", "T", "side"), [(0, 1, (16, 16)), (1, 2, (19, 14)), (2, 5, (16, 16))])
@pytest.mark.parametrize(("name", "overrides"), RUN, ids=str)
def test_forward_backward_export_stream(
    name: str, overrides: dict[str, Any], number: int, T: int, side: tuple[int, int]
) -> None:
    # Every network is exported once, every length and size of several networks.
    runs_everywhere(name, overrides, T, side, exported=RUN.index((name, overrides)) % 3 == number)


@pytest.mark.parametrize("name", ["sew_7b", "plain_7b"])
def test_frames_of_events(name: str) -> None:
    runs_everywhere(name, {}, 2, (0, 21))


@pytest.mark.slow
@pytest.mark.parametrize(("T", "side"), [(1, (32, 32)), (2, (35, 30)), (5, (32, 32))])
@pytest.mark.parametrize("name", sorted(set(COUNTS) - set(QUICK)))
def test_the_large_ones(name: str, T: int, side: tuple[int, int]) -> None:
    runs_everywhere(name, {}, T, side)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"takes images of 128 to 255 pixels a side, got 64x128: set model\.image_size"
    ):
        create_model("sew_7b")(torch.zeros(1, 1, 2, 64, 128))
    with pytest.raises(ValueError, match="image_size must be at least 32, got 31"):
        create_model("sew_probe", image_size=31)
    assert create_model("sew_probe", image_size=64, T=1)(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 10)
    with pytest.raises(ValueError, match="n, the blocks of a stage, must be at least 1, got 0"):
        create_model("sew_resnet_cifar", n=0)


# --- what the papers claim of the blocks ------------------------------------------------------------------------------


def block(kind: str, neuron: Callable[[], nn.Module] = IF, bottleneck: bool = False) -> Any:
    branch, spike = (bottleneck_branch if bottleneck else basic_branch)(8, 8, 1, neuron), NormSpike(8, neuron)
    if kind == "plain":
        return PlainBlock(branch, spike)
    if kind == "vanilla":
        return VanillaBlock(branch, spike, nn.Identity())
    return SEWBlock(branch, spike, nn.Identity(), kind)


def spikes(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("neuron", [IF, PLIF, functools.partial(LIF, tau=4.0)], ids=["IF", "PLIF", "LIF"])
@pytest.mark.parametrize("combine", ["add", "and", "iand"])
def test_zero_init_is_the_identity_bit_for_bit(
    combine: str, neuron: Callable[[], nn.Module], bottleneck: bool, training: bool
) -> None:
    unit, s = block(combine, neuron, bottleneck).train(training), spikes(16, 2, 8, 6, 6)
    start_as_identity(unit)
    assert torch.equal(unit(s), s)


def test_zero_init_of_spiking_blocks() -> None:
    unit, s = block("vanilla", LIF), spikes(5, 2, 8, 6, 6)
    start_as_identity(unit)
    assert torch.equal(unit(s), LIF()(s))
    with pytest.raises(UsageError, match="zero_init with combine 'and' needs a neuron with one fixed threshold"):
        create_model("sew_probe", combine="and", zero_init=True, neuron=functools.partial(PSN, T=4))


@pytest.mark.parametrize("name", ["sew_resnet18", "sew_7b", "spiking_resnet18", "ms_resnet20"])
def test_builders_set_zero_init(name: str) -> None:
    for zero_init in (True, False):
        weights = [b.spike.norm.weight for b in blocks(create_model(name, zero_init=zero_init))]
        assert all(bool((w == 0).all()) == zero_init for w in weights)
    default = blocks(create_model(name))[0].spike.norm.weight
    assert bool((default == 0).all()) == (name != "sew_resnet18")


def test_add_stays_in_its_range_and_and_never_grows() -> None:
    for combine, top in (("add", 5), ("and", 1), ("iand", 1)):
        s = spikes(4, 2, 8, 6, 6)
        for k in range(1, 5):
            unit = block(combine).train()
            nn.init.constant_(unit.spike.norm.weight, 3.0)
            before, s = s, unit(s)
            assert torch.equal(s, s.round())
            assert 0 <= s.min() <= s.max() <= (k + 1 if combine == "add" else 1)
            if combine != "add":
                assert (s <= before).all()
        assert s.max() <= top


def test_a_stage_change_gives_at_most_two() -> None:
    model = create_model("sew_resnet_cifar", n=2, T=3).train()
    seen: list[Tensor] = []
    for b in blocks(model):
        b.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(torch.rand(2, 3, 16, 16) * 3)
    tops = [out.max().item() for out in seen]
    assert tops[2] <= 2
    assert tops[4] <= 2
    assert max(tops) > 1


def test_gradient_of_a_zero_init_add_stage_is_the_upstream_gradient() -> None:
    stage = nn.Sequential(*(block("add") for _ in range(4)))
    for unit in stage:
        start_as_identity(unit)  # pyright: ignore
    s, upstream = spikes(4, 2, 8, 6, 6).requires_grad_(), torch.randn(4, 2, 8, 6, 6)
    stage(s).backward(upstream)
    assert s.grad is not None
    assert torch.equal(s.grad, upstream)


def test_flat_end_of_spiking_blocks() -> None:
    model = create_model("spiking_resnet18", flat_end=True)
    for b in blocks(model):
        assert (b.spike.neuron.v_threshold, b.spike.neuron.surrogate) == (0.5, FlatATan())
        assert b.branch[1].neuron.v_threshold == 1.0
    # The derivative at 0 and at 1 is 1: an identity block hands the gradient on as it is.
    s = spikes(1, 2, 8, 6, 6).requires_grad_()
    out = flat_if()(s)
    out.sum().backward()
    assert torch.equal(out, s)
    torch.testing.assert_close(s.grad, torch.ones_like(s))


# --- MS-ResNet --------------------------------------------------------------------------------------------------------


def test_the_stem_pools_maxima_or_means() -> None:
    spikes = (torch.rand(3, 2, 4, 9, 9) < 0.3).float()
    for pool, function in (("max", F.max_pool2d), ("mean", F.avg_pool2d)):
        model = create_model("sew_resnet18", num_classes=10, neuron=functools.partial(PSN, T=3), stem_pool=pool)
        assert torch.equal(model.stem_pool(spikes), torch.stack([function(step, 3, 2, 1) for step in spikes]))
    assert torch.equal(
        create_model("sew_resnet18").stem_pool(spikes), F.max_pool2d(spikes.flatten(0, 1), 3, 2, 1).unflatten(0, (3, 2))
    )


def test_membrane_shortcut_is_the_unrolled_sum() -> None:
    # I_L = I_0 + sum of F_l(SN(I_l)); the identity at zero init, bit for bit.
    model = create_model("ms_resnet20", T=3).train()
    stage = [b for b in blocks(model) if isinstance(b.shortcut, nn.Identity)][:3]
    u = torch.randn(3, 2, 16, 8, 8)
    s = model.stem_spike.neuron(u)
    start = u
    for unit in stage:
        s, u = unit(s, u)
        assert torch.equal(u, start)
    assert [type(b) for b in blocks(model)] == [MembraneBlock] * 9


def test_all_convolutions_but_the_stem_take_spikes() -> None:
    for arm, binary in (("membrane", True), ("vanilla", True), ("without_lif", False)):
        model = create_model("ms_resnet20", T=3, shortcut=arm, zero_init=False).train()
        seen: dict[str, Tensor] = {}
        for key, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and "branch" in key:
                module.register_forward_hook(lambda _m, args, _o, key=key, seen=seen: seen.__setitem__(key, args[0]))
        model.pool.register_forward_hook(lambda _m, args, _o, seen=seen: seen.__setitem__("branch.0", args[0]))
        with torch.no_grad():
            model(torch.rand(2, 3, 8, 8))
        first = torch.cat([x.flatten() for key, x in seen.items() if key.endswith("branch.0")])
        second = torch.cat([x.flatten() for key, x in seen.items() if key.endswith("branch.2")])
        assert set(second.unique().tolist()) == {0.0, 1.0}
        assert (set(first.unique().tolist()) == {0.0, 1.0}) == binary


def test_dropout_has_one_mask_for_all_steps() -> None:
    model = create_model("ms_resnet104", counts=(1, 1, 1, 1), T=3)
    dropout = model.head[0]
    x = torch.ones(4, 5, 100)
    kept = dropout.train()(x)
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert 0 < (kept == 0).sum() < kept.numel()
    assert torch.equal(dropout.eval()(x), x)


# --- weights of ordinary ResNets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "depth"), [("sew", 50), ("spiking", 18)])
def test_weights_of_torchvision(kind: str, depth: int) -> None:
    import torchvision

    ann = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=10).eval()
    with torch.no_grad():
        for key, value in ann.state_dict().items():
            if "bn" in key or "downsample.1" in key:
                value.copy_(torch.rand(value.shape) + 0.5)
    model = create_model(
        f"{kind}_resnet{depth}", num_classes=10, neuron=nn.Identity, T=1, pretrained_ann=ann.state_dict()
    )
    # Every weight is in its place: without neurons in ours, and without ReLU in theirs, both compute one function.
    for module in ann.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Identity())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = ann(x)
        torch.testing.assert_close(model.eval()(x)[0], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_weights_from_files(tmp_path: Path) -> None:
    import torchvision
    from safetensors.torch import save_file

    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        model = create_model("sew_resnet18", pretrained_ann=str(tmp_path / name))
        assert torch.equal(model.head.weight, state["fc.weight"])
    # Another number of classes, and blocks of MS-ResNet's first stage, which stride: what fits is taken.
    with pytest.warns(UserWarning, match=r"2 of 122 tensors .* not taken: fc.weight \(1000, 512\), fc.bias"):
        model = create_model("spiking_resnet18", num_classes=10, pretrained_ann=tmp_path / "a.pth")
    assert torch.equal(model.stem.weight, state["conv1.weight"])
    ms = create_model("ms_resnet18", pretrained_ann=state)
    assert torch.equal(ms.blocks[3].branch[2].weight, state["layer2.1.conv2.weight"])
    assert torch.equal(ms.blocks[2].shortcut[0].weight, state["layer2.0.downsample.0.weight"])
    (tmp_path / "no.pth").write_bytes(b"no")
    for path, message in (("none.pth", "there is no file"), ("no.pth", "is no safetensors or torch.save file")):
        with pytest.raises(UsageError, match=message):
            create_model("sew_resnet18", pretrained_ann=tmp_path / path)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="does not hold a state dict"):
        create_model("sew_resnet18", pretrained_ann=tmp_path / "list.pth")
    with pytest.raises(UsageError, match="none of its weights fits this network"):
        load_ann(create_model("sew_resnet_cifar", n=1), {"features.0.weight": torch.zeros(3)})
