"""Masked pre-training: nothing leaks from hidden patches, and what is trained is what Spikformer V2 then uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.models import create_model
from spikeloom.models.masked_autoencoder import upsampled
from spikeloom.record import Recorder

SMALL = {
    "encoder": "spikformer_v2_2_64",
    "image_size": 28,
    "in_channels": 1,
    "num_classes": 10,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


ENCODERS = {"spikformer_v2_2_64": 64, "spikformer_2_384": 384}  # channels; the second one's stem pools


def lively(**overrides: Any) -> Any:
    """A small autoencoder whose neurons fire, with running statistics."""
    torch.manual_seed(1)
    model = create_model("masked_autoencoder", **{**SMALL, **overrides}).train()
    assert model.patch == 4
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 2.0, 4.0)
        nn.init.uniform_(norm.bias, -0.2, 0.6)
        norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, 1, 28, 28))
    return model


def test_the_published_decoder() -> None:
    with torch.device("meta"):
        model = create_model("masked_autoencoder")
        encoder = create_model("spikformer_v2_8_512")
    own = {name: p.shape for name, p in model.named_parameters()}
    kept = {name: p.shape for name, p in encoder.named_parameters() if not name.startswith("head.")}
    assert kept.items() <= own.items(), "names and shapes of Spikformer V2"
    decoder = {name: shape for name, shape in own.items() if name not in kept and not name.startswith("embed.")}
    assert sum(shape.numel() for shape in decoder.values()) == model.decoder_parameters == 3_407_360
    assert model.grid**2 - model.hidden == 49


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_do_not_leak(training: bool, encoder: str) -> None:
    model = lively(T=2, encoder=encoder).train(training)
    x = torch.randn(3, 1, 28, 28)
    visible, hidden = model.draw(x)
    seen = torch.zeros(3, 49).scatter(1, visible, 1.0).view(3, 1, 7, 7)
    other = torch.where(seen.repeat_interleave(4, 2).repeat_interleave(4, 3) > 0, x, torch.randn_like(x) * 9)
    with torch.no_grad():
        tokens = model.encode(x, visible)
        assert torch.equal(model.encode(other, visible), tokens)
        assert not torch.equal(model.encode(torch.randn_like(x), visible), tokens)
    assert tokens.shape == (3, 12, ENCODERS[encoder])
    assert tokens.any()
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(49).expand(3, 49))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_visible_is_the_encoder_itself(encoder: str) -> None:
    model = lively(T=2, encoder=encoder)
    plain = create_model(encoder, in_channels=1, T=2).train()
    for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.5
    left = plain.load_state_dict(model.state_dict(), strict=False)
    assert left.missing_keys == ["head.weight", "head.bias"]
    x, everything = torch.randn(3, 1, 28, 28), torch.arange(49).expand(3, 49)
    with torch.no_grad():  # in double precision: places are summed in another order
        model, plain, x = model.double(), plain.double(), x.double()
        expected = plain.blocks(plain.stem(x.expand(2, *x.shape))).mean(0).flatten(2).mT
        torch.testing.assert_close(model.encode(x, everything), expected, rtol=1e-9, atol=1e-9)
    for name, value in plain.state_dict().items():
        if "running" in name:  # masked statistics with nothing masked are the plain ones
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_masks_of_the_stages_are_nested() -> None:
    mask = torch.rand(2, 7, 7) < 0.25
    fine = upsampled(mask, 4)
    assert fine.shape == (2, 28, 28)
    assert torch.equal(fine.view(2, 7, 4, 7, 4).all(4).all(2), mask)
    assert torch.equal(upsampled(upsampled(mask, 2), 2), fine)
    assert fine.sum() == 16 * mask.sum()


@pytest.mark.parametrize("normalise", [True, False])
def test_the_error_is_of_hidden_patches_alone(normalise: bool) -> None:
    model = lively(normalise=normalise).eval()
    x = torch.randn(2, 1, 28, 28)
    visible, hidden = model.draw(x)
    drawn = model.decode(model.encode(x, visible), visible)
    out = model(x)
    assert out.shape == (1, 2, 37, 16)
    for n in range(2):
        for i, place in enumerate(hidden[n].tolist()):
            row, column = 4 * (place // 7), 4 * (place % 7)
            patch = x[n, 0, row : row + 4, column : column + 4].flatten()
            if normalise:
                patch = (patch - patch.mean()) / patch.std()
            torch.testing.assert_close(out[0, n, i], drawn[n, place] - patch, rtol=1e-3, atol=1e-4)


def test_masks_are_drawn_in_training_and_fixed_in_evaluation() -> None:
    model, x = lively(), torch.randn(5, 1, 28, 28)
    assert not torch.equal(model.draw(x)[0], model.draw(x)[0])
    assert len({tuple(row) for row in model.draw(x)[0].tolist()}) == 5
    model.eval()
    assert torch.equal(model.draw(x)[0], model.draw(x)[0])


def test_the_encoder_takes_spikes() -> None:
    model = lively().eval()
    with Recorder(model, spikes=False, inputs=True) as record, torch.no_grad():
        model(torch.randn(2, 1, 28, 28))
    for name, (x,) in record.inputs.items():
        if name.startswith(("stem.", "blocks.")) and name != "stem.0.0":
            assert torch.equal(x, x.round()), name
            assert 0 <= x.min() < x.max() <= (1 if name.startswith("stem") else 4), name


def test_every_parameter_learns() -> None:
    model = lively()
    model(torch.randn(4, 1, 28, 28)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.mask_token.grad.any()


def test_pictures() -> None:
    model = lively().eval()
    x = torch.randn(3, 1, 28, 28)
    shown = model.pictures(x)
    assert shown.shape == (3, 3, 1, 28, 28)
    original, masked, drawn = shown.unbind(1)
    seen = masked != 0
    assert torch.equal(original, x)
    assert seen.sum() == 3 * 12 * 16
    assert torch.equal(masked[seen], x[seen])
    assert torch.equal(drawn[seen], x[seen])
    assert not torch.equal(drawn, x)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, "image_size must be a multiple of the patch's side 4"),
        ({"ratio": 1.0}, "ratio between 0 and 1, got 28 and 1.0"),
        ({"encoder": "spikingformer_2_384"}, "a spikformer or a spikformer_v2 model, got 'spikingformer_2_384'"),
    ],
)
def test_what_cannot_be_pre_trained(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("masked_autoencoder", **{**SMALL, **overrides})
    with pytest.raises(ValueError, match=r"images of 28x28, got shape \(2, 1, 2, 28, 28\): set model.image_size"):
        create_model("masked_autoencoder", **SMALL)(torch.zeros(2, 1, 2, 28, 28))


def test_bfloat16() -> None:
    model = lively()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = model(torch.randn(2, 1, 28, 28))
    out.float().square().mean().backward()
    assert out.isfinite().all()
