"""Every kind of data set under PyTorch's own loader, without a function of ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from spikeloom.data import FrameDataset, ImageDataset, LabelledDataset, SpikeDataset, batches, collate, create_dataset
from spikeloom.data.cache import Counts
from spikeloom.data.image_dataset import columns

LENGTHS = (2, 5, 3, 4, 1, 3, 2)


def images(sequence: bool = False) -> ImageDataset:
    torch.manual_seed(1)
    return ImageDataset(
        torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8),
        torch.arange(7),
        name="made",
        title="made images",
        classes=list("abcdefg"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        to_sequence=columns if sequence else None,
    )


def frames() -> FrameDataset:
    ends = np.cumsum([0, *LENGTHS])
    counts = np.random.default_rng(1).integers(0, 9, (ends[-1], 2, 4, 5)).astype(np.uint8)
    return FrameDataset(
        Counts(counts, ends), torch.arange(7), name="made", title="made recordings", classes=list("abcdefg")
    )


def spikes() -> SpikeDataset:
    torch.manual_seed(1)
    trains = torch.randint(3, (7, 6, 8), dtype=torch.uint8)
    return SpikeDataset(trains, torch.arange(7), name="made", title="made trains", classes=list("abcdefg"))


KINDS: dict[str, tuple[Callable[[], LabelledDataset], tuple[int, ...], tuple[int, ...]]] = {
    # The shapes of a batch of the first three, as a loader gives it and as a model takes it.
    "images": (images, (3, 3, 4, 5), (3, 3, 4, 5)),
    "columns": (lambda: images(sequence=True), (3, 3, 4, 5), (5, 3, 3, 4)),
    "frames": (frames, (3, 5, 2, 4, 5), (5, 3, 2, 4, 5)),
    "spikes": (spikes, (3, 6, 8), (6, 3, 8)),
}


# ConcatDataset reads one sample after another, so that nothing can make their lengths equal.
RAGGED = ("frames", "ConcatDataset")


def wrapped(dataset: LabelledDataset) -> dict[str, Dataset[tuple[torch.Tensor, int]]]:
    return {"whole": dataset, "Subset": Subset(dataset, range(7)), "ConcatDataset": ConcatDataset([dataset])}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loaders_own_batches_are_ours(kind: str) -> None:
    make, given, taken = KINDS[kind]
    dataset = make()
    expected = [dataset.batch(indices) for indices in ([0, 1, 2], [3, 4, 5], [6])]
    assert expected[0][0].shape == given
    assert dataset.encode(expected[0][0]).shape == taken
    found = {name: list(DataLoader(part, 3)) for name, part in wrapped(dataset).items() if (kind, name) != RAGGED}
    found["collate"] = list(DataLoader(dataset, 3, collate_fn=collate))
    found["batches"] = list(batches(dataset, [[0, 1, 2], [3, 4, 5], [6]]))
    for name, loaded in found.items():
        for (x, y), (a, b) in zip(loaded, expected, strict=True):
            assert torch.equal(x, a), name
            assert torch.equal(y, b), name
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_samples(kind: str) -> None:
    dataset = KINDS[kind][0]()
    for index in (0, 3, -1, -7):
        x, y = dataset[index]
        assert torch.equal(x, dataset.batch([index])[0][0])
        assert (y, type(y)) == (index % 7, int)
        assert torch.equal(x, dataset[index % 7][0])
        assert x.numel()
    for index in (7, -8):
        with pytest.raises(IndexError):
            dataset[index]
    assert [len(x) for x, _ in map(frames().__getitem__, range(7))] == list(LENGTHS)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("images", "ImageDataset(made images: 7 images of 3x4x5, 7 classes)"),
        ("columns", "ImageDataset(made images: 7 sequences of 3x4 a step, 7 classes)"),
        ("frames", "FrameDataset(made recordings: 7 sequences of 2x4x5 a step, 7 classes)"),
        ("spikes", "SpikeDataset(made trains: 7 sequences of 8 a step, 7 classes)"),
    ],
)
def test_what_a_data_set_says_of_itself(kind: str, expected: str) -> None:
    assert repr(KINDS[kind][0]()) == expected


def test_real_digits() -> None:
    digits = create_dataset("digits")
    assert repr(digits) == "ImageDataset(digits (scikit-learn): 1,438 images of 1x8x8, 10 classes)"
    x, y = next(iter(DataLoader(digits, 4)))
    assert (x.shape, y.shape) == ((4, 1, 8, 8), (4,))
