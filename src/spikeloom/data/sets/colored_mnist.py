"""Colored MNIST: digits whose colour tells the label in training and misleads in the test (Arjovsky et al. 2019)."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.locate import Source
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.data.sets.vision import MNIST_SOURCE, mnist, padded
from spikeloom.errors import UsageError

# (first image, one behind the last) of each part in MNIST's training file.
_PARTS = {"A": ((0, 40_000), (40_000, 60_000)), "B": ((0, 50_000), (50_000, 60_000))}


@register(Source("Colored MNIST", MNIST_SOURCE.get, MNIST_SOURCE.layout, {}, 2))
def colored_mnist(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    variant: Literal["A", "B"] = "A",
    flip_train1: float = 0.1,
    flip_train2: float = 0.2,
    flip_test: float = 0.9,
    label_noise: float = 0.25,
    grayscale: bool = False,
    draws: int = 0,
    subset: int | None = None,
    size: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """MNIST in two colours: is the digit below 5 (class 0) or not, with a colour that agrees with the label or not.

        label = (digit >= 5), flipped with probability label_noise
        colour = label, flipped with the probability of the environment

    The training part holds two environments of one size, one after the other. A digit is red (channel 0) or green
    (channel 1). All draws come from `draws` alone: neither the seed of a run nor the flips change which ones.

    Args:
        variant: "A", 28x28 in three channels, the first 20,000 + 20,000 training images and the next 20,000 as the
            test; or "B", every second pixel, 14x14 in two channels, without normalisation, the first 50,000 shuffled
            and dealt out in turn, the last 10,000 as the test (the original authors').
        flip_train1, flip_train2, flip_test: probabilities of each environment that the colour is not the label's.
        label_noise: probability that the label is not the digit's.
        grayscale: one channel without colour, for the oracle.
        draws: seeds the noise.
        subset: take only the first n images of each environment.
        size, download: as `mnist`; variant B needs size=16 for `colored_mnist_net`.

    Raises:
        UsageError: a probability outside 0 to 1.
    """
    _check(flip_train1=flip_train1, flip_train2=flip_train2, flip_test=flip_test, label_noise=label_noise)
    whole = mnist(root, "train", download=download)
    if len(whole) != 60_000:
        raise UsageError(f"colored_mnist needs the 60,000 training images of MNIST, got {whole.title}")
    start, end = _PARTS[variant][split == "test"]
    # The legacy generator: its stream is frozen, so that these draws are the same with every numpy.
    random = np.random.RandomState(draws)
    label_draws, colour_draws = (torch.from_numpy(random.random_sample(60_000)) for _ in range(2))
    order = torch.arange(start, end)
    if split == "train" and variant == "B":
        order = torch.from_numpy(random.permutation(end)).view(-1, 2).T.flatten()  # dealt out in turn
    flips = [flip_test] if split == "test" else [flip_train1, flip_train2]
    per = len(order) // len(flips)
    kept = per
    if subset is not None:
        check_integer("subset", subset, 1, per, ", the number of images of an environment of colored_mnist")
        kept = subset
    all_labels = (whole.labels[order] >= 5) ^ (label_draws[order] < label_noise)
    order, labels = (each.view(len(flips), per)[:, :kept].flatten() for each in (order, all_labels))
    flip = torch.tensor(flips, dtype=torch.float64).repeat_interleave(kept)
    colours = labels ^ (colour_draws[order] < flip)
    images = whole.images[order]
    if variant == "B":
        images = images[:, :, ::2, ::2]
    channels = 1 if grayscale else 3 if variant == "A" else 2
    if not grayscale:
        images = coloured(images, colours, channels)
    normalised = variant == "A"
    flipped = " and ".join(f"{100 * p:g} %" for p in flips)
    return ImageDataset(
        padded(images, size),
        labels.long(),
        all_labels=all_labels.long(),
        name="colored_mnist",
        title=f"Colored MNIST {variant}{' without colour' if grayscale else ''}, {split}, flips {flipped}"
        + (f", first {kept} of each environment" if kept < per else ""),
        classes=["0 to 4", "5 to 9"],
        mean=((0.1307, 0.1307, 0.0)[:channels] if normalised else (0.0,) * channels),
        std=((0.3081,) * channels if normalised else (1.0,) * channels),
        environments=len(flips),
    )


def _check(**probabilities: float) -> None:
    for name, p in probabilities.items():
        if not 0 <= p <= 1:
            raise UsageError(f"{name} of colored_mnist must be a probability from 0 to 1, got {p!r}")


def coloured(images: Tensor, colours: Tensor, channels: int) -> Tensor:
    """Grey images [N, 1, H, W] in channel 0 (red; colour False) or 1 (green) of `channels`, the others black."""
    out = images.new_zeros(len(images), channels, *images.shape[2:])
    out[torch.arange(len(images)), colours.long()] = images[:, 0]
    return out
