"""The data sets by name: contents, options, and what a user is told when something is wrong."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from spikeloom.data import DATASETS, ImageDataset, collate, create_dataset
from spikeloom.errors import DataFileError, UsageError

MNIST_COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


def told(error: type[Exception], call: Callable[[], Any]) -> str:
    """The message of an error, which must be one line."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def moments(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, on the scale 0 to 1, by way of histograms: large sets fit in memory."""
    grey = torch.arange(256).double() / 255
    shares = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ grey
    return mean.tolist(), (shares @ grey.square() - mean.square()).sqrt().tolist()


@pytest.fixture(params=["digits", "mnist", "cifar10", "sequential_mnist", "sequential_cifar10"])
def small(request: pytest.FixtureRequest) -> ImageDataset:
    """Every data set of the registry, on generated files where it reads files."""
    roots = {
        "mnist": "mnist_root",
        "cifar10": "cifar_root",
        "sequential_mnist": "mnist_root",
        "sequential_cifar10": "cifar_root",
    }
    root = request.getfixturevalue(roots[request.param]) if request.param in roots else None
    return create_dataset(request.param, root, subset=20)


def test_parts_agree(small: ImageDataset):
    channels = len(small.mean)
    assert len(small) == len(small.images) == len(small.labels) == 20
    assert small.name in DATASETS
    assert len(small.classes) == 10
    assert small.images.dtype == torch.uint8
    assert small.images.is_contiguous()
    assert small.images.shape[1] == channels == len(small.std)
    assert small.labels.dtype == torch.int64
    x, y = small.batch([3, 0, -1])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    for i, (image, label) in zip((3, 0, -1), zip(x, y, strict=True), strict=True):
        assert torch.equal(small[i][0], image)
        assert small[i][1] == label == small.labels[i]
        assert type(small[i][1]) is int
    with pytest.raises(IndexError):
        small[20]


def test_normalised_as_torchvision_does(small: ImageDataset):
    from torchvision.transforms.functional import normalize

    x, _ = small.batch(list(range(20)))
    assert torch.equal(x, normalize(small.images.float() / 255, list(small.mean), list(small.std)))
    black = torch.zeros(1, *small.images.shape[1:])
    assert torch.equal(small.fill, normalize(black, list(small.mean), list(small.std))[0, :, 0, 0])


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(20))], ids=["whole", "Subset"])
def test_loader_takes_whole_batches(small: ImageDataset, wrap: Callable[[ImageDataset], Any]):
    batches = list(DataLoader(wrap(small), batch_size=8, collate_fn=collate))
    assert [len(y) for _, y in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([x for x, _ in batches]), small.batch(list(range(20)))[0])
    assert torch.equal(torch.cat([y for _, y in batches]), small.labels)


def test_images_of_wrong_kind_are_refused():
    images, labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    about = {"name": "n", "title": "t", "classes": ["a"], "mean": (0.5,), "std": (0.5,)}
    ImageDataset(images, labels, **about)
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageDataset(images.float(), labels, **about)
    with pytest.raises(ValueError, match="labels must be int64"):
        ImageDataset(images, labels[:1], **about)
    with pytest.raises(ValueError, match="2 deviations"):
        ImageDataset(images, labels, **{**about, "std": (0.5, 0.5)})


def test_digits():
    from sklearn.datasets import load_digits

    train, test = create_dataset("digits"), create_dataset("digits", split="test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape == (1438, 1, 8, 8)
    assert train.title == test.title == "digits (scikit-learn)"
    assert test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    stored = load_digits()
    zeros = np.flatnonzero(stored.target == 0)
    ours = torch.cat([part.images[part.labels == 0] for part in (train, test)])
    order = np.concatenate([np.delete(zeros, np.s_[2::5]), zeros[2::5]])
    assert np.array_equal(ours.squeeze(1).numpy(), np.rint(stored.images[order] * 255 / 16))
    # Nobody is trained on what is tested.
    assert not {x.numpy().tobytes() for x in train.images} & {x.numpy().tobytes() for x in test.images}
    (mean,), (std,) = moments(train.images)
    assert train.mean == test.mean == (round(mean, 4),)
    assert train.std == test.std == (round(std, 4),)


@pytest.mark.parametrize(("name", "side", "size"), [("digits", 8, 8), ("digits", 8, 14), ("mnist", 28, 32)])
def test_size_pads_with_black(name: str, side: int, size: int, mnist_root: Path):
    plain, padded = (create_dataset(name, mnist_root, subset=9, **options) for options in ({}, {"size": size}))
    margin = (size - side) // 2
    assert padded.images.shape == (9, 1, size, size)
    inner = slice(margin, size - margin)
    assert torch.equal(padded.images[..., inner, inner], plain.images)
    assert padded.images.sum() == plain.images.sum()
    x, _ = padded.batch([0])
    assert padded.fill[0] == x[0, 0, 0, 0] or margin == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_mnist(real_data: Callable[[str], Path], split: str):
    data = create_dataset("mnist", real_data("MNIST"), split)
    assert data.title == "MNIST"
    assert data.labels.bincount().tolist() == MNIST_COUNTS[split]
    assert data.images.shape == (len(data.labels), 1, 28, 28)
    if split == "train":
        assert ([*data.mean], [*data.std]) == tuple([round(m, 4) for m in values] for values in moments(data.images))
        first = create_dataset("mnist", real_data("MNIST"), subset=10_000, size=32)
        assert first.title == "MNIST, first 10000 images"
        assert torch.equal(first.images[..., 2:-2, 2:-2], data.images[:10_000])
        assert torch.equal(first.labels, data.labels[:10_000])


def test_real_cifar10_copies(real_data: Callable[[str], Path]):
    root = real_data("CIFAR10")
    start = time.process_time()
    train = create_dataset("cifar10", root)
    assert time.process_time() - start < 15
    assert train.title == "CIFAR-10 (JPEG copies)"
    assert train.images.shape == (50_000, 3, 32, 32)
    assert torch.equal(train.labels, torch.arange(50_000) % 10)
    mean, std = moments(train.images)
    assert mean == pytest.approx([0.4913, 0.4821, 0.4465], abs=6e-5)
    assert std == pytest.approx([0.2452, 0.2428, 0.2606], abs=6e-5)
    with np.load(root / "CIFAR10" / "train.npz", allow_pickle=False) as file:
        assert file["classes"].tolist() == train.classes
    test = create_dataset("cifar10", root, "test")
    assert test.labels.bincount().tolist() == [800] * 10
    first = create_dataset("cifar10", root, "test", subset=100)
    assert first.title == "CIFAR-10 (JPEG copies), first 100 images"
    assert torch.equal(first.images, test.images[:100])


def test_title_names_what_was_read(mnist_root: Path, cifar_root: Path):
    assert create_dataset("digits", subset=100).title == "digits (scikit-learn), first 100 images"
    assert create_dataset("digits", subset=1438).title == "digits (scikit-learn)"
    # Twenty images in MNIST's format are not MNIST.
    assert create_dataset("mnist", mnist_root).title == "MNIST files of 20 images"
    assert create_dataset("cifar10", cifar_root, "test", subset=3).title == "CIFAR-10 (JPEG copies), first 3 images"


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("mnits", {}, "unknown dataset 'mnits'; did you mean mnist"),
        ("digits", {"split": "tets"}, "unknown split 'tets' of dataset 'digits'; did you mean test?"),
        ("digits", {"split": None}, "known: test, train"),
        ("digits", {"subst": 5}, "dataset 'digits' has no option 'subst'; did you mean subset?"),
        ("digits", {"download": True}, "dataset 'digits' has no option 'download'"),
        ("cifar10", {"size": 32}, "dataset 'cifar10' has no option 'size'"),
        ("digits", {"subset": 0}, "subset must be an integer from 1 to 1438, the number of images of digits"),
        ("digits", {"subset": 1439}, "got 1439"),
        ("digits", {"subset": 2.5}, "got 2.5"),
        ("digits", {"subset": True}, "got True"),
        ("digits", {"subset": "all"}, "got 'all'"),
        ("digits", {"size": 4}, "size must be an integer of at least 8, the side of the stored images, got 4"),
        ("digits", {"size": 9}, "8 plus an even number"),
        ("digits", {"size": "8"}, "got '8'"),
        ("mnist", {"download": "yes"}, "download must be true or false, got 'yes'"),
        ("cifar10", {"download": 1}, "download must be true or false, got 1"),
        ("mnist", {"subset": 21}, "from 1 to 20"),
        ("cifar10", {"subset": 21}, "from 1 to 20"),
    ],
)
def test_wrong_settings(name: str, arguments: dict[str, Any], says: str, mnist_root: Path, cifar_root: Path):
    assert mnist_root == cifar_root
    assert says in told(UsageError, lambda: create_dataset(name, mnist_root, **arguments))


@pytest.mark.parametrize(("name", "page"), [("mnist", "torchvision.datasets.MNIST.html"), ("cifar10", "cifar.html")])
def test_absent_data(name: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hints = ("data.root=", "SPIKELOOM_DATA", "data.download=true", page)
    text = told(UsageError, lambda: create_dataset(name))
    assert all(hint in text for hint in hints)
    for root in (tmp_path, tmp_path / "nowhere"):
        text = told(DataFileError, lambda root=root: create_dataset(name, root))
        assert all(hint in text for hint in (*hints, str(root)))
    monkeypatch.setenv("SPIKELOOM_DATA", str(tmp_path / "other"))
    assert str(tmp_path / "other") in told(DataFileError, lambda: create_dataset(name))


def test_root_argument_comes_before_the_environment(mnist_root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPIKELOOM_DATA", str(mnist_root))
    assert len(create_dataset("mnist")) == 20
    told(DataFileError, lambda: create_dataset("mnist", mnist_root / "elsewhere"))


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_failed_download(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision.datasets

    def fail(self: Any):
        raise RuntimeError("Error downloading x:\nTried y, got:\nno network")

    monkeypatch.setattr(getattr(torchvision.datasets, name.upper()), "download", fail)
    text = told(UsageError, lambda: create_dataset(name, tmp_path, download=True))
    assert "could not be downloaded" in text
    assert "no network" in text
    assert str(tmp_path) in text


def test_download_fetches_only_what_is_missing(mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision.datasets

    images = mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content, calls = images.read_bytes(), []

    def fetch(self: Any):
        calls.append(self.root)
        images.write_bytes(content)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    create_dataset("mnist", mnist_root, "test", download=True)
    assert calls == []
    images.unlink()
    assert len(create_dataset("mnist", mnist_root, "test", download=True)) == 20
    assert len(calls) == 1


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def original_cifar(cifar_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cifar_root with originals of 4 images a batch, whose digests torchvision takes for the published ones."""
    from torchvision.datasets import CIFAR10

    folder = cifar_root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: Any) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        return write(name, {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [0, 9, 5, 1]})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": ["airplane"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return cifar_root


def test_originals_come_before_copies(original_cifar: Path):
    train, test = create_dataset("cifar10", original_cifar), create_dataset("cifar10", original_cifar, "test", subset=3)
    assert train.title == "CIFAR-10"
    assert test.title == "CIFAR-10, first 3 images"
    assert train.labels.tolist() == [0, 9, 5, 1] * 5
    stored = pickle.loads((original_cifar / "cifar-10-batches-py" / "data_batch_2").read_bytes())["data"]
    assert np.array_equal(train.images[4:8].numpy(), stored.reshape(4, 3, 32, 32))


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_only_verified_files_are_unpickled(name: str, original_cifar: Path, tmp_path: Path):
    path = original_cifar / "cifar-10-batches-py" / name
    sign = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(sign))
    path.write_bytes(bomb)
    for split in ("train", "test"):
        text = told(DataFileError, lambda split=split: create_dataset("cifar10", original_cifar, split))
        assert str(path) in text
        assert "MD5" in text
    assert not sign.exists()
    pickle.loads(bomb)
    assert sign.exists()  # the bomb is real
    path.unlink()
    assert str(path) in told(DataFileError, lambda: create_dataset("cifar10", original_cifar))


def test_columns_are_time(cifar_root):
    image, sequence = (create_dataset(name, cifar_root, subset=5) for name in ("cifar10", "sequential_cifar10"))
    x, _ = image.batch([0, 3])
    assert image.encode(x) is x
    assert (image.is_sequence, sequence.is_sequence) == (False, True)
    steps = sequence.encode(sequence.batch([0, 3])[0])
    assert steps.shape == (32, 2, 3, 32)
    assert torch.equal(steps[7, 1], x[1, :, :, 7])
    assert (image.input_shape, sequence.input_shape) == ((3, 32, 32), (3, 32))
    assert sequence.title == image.title
