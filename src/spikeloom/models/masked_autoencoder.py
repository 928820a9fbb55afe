"""Masked pre-training of Spikformer V2 (Zhou et al. 2024, Sec. 4.2): spiking encoder, light ANN decoder.

The encoder never sees a hidden patch: the stem's convolutions are sparse (their outputs are zero at hidden places),
its norms take their statistics from visible places alone, and its blocks get the visible tokens only. The stem of
Spikformer (SPS), which the paper pre-trains for comparison, is masked behind its pools too, whose windows reach over
the edges of patches. A trained encoder's weights have the names they have in `Spikformer`; the decoder is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import network_input, repeat
from spikeloom.layers import Conv2d, MaxPool2d, NormSpike, SEWBlock, channels_last
from spikeloom.models.registry import MODELS
from spikeloom.models.spikformer import Spikformer, transformer_lif


def upsampled(mask: Tensor, factor: int) -> Tensor:
    """A mask [N, H, W] on a grid `factor` times as fine: nearest neighbour, so that those of all stages are nested."""
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def at_visible(unit: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """A norm and its neuron at the places of `visible` [N, H, W] alone: [T, N, C, H, W] -> the same, zero elsewhere."""
    places = x.movedim(2, -1)
    spikes = unit(places[:, visible])  # [T, places, C]: the statistics are theirs
    out = spikes.new_zeros(places.shape)
    out[:, visible] = spikes
    return out.movedim(-1, 2)


class MaskedAutoencoder(nn.Module):
    """What is wrong with the hidden patches that a decoder draws from the visible ones.

    Masks are drawn for every image anew in training; in eval mode they are the same in every call.

    Args:
        encoder: a Spikformer V2, or a Spikformer; its classifier is not used.
        in_channels: of the images.
        image_size: side of the images, a multiple of the stem's patch.
        T: steps.
        ratio: of the patches that are hidden.
        width, depth, heads: of the decoder, a pre-norm transformer with learned positions.
        normalise: a target patch has mean 0 and variance 1 (He et al. 2022, MAE; not stated for Spikformer V2).

    Shapes: [N, C, H, W] -> prediction minus target [1, N, hidden patches, C patch^2].
    """

    def __init__(
        self,
        encoder: Spikformer,
        in_channels: int,
        image_size: int,
        T: int,
        ratio: float,
        width: int,
        depth: int,
        heads: int,
        normalise: bool,
    ):
        super().__init__()
        self.stem, self.blocks = cast("nn.Sequential", encoder.stem), encoder.blocks
        self.patch = 2 ** sum(m.stride in (2, (2, 2)) for m in self.stem.modules() if isinstance(m, Conv2d | MaxPool2d))
        self.T, self.normalise, self.image_size = count("T", T), normalise, image_size
        if image_size % self.patch or not 0 < ratio < 1:
            raise ValueError(
                f"image_size must be a multiple of the patch's side {self.patch} and ratio between 0 and 1, "
                f"got {image_size} and {ratio}"
            )
        self.grid = image_size // self.patch
        self.hidden = round(ratio * self.grid**2)
        self.embed = nn.Linear(encoder.head.in_features, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(self.grid**2, width) * 0.02)
        layers = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.decoder = nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, in_channels * self.patch**2))

    def forward(self, x: Tensor) -> Tensor:
        visible, hidden = self.draw(x)
        wrong = self.decode(self.encode(x, visible), visible) - self.target(x)
        return wrong.gather(1, hidden[..., None].expand(-1, -1, wrong.shape[2]))[None]

    @property
    def decoder_parameters(self) -> int:
        """Elements of what fine-tuning leaves behind, without the projection from the encoder, as the paper counts."""
        parts = (self.mask_token, self.position, *self.decoder.parameters())
        return sum(part.numel() for part in parts)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Random places [N, L] of the visible and of the hidden tokens, ascending."""
        x = network_input(x)
        if x.dim() != 4 or x.shape[-2:] != (self.image_size,) * 2:
            raise ValueError(
                f"pre-training takes images of {self.image_size}x{self.image_size}, got shape {tuple(x.shape)}: "
                "set model.image_size"
            )
        generator = None if self.training else torch.Generator().manual_seed(0)
        order = torch.rand(len(x), self.grid**2, generator=generator).argsort(1).to(x.device)
        return order[:, self.hidden :].sort(1).values, order[:, : self.hidden].sort(1).values

    def encode(self, x: Tensor, visible: Tensor) -> Tensor:
        """Images and places of visible tokens [N, V] to what the blocks make of these, mean over T: [N, V, D]."""
        mask = torch.zeros(len(x), self.grid**2, dtype=torch.bool, device=x.device).scatter(1, visible, True)
        mask = mask.unflatten(1, (self.grid, self.grid))
        y = channels_last(repeat(x * upsampled(mask, self.patch)[:, None], self.T))
        for layer in (each for part in self.stem for each in (part if isinstance(part, nn.Sequential) else (part,))):
            y = self._masked(layer, y, mask)
        tokens = y.movedim(2, -1)[:, mask].unflatten(1, (len(x), -1))  # [T, N, V, D]
        return self.blocks(tokens.movedim(-1, 2)[:, :, :, None])[:, :, :, 0].mean(0).mT

    def _masked(self, layer: nn.Module, y: Tensor, mask: Tensor) -> Tensor:
        """A layer of the stem at the visible places of its grid: what neurons and pools give is zero elsewhere."""
        if isinstance(layer, SEWBlock):  # the position embedding of Spikformer, x + SN(BN(Conv(x)))
            return y + at_visible(layer.spike, layer.branch(y), mask)
        if isinstance(layer, NormSpike):
            return at_visible(layer, y, upsampled(mask, y.shape[-1] // self.grid))
        y = layer(y)
        return y * upsampled(mask, y.shape[-1] // self.grid)[:, None] if isinstance(layer, MaxPool2d) else y

    def decode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens [N, V, D] and their places to all patches [N, L, C patch^2]."""
        y = self.embed(tokens)
        full = self.mask_token.to(y.dtype).expand(len(y), self.grid**2, -1)
        full = full.scatter(1, visible[..., None].expand_as(y), y)
        return self.decoder(full + self.position)

    def patches(self, x: Tensor) -> Tensor:
        """Images as rows of pixels, [N, L, C patch^2]."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT

    def target(self, x: Tensor) -> Tensor:
        """What the decoder should give for x, [N, L, C patch^2]."""
        patches = self.patches(x)
        if not self.normalise:
            return patches
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """The images, what the encoder sees of them, and these with the hidden patches drawn: [N, 3, C, H, W].

        With `normalise`, a drawn patch gets the true one's mean and variance back.
        """
        visible, _ = self.draw(x)
        patches, drawn = self.patches(x), self.decode(self.encode(x, visible), visible)
        if self.normalise:
            variance, mean = torch.var_mean(patches, -1, keepdim=True)
            drawn = drawn * (variance + 1e-6).sqrt() + mean
        seen = torch.zeros_like(patches[..., :1]).scatter(1, visible[..., None], 1.0)
        rows = torch.stack([patches, patches * seen, torch.where(seen > 0, patches, drawn)], 1)
        grid = rows.mT.unflatten(-1, (self.grid, self.grid)).flatten(0, 1)
        return F.pixel_shuffle(grid, self.patch).unflatten(0, (len(x), 3))


@MODELS.register
def masked_autoencoder(
    in_channels: int = 3,
    num_classes: int = 1000,
    neuron: Callable[[], nn.Module] = transformer_lif,
    T: int = 1,
    encoder: str = "spikformer_v2_8_512",
    image_size: int = 224,
    ratio: float = 0.75,
    decoder_width: int = 256,
    decoder_depth: int = 4,
    decoder_heads: int = 8,
    normalise: bool = True,
) -> MaskedAutoencoder:
    """Pre-training of a Spikformer V2 or a Spikformer; by default with the published decoder's 3.41 M parameters."""
    made = MODELS[encoder](in_channels=in_channels, num_classes=num_classes, neuron=neuron, T=T)
    if not encoder.startswith("spikformer"):
        raise ValueError(f"encoder must be a spikformer or a spikformer_v2 model, got {encoder!r}")
    return MaskedAutoencoder(
        cast("Spikformer", made),
        in_channels,
        image_size,
        T,
        ratio,
        decoder_width,
        decoder_depth,
        decoder_heads,
        normalise,
    )
