"""Image classification sets: digits, MNIST and CIFAR, and their columns as sequences."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spikeloom.data.formats import idx, jpeg
from spikeloom.data.image_dataset import ImageDataset, columns
from spikeloom.data.locate import Source, data_root, missing
from spikeloom.data.options import check_integer
from spikeloom.data.registry import register
from spikeloom.errors import DataFileError, UsageError

DIGITS = [str(digit) for digit in range(10)]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Mean and deviation of each channel, on the scale 0 to 1, measured on the training part (of digits before padding).
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.3053,), (0.3757,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DIGITS_SOURCE = Source("digits (scikit-learn)", "it comes with scikit-learn", (), {"train": 1_438, "test": 359}, 10)
MNIST_SOURCE = Source(
    "MNIST",
    "data.download=true fetches it (see https://pytorch.org/vision/stable/generated/torchvision.datasets.MNIST.html)",
    (tuple(f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),),
    {"train": 60_000, "test": 10_000},
    10,
)
_CIFAR_GET = (
    "unpack {}.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there, or let data.download=true fetch it"
)
CIFAR10_SOURCE = Source(
    "CIFAR-10",
    _CIFAR_GET.format("cifar-10-python"),
    (
        tuple(
            f"cifar-10-batches-py/{name}"
            for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
        ),
        ("CIFAR10/train.npz", "CIFAR10/test.npz"),
    ),
    {"train": 50_000, "test": 10_000},
    10,
)
CIFAR100_SOURCE = Source(
    "CIFAR-100",
    _CIFAR_GET.format("cifar-100-python"),
    (("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),),
    {"train": 50_000, "test": 10_000},
    100,
)


@register(DIGITS_SOURCE)
def digits(
    root: str | os.PathLike[str] | None, split: str, *, subset: int | None = None, size: int | None = None
) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, which come with the package: root is not used.

    Grey levels 0 to 16 become 0 to 255, rounded. scikit-learn has no split of its own. Here, of each class in stored
    order, the images number 2, 7, 12, ... (counted from 0) are the test part: 359 images, which leaves 1,438.

    Args:
        subset: take only the first n images.
        size: pad with black, evenly on every side, to size x size.
    """
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(targets == label)[2::5]] = True
    chosen = test if split == "test" else ~test
    images = torch.from_numpy(np.rint(pixels[chosen] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets[chosen].astype(np.int64))
    title = _subset_title("digits (scikit-learn)", subset, len(labels))
    return ImageDataset(
        padded(images[:subset], size),
        labels[:subset],
        all_labels=labels,
        name="digits",
        title=title,
        classes=DIGITS,
        mean=NORMALISATION["digits"][0],
        std=NORMALISATION["digits"][1],
    )


@register(MNIST_SOURCE)
def mnist(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    subset: int | None = None,
    size: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """MNIST, 28x28 grey, from the uncompressed IDX files in root/MNIST/raw, where torchvision keeps them.

    Args:
        subset: take only the first n images.
        size: pad with black, evenly on every side, to size x size (32 in several papers).
        download: fetch missing files with torchvision.
    """
    return _mnist(root, split, subset, size, download)


@register(MNIST_SOURCE)
def sequential_mnist(
    root: str | os.PathLike[str] | None, split: str, *, subset: int | None = None, download: bool = False
) -> ImageDataset:
    """MNIST, an image's 28 columns one after another: 28 steps [1, 28]. Files and options as `mnist`."""
    return _mnist(root, split, subset, None, download, "sequential_mnist", columns)


@register(CIFAR10_SOURCE)
def cifar10(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    subset: int | None = None,
    resize: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """CIFAR-10, 32x32 RGB, from root/cifar-10-batches-py, or else JPEG copies from root/CIFAR10/<split>.npz.

    JPEG changes pixels, so results on the copies carry "(JPEG copies)" in their title; their format: `jpegs.read`.

    Args:
        subset: take only the first n images (of the copies, only these are decoded).
        resize: enlarge images to resize x resize for the model (bicubic), after augmentation.
        download: fetch the originals with torchvision unless they are there, copies or not.
    """
    return _cifar10(root, split, subset, download, resize=resize)


@register(CIFAR100_SOURCE)
def cifar100(
    root: str | os.PathLike[str] | None,
    split: str,
    *,
    subset: int | None = None,
    resize: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """CIFAR-100, 32x32 RGB, from root/cifar-100-python.

    Args:
        subset, resize: as `cifar10`.
        download: fetch missing files with torchvision.
    """
    return _cifar100(root, split, subset, download, resize=resize)


@register(CIFAR10_SOURCE)
def sequential_cifar10(
    root: str | os.PathLike[str] | None, split: str, *, subset: int | None = None, download: bool = False
) -> ImageDataset:
    """CIFAR-10, an image's 32 columns one after another: 32 steps [3, 32]. Files and options as `cifar10`."""
    return _cifar10(root, split, subset, download, "sequential_cifar10", columns)


@register(CIFAR100_SOURCE)
def sequential_cifar100(
    root: str | os.PathLike[str] | None, split: str, *, subset: int | None = None, download: bool = False
) -> ImageDataset:
    """CIFAR-100, an image's 32 columns one after another: 32 steps [3, 32]. Files and options as `cifar100`."""
    return _cifar100(root, split, subset, download, "sequential_cifar100", columns)


Sequence = Callable[[Tensor], Tensor]


def _mnist(
    root: str | os.PathLike[str] | None,
    split: str,
    subset: int | None,
    size: int | None,
    download: bool,
    name: str = "mnist",
    to_sequence: Sequence | None = None,
) -> ImageDataset:
    folder = data_root(root, MNIST_SOURCE)
    stem = "train" if split == "train" else "t10k"
    images_path = folder / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte"
    labels_path = folder / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte"
    paths = (images_path, labels_path)
    if _checked_download(download) and not all(path.is_file() for path in paths):
        from torchvision.datasets import MNIST

        _download("MNIST", folder, lambda: MNIST(folder, download=True))
    for path in paths:
        if not path.is_file():
            raise missing(MNIST_SOURCE, folder, path)
    images, labels = idx.read(images_path, labels_path)
    # Files of another length may be a part of MNIST or something else: their results must not pass for MNIST's.
    whole = len(labels) == {"train": 60_000, "test": 10_000}[split]
    title = _subset_title("MNIST" if whole else f"MNIST files of {len(labels)} images", subset, len(labels))
    return ImageDataset(
        padded(images[:subset], size),
        labels[:subset],
        all_labels=labels,
        name=name,
        title=title,
        classes=DIGITS,
        mean=NORMALISATION["mnist"][0],
        std=NORMALISATION["mnist"][1],
        to_sequence=to_sequence,
    )


def _cifar10(
    root: str | os.PathLike[str] | None,
    split: str,
    subset: int | None,
    download: bool,
    name: str = "cifar10",
    to_sequence: Sequence | None = None,
    resize: int | None = None,
) -> ImageDataset:
    folder = data_root(root, CIFAR10_SOURCE)
    originals = folder / "cifar-10-batches-py"
    copies = folder / "CIFAR10" / f"{split}.npz"
    if _checked_download(download) or originals.is_dir():
        images, labels, _ = _original_cifar("CIFAR10", folder, split, download)
        title = _subset_title("CIFAR-10", subset, len(labels))
    elif copies.is_file():
        container = jpeg.read(copies, side=32, classes=10)
        title = _subset_title("CIFAR-10 (JPEG copies)", subset, len(container.labels))
        images, labels = container.decode(subset), torch.from_numpy(container.labels.astype(np.int64))
    else:
        raise missing(CIFAR10_SOURCE, folder, originals)
    return ImageDataset(
        images[:subset],
        labels[:subset],
        all_labels=labels,
        name=name,
        title=title,
        classes=CIFAR10_CLASSES,
        mean=NORMALISATION["cifar10"][0],
        std=NORMALISATION["cifar10"][1],
        to_sequence=to_sequence,
        resize=resize,
    )


def _cifar100(
    root: str | os.PathLike[str] | None,
    split: str,
    subset: int | None,
    download: bool,
    name: str = "cifar100",
    to_sequence: Sequence | None = None,
    resize: int | None = None,
) -> ImageDataset:
    folder = data_root(root, CIFAR100_SOURCE)
    if not _checked_download(download) and not (folder / "cifar-100-python").is_dir():
        raise missing(CIFAR100_SOURCE, folder, folder / "cifar-100-python")
    images, labels, classes = _original_cifar("CIFAR100", folder, split, download)
    return ImageDataset(
        images[:subset],
        labels[:subset],
        all_labels=labels,
        name=name,
        title=_subset_title("CIFAR-100", subset, len(labels)),
        classes=classes,
        mean=NORMALISATION["cifar100"][0],
        std=NORMALISATION["cifar100"][1],
        to_sequence=to_sequence,
        resize=resize,
    )


def _original_cifar(kind: str, folder: Path, split: str, download: bool) -> tuple[Tensor, Tensor, list[str]]:
    """uint8 [N, 3, 32, 32], int64 [N] and the classes, read by torchvision."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    reader: type[CIFAR10] = CIFAR10 if kind == "CIFAR10" else CIFAR100
    source = CIFAR10_SOURCE if kind == "CIFAR10" else CIFAR100_SOURCE
    if download:
        _download(source.title, folder, lambda: reader(folder, download=True))
    # The batches are pickles, which run code when loaded. torchvision compares the MD5 of every batch file, and of
    # the file of class names, with the published one before it unpickles any: only the authors' bytes are unpickled.
    meta = (reader.meta["filename"], reader.meta["md5"])
    try:
        dataset = reader(folder, train=split == "train")
    except (RuntimeError, OSError) as error:
        for name, md5 in [*reader.train_list, *reader.test_list, meta]:
            path = folder / reader.base_folder / name
            if not path.is_file():
                raise missing(source, folder, path) from error
            if not check_integrity(path, md5):
                raise DataFileError(
                    f"{path}: not {source.title}'s file of this name (its MD5 is not {md5}): truncated, corrupted or "
                    f"another version; remove it, then {source.get}"
                ) from error
        raise DataFileError(f"{folder / reader.base_folder}: cannot be read: {_line(error)}") from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, dtype=torch.int64), list(dataset.classes)


def _checked_download(download: object) -> bool:
    if not isinstance(download, bool):
        raise UsageError(f"download must be true or false, got {download!r}")
    return download


def _download(title: str, folder: Path, fetch: Callable[[], object]) -> None:
    try:
        fetch()
    except Exception as error:  # what a network, a proxy, a disk and an archive can do has no common class
        raise UsageError(f"{title} could not be downloaded into {folder}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _subset_title(title: str, subset: int | None, length: int) -> str:
    if subset is None:
        return title
    check_integer("subset", subset, 1, length, f", the number of images of {title}")
    return title if subset == length else f"{title}, first {subset} images"


def padded(images: Tensor, size: int | None) -> Tensor:
    """Zero-pads uint8 [N, C, H, H] to [N, C, size, size]."""
    if size is None:
        return images
    side = images.shape[-1]
    check_integer("size", size, side, why=", the side of the stored images")
    if (size - side) % 2:
        raise UsageError(f"size must be {side} plus an even number, to pad every side alike, got {size}")
    margin = (size - side) // 2
    return torch.nn.functional.pad(images, (margin,) * 4)
