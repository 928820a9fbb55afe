"""Three ways of adding a shortcut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.encode import repeat
from spikeloom.errors import UsageError
from spikeloom.layers import (
    COMBINE,
    MembraneBlock,
    NormSpike,
    PadShortcut,
    SEWBlock,
    VanillaBlock,
    basic_branch,
    conv_shortcut,
    stateless,
)
from spikeloom.neurons import IF, LIF
from spikeloom.ops import backend
from spikeloom.record import Recorder

Tracks = Callable[[Tensor, Tensor], float]


def parts(channels: int = 6, out: int | None = None, stride: int = 1) -> tuple[nn.Sequential, NormSpike, nn.Module]:
    out = out or channels
    shortcut = nn.Identity() if out == channels and stride == 1 else PadShortcut(channels, out)
    return basic_branch(channels, out, stride, IF), NormSpike(out, IF), shortcut


def spikes(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float()


def silence(block: nn.Module) -> None:
    nn.init.zeros_(block.spike.norm.weight)  # pyright: ignore
    nn.init.zeros_(block.spike.norm.bias)  # pyright: ignore


def by_hand(block: nn.Module, s: Tensor) -> tuple[Tensor, Tensor]:
    """F(S), the branch through its norm, and the shortcut."""
    conv1, unit, conv2 = block.branch  # pyright: ignore
    return block.spike.norm(conv2(unit.neuron(unit.norm(conv1(s))))), block.shortcut(s)  # pyright: ignore


def test_the_shortcut_runs_behind_the_branch_where_somebody_watches() -> None:
    shortcut = conv_shortcut(6, 12, 2, IF)
    block = SEWBlock(basic_branch(6, 12, 2, IF), NormSpike(12, IF), shortcut).train()
    s = spikes(3, 2, 6, 8, 8)
    alone = block(s)
    with Recorder(block) as record:
        assert torch.equal(block(s), alone)
    assert list(record.spikes) == ["branch.1.neuron", "spike.neuron", "shortcut.1.neuron"]


@pytest.mark.parametrize(("out", "stride"), [(6, 1), (12, 2)])
def test_vanilla_equation(out: int, stride: int) -> None:
    block, s = VanillaBlock(*parts(6, out, stride)).train(), spikes(3, 2, 6, 8, 8)
    f, shortcut = by_hand(block, s)
    o = block(s)
    assert torch.equal(o, IF()(f + shortcut))
    assert 0 < o.sum() < o.numel()


@pytest.mark.parametrize("combine", ["add", "and", "iand", "or"])
@pytest.mark.parametrize(("out", "stride"), [(6, 1), (12, 2)])
def test_sew_equation(out: int, stride: int, combine: str) -> None:
    block, s = SEWBlock(*parts(6, out, stride), combine=combine).train(), spikes(3, 2, 6, 8, 8)
    nn.init.constant_(block.spike.norm.weight, 3.0)
    f, shortcut = by_hand(block, s)
    a = IF()(f)
    assert 0 < a.sum() < a.numel()
    expected = {
        "add": a + shortcut,
        "and": a * shortcut,
        "iand": (1 - a) * shortcut,
        "or": torch.maximum(a, shortcut),
    }[combine]
    assert torch.equal(block(s), expected)


def test_combine_is_not_symmetric_and_not_open() -> None:
    assert COMBINE["iand"](torch.tensor(1.0), torch.tensor(0.0)) == 0
    assert COMBINE["iand"](torch.tensor(0.0), torch.tensor(1.0)) == 1
    with pytest.raises(UsageError, match="unknown combine function 'nor'; did you mean or"):
        SEWBlock(*parts(), combine="nor")


@pytest.mark.parametrize(("out", "stride"), [(6, 1), (12, 2)])
def test_membrane_equation(out: int, stride: int) -> None:
    block, u = MembraneBlock(*parts(6, out, stride)).train(), torch.randn(3, 2, 6, 8, 8)
    s = LIF()(u)
    f, _ = by_hand(block, s)
    next_s, next_u = block(s, u)
    torch.testing.assert_close(next_u, f + block.shortcut(u), rtol=1e-5, atol=1e-5)  # normalised and added in one op
    assert torch.equal(next_s, IF()(next_u))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zero_init_is_the_identity(training: bool) -> None:
    s, u = spikes(3, 2, 6, 8, 8), torch.randn(3, 2, 6, 8, 8)
    sew, membrane, vanilla = (make(*parts()).train(training) for make in (SEWBlock, MembraneBlock, VanillaBlock))
    for block in (sew, membrane, vanilla):
        silence(block)
    assert torch.equal(sew(s), s)
    assert torch.equal(membrane(s, u)[1], u)
    # Vanilla sends the sum through a neuron: what is no spike train does not come through.
    assert not torch.equal(vanilla(u), u)


def test_vanilla_zero_init_with_lif_is_not_the_identity() -> None:
    # Even spikes: LIF with input decay needs two ones in a row and more.
    block = VanillaBlock(basic_branch(6, 6, 1, LIF), NormSpike(6, LIF), nn.Identity()).eval()
    silence(block)
    s = spikes(3, 2, 6, 8, 8)
    assert not torch.equal(block(s), s)


def test_sew_counts_spikes() -> None:
    s, blocks = spikes(4, 2, 6, 8, 8), nn.ModuleList(SEWBlock(*parts()) for _ in range(4)).train()
    seen = 0.0
    for b, block in enumerate(blocks, start=1):
        nn.init.constant_(block.spike.norm.weight, 3.0)  # pyright: ignore
        s = block(s)
        assert torch.equal(s, s.round())
        assert s.min() >= 0
        assert s.max() <= b + 1
        seen = max(seen, s.max().item())
    assert seen >= 3


# --- the shortcut without parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize(("channels", "out"), [(16, 32), (4, 8), (3, 6), (4, 9)])
def test_pad_shortcut_layout(channels: int, out: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, channels, *size)
    y = PadShortcut(channels, out)(x)
    assert y.shape == (2, 3, out, (size[0] + 1) // 2, (size[1] + 1) // 2)
    before = (out - channels) // 2
    assert torch.equal(y[:, :, before : before + channels], x[..., ::2, ::2])
    assert not y[:, :, :before].any()
    assert not y[:, :, before + channels :].any()
    assert not list(PadShortcut(channels, out).parameters())


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_pad_shortcut_gradient(size: tuple[int, int], order: torch.memory_format) -> None:
    x = torch.randn(3, 6, *size).contiguous(memory_format=order).requires_grad_()
    shortcut = PadShortcut(6, 11)
    y = shortcut(x[None])[0]
    assert y.is_contiguous(memory_format=order)
    grad = torch.randn(y.shape)  # in its own order
    y.backward(grad)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=order)
    wanted = torch.zeros_like(x)
    wanted[:, :, ::2, ::2] = grad[:, 2:8]
    assert torch.equal(x.grad, wanted)
    exported = torch.export.export(shortcut, (x.detach()[None],))
    assert torch.equal(exported.module()(x[None])[0], y)


def test_pad_shortcut_is_differentiable_twice_in_the_reference() -> None:
    x = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    with backend("reference"):
        (grad,) = torch.autograd.grad(PadShortcut(4, 8)(x).pow(3).sum(), x, create_graph=True)
        grad.sum().backward()
    wanted = torch.zeros_like(x)
    wanted[..., ::2, ::2] = 6 * x.detach()[..., ::2, ::2]
    torch.testing.assert_close(x.grad, wanted)


def test_pad_shortcut_of_the_report() -> None:
    # C_out / 4 zero channels before and after.
    assert PadShortcut(16, 32).padding == (8, 8)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(PadShortcut(16, 32)(repeat(x, 3))[1, :, 8:24], x[:, :, ::2, ::2])


@pytest.mark.parametrize("make", [VanillaBlock, SEWBlock])
def test_stage_change_fits_odd_maps(make: Callable[..., nn.Module]) -> None:
    assert make(*parts(4, 8, 2))(spikes(2, 3, 4, 7, 9)).shape == (2, 3, 8, 4, 5)


@pytest.mark.parametrize("block", [SEWBlock, VanillaBlock])
@pytest.mark.parametrize(("out", "stride"), [(16, 1), (32, 2)])
def test_a_shortcuts_gradient_joins_inside_the_convolution(
    native: Any, tracks: Tracks, monkeypatch: pytest.MonkeyPatch, out: int, stride: int, block: type[SEWBlock]
) -> None:
    module = block(*parts(16, out, stride)).to(memory_format=torch.channels_last).train()
    x = spikes(3, 16, 33, 32, 16).movedim(-1, 2)  # channels-last, and work enough for the native convolution
    calls: list[str] = []
    through = stateless.spike_conv_through

    def counted(*arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        calls.append("call")
        return through(*arguments, **settings)

    monkeypatch.setattr(stateless, "spike_conv_through", counted)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        s = x.clone().requires_grad_()
        module(s).square().mean().backward()
        return [p.grad.clone() for p in (s, *module.parameters()) if p.grad is not None]

    found = gradients()
    assert len(calls) == 1
    assert len(found) == 7
    seen: list[nn.Module] = []
    hook = module.branch[0].register_forward_hook(lambda layer, *_: seen.append(layer))  # pyright: ignore
    watched = gradients()
    hook.remove()
    assert len(calls) == 1
    assert seen == [module.branch[0]]  # pyright: ignore
    # Watched, the same kernels run, and autograd adds.
    for a, b in zip(watched, found, strict=True):
        assert tracks(a, b) < 1e-5
