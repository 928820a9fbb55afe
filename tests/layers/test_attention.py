"""Attention: the equations written out, the limits of the masks, and what cannot step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikeloom.encode import repeat
from spikeloom.layers import SpatialAttention, SynapticAttention
from spikeloom.neurons import LIF
from spikeloom.stream import Stream

AXES = ("time", "channel", "space")


def attention(axis: str, gate: nn.Module, T: int = 8, channels: int = 16) -> SynapticAttention:
    return SynapticAttention(axis, gate, T, channels)  # pyright: ignore


def written_out(axis: str, module: SynapticAttention, x: Tensor) -> Tensor:
    """The score of one sample [T, C, H, W] at a time."""
    weights = list(module.parameters())
    scores = []
    for sample in x.unbind(1):
        if axis == "space":
            flat = sample.flatten(0, 1)
            both = torch.stack([flat.mean(0), flat.max(0).values])[None]
            scores.append(nn.functional.conv2d(both, weights[0], padding=1)[0, :, None])
        else:
            rows = sample.flatten(1) if axis == "time" else sample.transpose(0, 1).flatten(1)
            z = sum(weights[1] @ (weights[0] @ pooled).relu() for pooled in (rows.mean(1), rows.max(1).values))
            scores.append(z[:, None, None, None] if axis == "time" else z[None, :, None, None])  # pyright: ignore
    return torch.stack(scores, 1)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(8, 3, 16, 5, 7), (8, 1, 16, 1, 1), (1, 2, 16, 3, 3), (2, 2, 16, 4, 4)])
def test_ma_and_ia(axis: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3
    ma, ia = attention(axis, nn.Sigmoid(), shape[0]), attention(axis, LIF(), shape[0])
    for module, gate in ((ma, torch.sigmoid), (ia, lambda z: (z / 2 >= 1).float())):
        expected = (gate(written_out(axis, module, x)) * x).relu()
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_inhibition_is_binary_and_can_shut(axis: str) -> None:
    x, module = torch.rand(8, 4, 16, 6, 6) * 8 - 1, attention(axis, LIF())
    y = module(x)
    assert torch.equal(y, torch.where(y != 0, x, 0.0)), "either x or nothing"
    for p in module.parameters():
        nn.init.zeros_(p)
    assert not module(x).any()
    nn.init.ones_(next(iter(module.parameters())))
    for p in list(module.parameters())[1:]:
        nn.init.ones_(p)
    assert torch.equal(module(x), x.relu()), "open for large scores"


@pytest.mark.parametrize("axis", AXES)
def test_gates_of_a_batch_are_its_samples(axis: str) -> None:
    # The released gate carries its membrane from sample to sample.
    x, module = torch.randn(8, 3, 16, 6, 6) * 3, attention(axis, LIF())
    alone = torch.cat([module(sample[:, None]) for sample in x.unbind(1)], dim=1)
    torch.testing.assert_close(module(x), alone, rtol=0, atol=0)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("gate", "weight"), [(nn.Sigmoid, 0.1), (LIF, 0.5), (LIF, 0.0)])
def test_gradients_reach_scores_and_input(axis: str, gate: type[nn.Module], weight: float) -> None:
    x, module = torch.rand(8, 2, 16, 3, 3).requires_grad_(), attention(axis, gate())
    for p in module.parameters():
        nn.init.constant_(p, weight)
    module(x).sum().backward()
    # A gate that is shut learns nothing more, behind a ReLU of 0: so shortcuts die for good.
    for gradient in (x.grad, *(p.grad for p in module.parameters())):
        assert gradient is not None
        assert gradient.any() == (weight > 0)


def test_only_time_attention_has_a_length() -> None:
    x = torch.rand(5, 2, 16, 3, 3)
    with pytest.raises(ValueError, match="this TimeScore is made for T = 8 steps, got 5"):
        attention("time", nn.Sigmoid())(x)
    for axis in ("channel", "space"):
        assert attention(axis, nn.Sigmoid())(x).shape == x.shape


@pytest.mark.parametrize("axis", AXES)
def test_attention_cannot_step(axis: str) -> None:
    stream = Stream(attention(axis, LIF(), T=1))
    with pytest.raises(RuntimeError, match="cannot run under a Stream; a model without it can step"):
        stream(torch.rand(1, 2, 16, 3, 3))


# --- SAM --------------------------------------------------------------------------------------------------------------


def test_sam_is_its_equation() -> None:
    x, sam = torch.randint(0, 4, (3, 2, 5, 6, 9)).float(), SpatialAttention()
    assert sum(p.numel() for p in sam.parameters()) == 98
    for t, n in ((0, 0), (2, 1)):
        f = x[t, n]
        both = torch.stack([f.mean(0), f.max(0).values])
        mask = torch.sigmoid(nn.functional.conv2d(both[None], sam.conv.weight, padding=3))[0]
        assert mask.shape == (1, 6, 9)
        assert ((mask > 0) & (mask < 1)).all()
        torch.testing.assert_close(sam(x)[t, n], f * mask)


def test_sam_at_zero_weights_halves() -> None:
    x, sam = torch.randint(0, 4, (3, 2, 5, 6, 9)).float(), SpatialAttention()
    nn.init.zeros_(sam.conv.weight)
    assert torch.equal(sam(x), x / 2)


def test_sam_does_not_know_the_order_of_channels() -> None:
    x, sam, order = torch.randint(0, 4, (3, 2, 8, 6, 9)).float(), SpatialAttention(), torch.randperm(8)
    torch.testing.assert_close(sam(x[:, :, order]), sam(x)[:, :, order])


def test_sam_of_a_repeated_image_is_computed_once() -> None:
    x, sam = torch.rand(2, 5, 6, 9), SpatialAttention()
    assert sam(repeat(x, 4)).stride(0) == 0
    assert torch.equal(sam(repeat(x, 4)), sam(repeat(x, 4).contiguous()))
