"""Weights of 8 bits: the integers of a network in PyTorch, to the bit, in whichever of the kernels' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_networks import Graph, lively, shortened
from torch import nn

from spikeloom import Stream, create_model
from spikeloom.deploy import Engine, compile, load, quantized
from spikeloom.deploy.engine import pack
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear
from spikeloom.neurons import LIF, MLF
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]

SHORTENED = {"report_sew_resnet34": 2, "ghostnet_dfc": 1}

# Of all that the kernels have: values above one, filters of one channel each, lists of single places, no spikes at all.
INTEGERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "report_sew_resnet34": ({"T": 3}, (3, 20, 20)),
    "ghostnet_dfc": ({"T": 2}, (3, 32, 32)),
    "tdbn_resnet19": ({"T": 1}, (3, 16, 16)),
    "spikingformer_4_256": ({"T": 2, "channels": 256, "heads": 2, "depth": 1}, (3, 32, 32)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options, shape = INTEGERS[name]
    x = torch.rand(3, *shape)
    model = create_model(name, **options)
    model = lively(shortened(model, SHORTENED[name]) if name in SHORTENED else model, x)
    twin = quantized(model, x)
    engine = compile(model, x, tune=False, weights="int8")
    with torch.no_grad():
        expected = twin(x)
    assert expected.abs().max() > 0, "a silent network shows nothing"
    assert torch.equal(engine(x), expected)
    for other in (engine.with_ways("dense"), engine.tuned(x, portable=False)):
        assert torch.equal(other(x), expected), "whatever the way"
    assert {packed.weight.dtype for packed in engine._packed.values()} == {torch.float32, torch.int16}
    monkeypatch.setattr(pack, "FAR", 0)
    far = Engine(engine._plan, engine._tensors)
    assert torch.int8 in {packed.weight.dtype for packed in far._packed.values()}
    assert torch.equal(far(x), expected)
    stepping, stream = engine.stream(), Stream(twin)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(stepping(x), stream(x.unsqueeze(0)))
    engine.save(tmp_path / "integers")
    assert torch.equal(load(tmp_path / "integers")(x), expected)
    floats = 4 * sum(p.numel() for p in model.parameters())
    assert (tmp_path / "integers").stat().st_size < 0.35 * floats, "8 bits a weight, beside biases and the plan"


# Few and many channels, filters of one channel each, and lists of single places.
SILENT = [(16, 3, 1), (40, 3, 1), (40, 3, 40), (136, 1, 1), (264, 3, 1)]


@pytest.mark.parametrize(("channels", "kernel", "groups"), SILENT)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("level", [] if _dispatch.native is None else _dispatch.native.levels())
@torch.no_grad()
def test_images_without_spikes_beside_others(level: str, weights: Any, channels: int, kernel: int, groups: int) -> None:
    """Of each image first all steps have spikes, then some, then none; what comes by the shortcut goes on."""
    model = Graph(
        lambda m, x: m.head(m.pool(m.fire(m.conv(m.spikes(m.encode(x))) + m.side(x)))),
        encode=Conv2d(3, channels, 3, padding=1, bias=False),
        spikes=LIF(v_threshold=0.5),
        conv=Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups),
        side=Conv2d(3, channels, 3, padding=1),
        fire=LIF(),
        pool=GlobalAvgPool(),
        head=Linear(channels, 5),
    ).eval()
    for p in model.parameters():
        p.copy_(torch.randint(-4, 5, p.shape) / 8)  # sums of these are the same in every order
    x = torch.randint(-2, 3, (3, 4, 3, 6, 7)) / 4
    x[1:, 1], x[:, 2] = 0.0, 0.0
    _dispatch.native.set_level(level)
    try:
        engine = compile(model, x, tune=False, weights=weights)
        together, alone = engine(x), torch.cat([engine(x[:, n : n + 1]) for n in range(4)], 1)
        expected = engine.with_ways("dense")(x)
    finally:
        _dispatch.native.set_level(_dispatch.native.levels()[-1])
    assert expected[:, 2].any()
    assert torch.equal(together, expected)
    assert torch.equal(alone, expected)


@pytest.mark.parametrize("level", [] if _dispatch.native is None else _dispatch.native.levels())
@torch.no_grad()
def test_integers_move_to_32_bits_before_16_overflow(level: str) -> None:
    _dispatch.native.set_level(level)
    try:
        two_levels = MLF(v_threshold=(0.5, 1.5))  # inputs of up to 2, in smaller groups of 16-bit sums
        for neuron, channels, kernel in ((LIF(), 70, 3), (LIF(), 600, 3), (LIF(), 600, 1), (two_levels, 70, 3)):
            conv = Conv2d(channels, 70, kernel, padding=kernel // 2)
            conv.weight.uniform_(0.9, 0.99)
            model = nn.Sequential(neuron, conv, LIF(v_threshold=50.0), GlobalAvgPool(), Linear(70, 3))
            x = 3 * torch.ones(2, 2, channels, 5, 5)  # all fire: the largest sums that there can be
            engine = compile(model, x, tune=False, weights="int8")
            (packed,) = (packed for packed in engine._packed.values() if packed.widen is not None)
            assert packed.widen is not None
            assert packed.widen.any()
            assert torch.equal(engine(x), quantized(model, x)(x))
    finally:
        _dispatch.native.set_level(_dispatch.native.levels()[-1])


@torch.no_grad()
def test_weights_become_their_nearest_integers() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(Linear(50, 40), LIF(), Linear(40, 7))
    model[2].weight[0] = 0.0
    twin = quantized(model, torch.rand(2, 3, 50))
    for before, after in ((model[0], twin[0]), (model[2], twin[2])):
        torch.testing.assert_close(before.bias, after.bias, rtol=0, atol=2.0**-20)
        for row, rounded in zip(before.weight, after.weight, strict=True):
            widest = 2.0 ** torch.log2(row.abs().max().clamp(min=1e-20) / 127).ceil()
            errors = [((row / g).round().clamp(-127, 127) * g - row).square().sum() for g in (widest, widest / 2)]
            assert (rounded - row).square().sum() <= min(errors) * (1 + 1e-6)
            assert len(set((rounded / (widest / 2)).tolist())) <= 255
            assert torch.equal((rounded / (widest / 2)).round() * (widest / 2), rounded)
    assert not twin[2].weight[0].any()
