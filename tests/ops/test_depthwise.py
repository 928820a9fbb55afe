"""Convolution of every channel by itself: against PyTorch in float64, at odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.layers import Conv2d
from spikeloom.ops import _dispatch
from spikeloom.ops.depthwise import depthwise_conv, takes

Tracks = Callable[[Tensor, Tensor], float]

# channels, images, height, width
SHAPES = ((1, 2, 5, 7), (7, 3, 4, 1), (16, 1, 1, 1), (8, 2, 18, 21), (21, 5, 6, 3), (72, 2, 3, 9), (130, 3, 2, 2))
# kernel, stride, padding
FORMS = [
    ((3, 3), 1, (1, 1)),
    ((3, 3), 2, (1, 1)),
    ((5, 5), 2, (2, 2)),
    ((5, 1), 1, (2, 0)),
    ((1, 5), 1, (0, 2)),
    ((2, 2), 1, (1, 1)),
    ((3, 3), 3, (2, 2)),
    ((1, 1), 2, (0, 0)),
]


def results(x: Tensor, weight: Tensor, run: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
    x, weight = (each.detach().to(dtype).requires_grad_() for each in (x, weight))
    y = run(x, weight)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_equals_pytorch(native: Any, tracks: Tracks, form: Any, dtype: torch.dtype) -> None:
    kernel, stride, padding = form
    for level in native.levels():
        native.set_level(level)
        for channels, images, height, width in SHAPES:
            if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
                continue
            x = torch.randn(images, height, width, channels).permute(0, 3, 1, 2).to(dtype)
            weight = torch.randn(channels, 1, *kernel).to(dtype)
            found = results(x, weight, lambda x, w: depthwise_conv(x, w, stride, padding), dtype)
            wanted = results(x, weight, lambda x, w: F.conv2d(x, w, None, stride, padding, 1, w.shape[0]), torch.double)
            for name, a, b in zip(("output", "input", "weight"), found, wanted, strict=True):
                assert a.shape == b.shape
                assert tracks(a, b) < (1e-5 if dtype == torch.float32 else 5e-3), (name, channels, level)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_to_the_bit(native: Any, threads: int) -> None:
    x = torch.randn(64, 9, 9, 40).permute(0, 3, 1, 2)
    weight = torch.randn(40, 1, 3, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (
            results(x, weight, lambda x, w: depthwise_conv(x, w, 1, (1, 1)), torch.float32) for _ in range(2)
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_left_out_where_nobody_wants_them(native: Any) -> None:
    x, weight = torch.randn(2, 3, 3, 8).permute(0, 3, 1, 2), torch.randn(8, 1, 3, 3).requires_grad_()
    depthwise_conv(x, weight, 1, (1, 1)).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_what_it_takes() -> None:
    x, weight = torch.randn(2, 3, 3, 8).permute(0, 3, 1, 2), torch.randn(8, 1, 3, 3)
    assert takes(x, weight, (0, 0))
    assert not takes(x.contiguous(), weight, (0, 0))
    assert not takes(x.double(), weight.double(), (0, 0))
    assert not takes(x, torch.randn(8, 2, 3, 3), (0, 0))
    assert not takes(x[:0], weight, (0, 0))
    assert takes(x, torch.randn(8, 1, 5, 1), (1, 0))


def test_a_filter_larger_than_the_image_is_an_error(native: Any) -> None:
    layer = Conv2d(8, 8, 4, groups=8)
    for x in (torch.randn(1, 2, 8, 3, 3), torch.randn(2, 3, 3, 8).permute(0, 3, 1, 2).unsqueeze(0)):
        with pytest.raises(RuntimeError, match="Kernel size"):
            layer(x)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_uses_it(native: Any, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    calls: list[str] = []
    kernel = native.depthwise_forward
    monkeypatch.setattr(_dispatch.native, "depthwise_forward", lambda **a: (calls.append("forward"), kernel(**a))[1])
    layer = Conv2d(8, 8, (5, 1), padding=(2, 0), groups=8, bias=bias)
    x = torch.randn(2, 3, 8, 6, 4)
    wanted = layer(x)
    assert not calls
    last = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 3))
    torch.testing.assert_close(layer(last), wanted)
    assert calls == ["forward"]
