"""bfloat16 where the processor has none: float32's products, rounded to bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spikeloom.layers import Conv1d, Conv2d, Linear, channels_last
from spikeloom.layers.spiking_attention import AttentionProduct
from spikeloom.ops import _bf16
from spikeloom.ops._layout import in_channels_last
from spikeloom.ops.conv import spike_conv


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bf16, "bfloat16_is_emulated", lambda: True)


LAYERS = [
    (Conv1d(5, 7, 3), (2, 3, 5, 9)),
    (Conv2d(6, 4, 3, groups=2), (2, 3, 6, 5, 5)),
    (Conv2d(6, 4, 1, bias=False), (2, 3, 6, 5, 5)),
    (Linear(11, 3), (2, 3, 11)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_autocast_rounds_what_float32_gives(emulated: None, layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).requires_grad_()
    wanted = layer(x)
    grad = torch.randn_like(wanted).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    for a, b in zip(
        torch.autograd.grad(found, [x, *layer.parameters()], grad.bfloat16()),
        torch.autograd.grad(wanted, [x, *layer.parameters()], grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_layer_of_bfloat16_weights_works_too(emulated: None) -> None:
    layer, x = Linear(11, 3).bfloat16(), torch.randn(2, 3, 11).bfloat16()
    wanted = F.linear(x.float(), layer.weight.float(), layer.bias.float()).bfloat16()
    assert torch.equal(layer(x), wanted)


def test_attention_rounds_once(emulated: None) -> None:
    q, k, v = (torch.rand(2, 1, 8, 20, 20).round() for _ in range(3))  # sums above 256, bfloat16's last odd integer
    product = AttentionProduct(heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(q, k, v), product(q.double(), k.double(), v.double()).bfloat16())


NARROW = [
    (Conv1d(32, 64, 3, stride=2, padding=1, bias=False), (2, 4, 32, 1)),
    (Conv2d(32, 64, 3, stride=2, padding=1, bias=False), (2, 4, 32, 4, 1)),
    (Conv2d(32, 64, 3, stride=4, padding=(1, 2), bias=False), (2, 4, 32, 4, 3)),
    (Conv2d(32, 64, 5, stride=(1, 3), padding=2, groups=4, bias=False), (1, 4, 32, 1, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), NARROW)
@pytest.mark.parametrize("last", [False, True])
def test_inputs_narrower_than_the_stride(layer: nn.Module, shape: tuple[int, ...], last: bool) -> None:
    """There oneDNN's gradient of the weight holds what lay in memory (docs/notes/onednn-weight-gradients.md)."""
    x = torch.randn(shape).bfloat16().float()
    x = channels_last(x) if last and x.dim() == 5 else x
    weight = next(layer.parameters())
    weight.data = weight.data.bfloat16().float()
    wanted = layer(x)
    grad = torch.randn_like(wanted).bfloat16()
    (right,) = torch.autograd.grad(wanted, weight, grad.float())
    for _ in range(10):
        for size in (64, 512, 4096, 1 << 15):
            torch.full((size,), 3e4, dtype=torch.bfloat16)  # freed: the next gradient may find it
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
        (gradient,) = torch.autograd.grad(found, weight, grad)
        torch.testing.assert_close(gradient, right, rtol=1e-2, atol=1e-2)


def test_the_op_where_the_input_is_narrower_than_the_stride() -> None:
    x = in_channels_last(torch.randn(4, 32, 6, 1).bfloat16())
    weight = torch.randn(64, 32, 3, 3).bfloat16().requires_grad_()
    y = spike_conv(x, weight, stride=2, padding=1, weight_gradient="onednn")
    grad = torch.randn_like(y)
    right = torch.ops.aten.convolution_backward(
        grad.float(), x.float(), weight.float(), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    for _ in range(10):
        for size in (64, 512, 4096, 1 << 15):
            torch.full((size,), 3e4, dtype=torch.bfloat16)
        (gradient,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
        torch.testing.assert_close(gradient.float(), right, rtol=1e-2, atol=1e-2)


def test_other_precisions_are_left_alone(emulated: None) -> None:
    seen: list[torch.dtype] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x

    _bf16.bf16_product(watch, torch.ones(1))
    _bf16.bf16_product(watch, torch.ones(1).double())
    with torch.autocast("cpu", torch.float16):
        _bf16.bf16_product(watch, torch.ones(1))
    assert seen == [torch.float32, torch.float64, torch.float32]
