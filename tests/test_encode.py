"""Encodings: shapes, values, and no copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spikeloom import encode
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


# --- codes of intensities ---------------------------------------------------------------------------------------------


def test_poisson_fires_at_its_rate() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).repeat(400, 1)
    spikes = encode.poisson(x, 50, torch.Generator().manual_seed(0))
    assert spikes.shape == (50, 400, 3)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert spikes.mean((0, 1)).tolist() == pytest.approx([0.0, 0.25, 1.0], abs=0.01)
    assert torch.equal(spikes, encode.poisson(x, 50, torch.Generator().manual_seed(0)))
    assert not torch.equal(spikes[0], spikes[1])  # a draw of its own at every step


def test_latency_is_one_spike_the_sooner_the_larger() -> None:
    spikes = encode.latency(torch.tensor([[1.0, 0.5, 0.26, 0.0]]), 5)
    assert spikes.shape == (5, 1, 4)
    assert spikes.sum(0).tolist() == [[1.0] * 4]
    assert spikes.argmax(0).tolist() == [[0, 2, 3, 4]]


def test_delta_fires_on_changes() -> None:
    x = torch.tensor([1.0, 1.0, 3.0, 2.5, 0.0]).view(5, 1)
    assert encode.delta(x, 1.0).flatten().tolist() == [1, 0, 1, 0, 0]
    assert encode.delta(x, 1.0, off_spikes=True).flatten().tolist() == [1, 0, 1, 0, -1]
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        encode.delta(x, 0)


@pytest.mark.parametrize("code", [encode.poisson, encode.latency])
@pytest.mark.parametrize(
    ("x", "found"), [(torch.tensor([[0.5, 1.5]]), "float32 from 0.5 to 1.5"), (torch.tensor([[255]]), "int64 from 255")]
)
def test_intensities_have_a_range(code: Any, x: torch.Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"takes numbers from 0 to 1, got torch.{found}.*scale x first"):
        code(x, 4)
