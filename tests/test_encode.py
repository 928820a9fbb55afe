"""Encodings: shapes, values, and no copies."""

from __future__ import annotations

import pytest
import torch

from spikeloom.encode import as_sequence, repeat


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 4)])
def test_repeat(T: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    sequence = repeat(x, T)
    assert sequence.shape == (T, *shape)
    for step in sequence:
        assert torch.equal(step, x)
    assert sequence.data_ptr() == x.data_ptr()
    assert sequence.stride(0) == 0 or T == 1


def test_repeat_adds_gradients_over_time() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(5, 2, 3)
    (repeat(x, 5) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0))


@pytest.mark.parametrize("T", [0, -1])
def test_repeat_needs_a_step(T: int) -> None:
    with pytest.raises(ValueError, match=rf"^T must be at least 1, got {T}$"):
        repeat(torch.zeros(2), T)


def test_as_sequence() -> None:
    image, sequence = torch.randn(2, 3, 4, 4), torch.randn(5, 2, 3, 4, 4)
    assert torch.equal(as_sequence(image, 6, dims=4), repeat(image, 6))
    # A sequence has its own number of steps.
    assert as_sequence(sequence, 6, dims=4) is sequence


@pytest.mark.parametrize("dims", [1, 3, 6])
def test_as_sequence_refuses_other_shapes(dims: int) -> None:
    x = torch.zeros((2,) * dims)
    with pytest.raises(ValueError, match=r"a batch of 4 axes or a sequence of 5, got shape \(2") as info:
        as_sequence(x, 6, dims=4)
    assert str(tuple(x.shape)) in str(info.value)
