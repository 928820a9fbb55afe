"""Pooling of maxima: equal to PyTorch's, ties and NaN included, at odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.layers import MaxPool2d
from spikeloom.ops.pool import max_pool, takes

# images, channels, height, width
SHAPES = ((2, 1, 5, 7), (3, 7, 4, 2), (1, 16, 3, 3), (5, 21, 9, 6), (2, 130, 3, 8))
# kernel, stride, padding
WINDOWS = [(2, 2, 0), (3, 2, 1), (2, 1, 1), (3, 3, 0), (2, 3, 0), (1, 2, 0)]


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def results(x: Tensor, grad: Tensor | None, run: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_pytorch(native: Any, window: tuple[int, int, int], dtype: torch.dtype) -> None:
    kernel, stride, padding = window
    for level in native.levels():
        native.set_level(level)
        for shape in SHAPES:
            for x in ((torch.rand(shape) < 0.3).to(dtype), torch.randn(shape).to(dtype), torch.zeros(shape).to(dtype)):
                x = last(x)
                if min(shape[2:]) + 2 * padding < kernel:  # larger than the image
                    assert not takes(x, *window)
                    continue
                assert takes(x, *window)
                y, found, grad = results(x, None, lambda x: max_pool(x, kernel, stride, padding))
                wanted_y, wanted, _ = results(x, grad, lambda x: F.max_pool2d(x, kernel, stride, padding))
                assert y.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(y, wanted_y, rtol=0, atol=0)
                # Up to four gradients meet in one input: sums of one rounding here.
                tolerance = 1e-6 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_nan_wins_as_in_pytorch(native: Any) -> None:
    x = last(torch.randn(2, 5, 6, 6))
    x[0, 1, 2, 3] = x[1, :, 0, 0] = float("nan")
    x[1, 2, 5, 5] = float("-inf")
    for level in native.levels():
        native.set_level(level)
        y, found, grad = results(x, None, lambda x: max_pool(x, 3, 2, 1))
        wanted_y, wanted, _ = results(x, grad, lambda x: F.max_pool2d(x, 3, 2, 1))
        torch.testing.assert_close(y, wanted_y, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(found, wanted)


def test_the_custom_op_obeys_the_rules() -> None:
    x = last(torch.randn(2, 3, 5, 5))
    torch.library.opcheck(torch.ops.spikeloom.max_pool.default, (x.requires_grad_(), 3, 2, 1, True))


@pytest.mark.parametrize("layer", [MaxPool2d(3, 2, 1), MaxPool2d(2)])
def test_layer_takes_it_where_it_can(native: Any, layer: MaxPool2d) -> None:
    x = last(torch.randn(6, 4, 8, 8)).unflatten(0, (3, 2)).requires_grad_()
    assert "max_pool" in type(layer(x).grad_fn.next_functions[0][0]).__name__
    dense = torch.randn(3, 2, 4, 8, 8, requires_grad=True)  # channels first
    assert "MaxPool2DWithIndices" in type(layer(dense).grad_fn.next_functions[0][0]).__name__
    torch.testing.assert_close(layer(x), layer(x.detach().contiguous()))


def test_what_pytorch_refuses_is_left_to_it() -> None:
    x = last(torch.randn(2, 4, 3, 3)).unsqueeze(0)
    with pytest.raises(RuntimeError, match="pad should be"):
        MaxPool2d(2, 2, 2)(x)
    with pytest.raises(RuntimeError, match=r"(?i)output size is too small"):
        MaxPool2d(5)(x)
    assert MaxPool2d(2, ceil_mode=True)(x).shape == (1, 2, 4, 2, 2)
    assert MaxPool2d((2, 1))(x).shape == (1, 2, 4, 1, 3)
