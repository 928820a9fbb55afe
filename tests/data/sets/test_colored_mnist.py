"""Colored MNIST: colours and labels disagree as often as they should, and always the same ones."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.made_files import idx_bytes
from torch import Tensor

from spikeloom.data import ImageDataset, create_dataset
from spikeloom.errors import UsageError

# Checksums of the labels and the colours below, and so of the draws.
LABELS, COLOURS = 3993767248, 710651065


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 images in MNIST's files: each holds its number, and its digit is the number's last."""
    folder = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.zeros((60_000, 28, 28), np.uint8)
    number = np.arange(60_000)
    images[:, 0, 0], images[:, 0, 2], images[:, 2, 0] = number % 256, number // 256, 255
    (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes((number % 10).astype(np.uint8)))
    return folder.parents[1]


def create(root: Path, split: str, **options: Any) -> ImageDataset:
    dataset = create_dataset("colored_mnist", root, split, **options)
    assert isinstance(dataset, ImageDataset)
    return dataset


def numbers(dataset: ImageDataset) -> Tensor:
    grey = dataset.images.amax(1).long()
    return grey[:, 0, 0] + 256 * grey[:, 0, 2 if grey.shape[2] == 28 else 1]


def colours(dataset: ImageDataset) -> Tensor:
    return dataset.images[:, 1].flatten(1).any(1)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_layout(root: Path, variant: str) -> None:
    train, test = (create(root, split, variant=variant) for split in ("train", "test"))
    expected = {"A": ((40_000, 3, 28, 28), (20_000, 3, 28, 28)), "B": ((50_000, 2, 14, 14), (10_000, 2, 14, 14))}
    assert (tuple(train.images.shape), tuple(test.images.shape)) == expected[variant]
    assert (train.environments, test.environments) == (2, 1)
    assert train.mean == ((0.1307, 0.1307, 0.0) if variant == "A" else (0.0, 0.0))
    assert train.std == ((0.3081,) * 3 if variant == "A" else (1.0, 1.0))
    # Every image once, in one colour.
    for part in (train, test):
        assert ((part.images[:, :2].flatten(2).any(2)).sum(1) == 1).all()
        assert not part.images[:, 2:].any()


def test_splits(root: Path) -> None:
    a, b = ([create(root, split, variant=variant) for split in ("train", "test")] for variant in "AB")
    assert torch.equal(torch.cat([numbers(part) for part in a]), torch.arange(60_000))
    first, second = (numbers(b[0].environment(n)) for n in range(2))
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(50_000))
    assert not torch.equal(first, first.sort().values)
    assert torch.equal(numbers(b[1]), torch.arange(50_000, 60_000))


@pytest.mark.parametrize(
    ("variant", "flips"),
    [("A", (0.1, 0.2)), ("A", (0.05, 0.25)), ("A", (0.025, 0.275)), ("A", (0.0, 0.3)), ("B", (0.1, 0.2))],
)
def test_statistics(root: Path, variant: str, flips: tuple[float, float]) -> None:
    options: dict[str, Any] = {"variant": variant, "flip_train1": flips[0], "flip_train2": flips[1]}
    train, test = (create(root, split, **options) for split in ("train", "test"))
    parts = [train.environment(0), train.environment(1), test]
    for part, flip in zip(parts, (*flips, 0.9), strict=True):
        clean = numbers(part) % 10 >= 5
        agree = (colours(part) == part.labels.bool()).double().mean().item()
        assert agree == pytest.approx(1 - flip, abs=0 if flip == 0 else 0.01)
        assert (part.labels.bool() == clean).double().mean().item() == pytest.approx(0.75, abs=0.01)
    # What label and colour noise have in common is chance.
    noise = parts[0].labels.bool() != (numbers(parts[0]) % 10 >= 5)
    flipped = colours(parts[0]) != parts[0].labels.bool()
    assert (noise & flipped).double().mean().item() == pytest.approx(0.25 * flips[0], abs=0.01)


def test_the_draws_are_stored(root: Path) -> None:
    """The same for every run, numpy and machine; those of labels do not depend on the flips."""
    train = create(root, "train")
    torch.manual_seed(5)
    np.random.seed(5)
    again = create(root, "train", flip_train1=0.3)
    assert torch.equal(train.labels, again.labels)
    assert zlib.crc32(np.packbits(train.labels.numpy().astype(bool)).tobytes()) == LABELS
    assert zlib.crc32(np.packbits(colours(train).numpy()).tobytes()) == COLOURS
    # A wider flip turns more colours, and turns back none.
    per = 20_000
    flipped, more = ((colours(d) != d.labels.bool())[:per] for d in (train, again))
    assert (more | ~flipped).all()
    assert more.sum() > flipped.sum()
    other = create(root, "train", draws=1)
    assert not torch.equal(other.labels, train.labels)


def test_grayscale_has_the_same_labels_and_no_colour(root: Path) -> None:
    for variant in "AB":
        plain, grey = (create(root, "train", variant=variant, grayscale=grayscale) for grayscale in (False, True))
        assert torch.equal(plain.labels, grey.labels)
        assert grey.in_channels == 1
        assert torch.equal(grey.images, plain.images.amax(1, keepdim=True))


def test_subset_and_size(root: Path) -> None:
    train = create(root, "train", subset=7, variant="B", size=16)
    whole = create(root, "train", variant="B")
    assert train.images.shape == (14, 2, 16, 16)
    for n in range(2):
        part, expected = train.environment(n), whole.environment(n)
        assert torch.equal(part.images[:, :, 1:-1, 1:-1], expected.images[:7])
        assert torch.equal(part.labels, expected.labels[:7])
    assert "first 7 of each environment" in train.title
    assert len(create(root, "test", subset=7)) == 7


def test_mistakes(root: Path, mnist_root: Path) -> None:
    with pytest.raises(UsageError, match=r"flip_test .* probability from 0 to 1, got 1.5"):
        create(root, "test", flip_test=1.5)
    with pytest.raises(UsageError, match="subset must be an integer from 1 to 20000"):
        create(root, "train", subset=20_001)
    with pytest.raises(UsageError, match="needs the 60,000 training images of MNIST"):
        create(mnist_root, "train")


def test_real_files(real_data: Callable[[str], Path]) -> None:
    """No digit is lost by its colour."""
    train, grey = create(real_data("MNIST"), "train"), create_dataset("mnist", real_data("MNIST"), "train")
    assert isinstance(grey, ImageDataset)
    assert torch.equal(train.images.amax(1), grey.images[:40_000, 0])
