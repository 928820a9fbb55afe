"""Convolutions of spikes against PyTorch's, all ways, shapes, types and instruction levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.layers import Conv2d
from spikeloom.ops import _dispatch, backend
from spikeloom.ops import conv as module
from spikeloom.ops.conv import Pass, density, spike_conv, spike_conv_through, takes

Tracks = Callable[[Tensor, Tensor], float]
Ways = tuple[Pass, Pass, Pass]
SPARSE: Ways = ("sparse", "sparse", "onednn")
WINOGRAD: Ways = ("winograd", "winograd", "winograd")
STRIDED: Ways = ("onednn", "strided", "strided")


def spikes(*shape: int, share: float = 0.3, most: int = 3) -> Tensor:
    """Channels-last integers, zero but for a share."""
    n, c, h, w = shape
    x = (torch.rand(n, h, w, c) < share) * torch.randint(1, most + 1, (n, h, w, c)).float()
    return x.permute(0, 3, 1, 2)


def results(x: Tensor, weight: Tensor, stride: int, padding: int, ways: Ways | None) -> list[Tensor]:
    """The output, and the gradients of input and weight; of PyTorch in float64 without `ways`."""
    if ways is None:
        x, weight = x.double(), weight.double()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    if ways is None:
        y = F.conv2d(x, weight, None, stride, padding)
    else:
        y = spike_conv(x, weight, stride, padding, *ways)
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    assert weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


def compare(tracks: Tracks, x: Tensor, weight: Tensor, stride: int, padding: int, ways: Ways) -> None:
    found, wanted = results(x, weight, stride, padding, ways), results(x, weight, stride, padding, None)
    for name, a, b in zip(("output", "input", "weight"), found, wanted, strict=True):
        # Of bfloat16, the result's own rounding.
        assert tracks(a, b) < (1e-5 if x.dtype == torch.float32 else 5e-3), name


SHAPES = ((1, 1, 1, 7, 9), (3, 16, 3, 8, 5), (17, 5, 2, 33, 4), (64, 40, 7, 4, 4))
FORMS = [(3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 1, 0), (1, 2, 0), (2, 2, 0), (2, 1, 1), (3, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_sparse_at_odd_sizes(native: Any, tracks: Tracks, form: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernel, stride, padding = form
    for level in native.levels():
        native.set_level(level)
        for channels, out, images, height, width in SHAPES:
            weight = torch.randn(out, channels, kernel, kernel).to(dtype)
            compare(tracks, spikes(images, channels, height, width).to(dtype), weight, stride, padding, SPARSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_minimal_at_odd_sizes(native: Any, tracks: Tracks, padding: int, dtype: torch.dtype) -> None:
    for level in native.levels():
        native.set_level(level)
        for channels, out, images, height, width in ((16, 16, 1, 3, 9), (16, 48, 3, 33, 8), (64, 32, 21, 4, 6)):
            weight = torch.randn(out, channels, 3, 3).to(dtype)
            compare(tracks, spikes(images, channels, height, width).to(dtype), weight, 1, padding, WINOGRAD)


@pytest.mark.parametrize(("dtype", "images"), [(torch.float32, 70), (torch.bfloat16, 140)])
def test_results_that_go_past_the_caches(native: Any, tracks: Tracks, dtype: torch.dtype, images: int) -> None:
    """Tensors of over 4 MB, whose tiles and lines of memory are not all whole."""
    weight = torch.randn(16, 16, 3, 3).to(dtype)
    x = spikes(images, 16, 33, 30).to(dtype)
    assert x.nbytes > 4 << 20
    for level in native.levels():
        native.set_level(level)
        compare(tracks, x, weight, 1, 1, WINOGRAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [(3, 2, 1), (3, 2, 0), (2, 2, 0), (1, 2, 0), (3, 3, 2), (1, 3, 0), (3, 4, 1)])
def test_strided_at_odd_sizes(native: Any, tracks: Tracks, form: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernel, stride, padding = form
    for level in native.levels():
        native.set_level(level)
        for channels, out, images, height, width in ((16, 16, 1, 3, 9), (16, 48, 3, 33, 8), (48, 16, 21, 4, 6)):
            weight = torch.randn(out, channels, kernel, kernel).to(dtype)
            compare(tracks, spikes(images, channels, height, width).to(dtype), weight, stride, padding, STRIDED)
        # Bands of rows.
        weight = torch.randn(32, 32, kernel, kernel).to(dtype)
        compare(tracks, spikes(2, 32, 41, 70).to(dtype), weight, stride, padding, STRIDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ways", "stride"), [(SPARSE, 1), (SPARSE, 2), (WINOGRAD, 1), (STRIDED, 2)])
def test_what_comes_back_beside_a_convolution_is_added(
    native: Any, tracks: Tracks, monkeypatch: pytest.MonkeyPatch, ways: Ways, stride: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(module, "_rule", lambda x, weight, stride: ways)
    for images, height, width in ((1, 3, 9), (5, 13, 8)):
        x, weight = spikes(images, 16, height, width).to(dtype), torch.randn(32, 16, 3, 3).to(dtype)
        beside = torch.randn(x.shape).to(dtype)  # in another layout than x

        def run(op: Callable[..., tuple[Tensor, Tensor]], x: Tensor, weight: Tensor) -> list[Tensor]:
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y, again = op(x, weight)
            assert torch.equal(again, x)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
            torch.autograd.backward([y, again * again], [grad.to(y.dtype), beside.to(y.dtype)])  # noqa: B023
            assert x.grad is not None
            assert weight.grad is not None
            return [y.detach(), x.grad, weight.grad]

        found = run(lambda x, w: spike_conv_through(x, w, stride, 1), x, weight)
        wanted = run(lambda x, w: (F.conv2d(x, w, None, stride, 1), x), x.double(), weight.double())
        for a, b in zip(found, wanted, strict=True):
            assert tracks(a, b) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("ways", [SPARSE, WINOGRAD])
@pytest.mark.parametrize("x", [torch.zeros(2, 16, 9, 8), torch.ones(2, 16, 9, 8), torch.randn(2, 16, 9, 8)])
def test_silent_full_and_real_valued_inputs(native: Any, tracks: Tracks, x: Tensor, ways: Ways) -> None:
    x = x.to(memory_format=torch.channels_last)
    compare(tracks, x, torch.randn(16, 16, 3, 3), 1, 1, ways)


def test_other_memory_layouts(native: Any, tracks: Tracks) -> None:
    weight = torch.randn(16, 16, 3, 3).to(memory_format=torch.channels_last)
    for x in (spikes(4, 16, 9, 8).contiguous(), spikes(8, 16, 9, 8)[::2], spikes(4, 16, 9, 16)[..., ::2]):
        compare(tracks, x, weight, 1, 1, WINOGRAD)
        compare(tracks, x, weight, 1, 1, SPARSE)


@pytest.mark.parametrize(("ways", "stride"), [(SPARSE, 1), (WINOGRAD, 1), (STRIDED, 2)])
def test_threads_and_unwritten_memory(native: Any, dirty_memory: None, ways: Ways, stride: int) -> None:
    x, weight = spikes(40, 32, 12, 12), torch.randn(32, 32, 3, 3)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(results(x, weight, stride, 1, ways))
    for one, two, again in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
        assert torch.equal(two, again)


def test_the_rule_follows_what_fires(native: Any) -> None:
    weight = torch.randn(32, 32, 3, 3)
    assert density(spikes(64, 32, 8, 8, share=0.25)) == pytest.approx(0.25, abs=0.02)
    # Rows of all heights are seen, also where every 12th or 14th image's first row alone would make up the sample.
    for images, height in ((448, 7), (384, 32)):
        half = torch.zeros(images, 16, height, 32).to(memory_format=torch.channels_last)
        half[:, :, : height // 2] = 1
        assert density(half) == pytest.approx(height // 2 / height, abs=0.1)
    rule = module._rule  # pyright: ignore[reportPrivateUsage]
    for level in native.levels():
        native.set_level(level)
        if level == "baseline":
            assert rule(spikes(8, 32, 8, 8, share=0.05), weight, 1) == ("onednn",) * 3
            continue
        assert rule(spikes(8, 32, 8, 8, share=0.05), weight, 1)[:2] == ("sparse", "sparse")
        assert rule(torch.randn(8, 32, 8, 8), weight, 1) == ("winograd",) * 3
        strided = rule(torch.randn(8, 32, 8, 8), weight, 2)
        assert strided == (("onednn", "strided", "strided") if level == "avx2" else ("onednn",) * 3)
        for share, ways in ((0.1, ("sparse", "sparse", "onednn")), (0.6, ("onednn",) * 3)):
            assert rule(spikes(64, 64, 8, 8, share=share), torch.randn(64, 64, 1, 1), 1) == ways


def test_small_work_and_other_layouts_stay_with_pytorch() -> None:
    weight = torch.randn(64, 64, 3, 3)
    large = spikes(64, 64, 16, 16)
    assert takes(large, weight, 1, 1)
    assert not takes(large[:1], weight, 1, 1)
    assert not takes(large.contiguous(), weight, 1, 1)
    assert not takes(large.double(), weight, 1, 1)
    assert not takes(large, torch.randn(64, 64, 5, 5), 1, 2)
    assert takes(large, torch.randn(64, 64, 1, 1), 1, 0)
    assert not takes(large, torch.randn(64, 64, 1, 1), 2, 0)
    tiny = spikes(4096, 64, 2, 2)
    assert takes(tiny, weight, 1, 1)
    assert not takes(tiny, weight, 1, 0)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_layer_uses_it(
    native: Any, tracks: Tracks, monkeypatch: pytest.MonkeyPatch, precision: str, kernel: int
) -> None:
    layer = Conv2d(64, 128, kernel, padding=kernel // 2, bias=kernel == 1)
    x = spikes(32, 64, 16, 16, share=0.1).unflatten(0, (4, 8))
    calls: list[str] = []
    whole = spike_conv

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        calls.append("call")
        return whole(*arguments, **settings)

    monkeypatch.setattr("spikeloom.layers.stateless.spike_conv", counted)

    def run() -> list[Tensor]:
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = layer(inputs)
        y.float().square().mean().backward()
        assert inputs.grad is not None
        assert layer.weight.grad is not None
        rest = [] if layer.bias is None else [layer.bias.grad.clone()]
        return [y.detach(), inputs.grad, layer.weight.grad.clone(), *rest]

    found = run()
    assert calls
    with backend("reference"):
        wanted = run()
    assert len(calls) == 1
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        strides = zip(a.shape, a.stride(), b.stride(), strict=True)
        assert all(mine == theirs for size, mine, theirs in strides if size > 1)
        assert tracks(a, b) < (2e-5 if precision == "float32" else 2e-2)


def test_export_compile_and_profiler(native: Any, tracks: Tracks) -> None:
    layer = Conv2d(64, 64, 3, padding=1, bias=False)
    x = spikes(32, 64, 16, 16, share=0.1).unflatten(0, (4, 8))
    wanted = layer(x)
    exported = torch.export.export(layer, (x,))
    assert not any("spikeloom" in str(node.target) for node in exported.graph.nodes)
    assert tracks(exported.module()(x), wanted) < 1e-5
    assert tracks(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted) < 1e-5
    with torch.profiler.profile() as profiler:
        layer(x).sum().backward()
    assert any("spike_conv_backward" in event.key for event in profiler.key_averages())


def test_the_custom_op_is_one() -> None:
    if _dispatch.native is None:
        pytest.skip("spikeloom is installed WITHOUT its native kernels")
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    inputs = (spikes(2, 16, 9, 8).requires_grad_(), weight, 1, 1, " ".join(WINOGRAD))
    torch.library.opcheck(torch.ops.spikeloom.spike_conv, inputs)
