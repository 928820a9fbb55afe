"""A user's own data: folders of classes and arrays, split or given, and what is said where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_line import spikeloom
from helpers.made_events import five_bytes, made
from helpers.made_sets import write_wav
from PIL import Image

from spikeloom.data import FrameDataset, ImageDataset, SpikeDataset, create_dataset
from spikeloom.data.own_files import own_files
from spikeloom.errors import UsageError
from spikeloom.predict import predict


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def recording(path: Path, seed: int) -> None:
    path.with_suffix(".bin").write_bytes(five_bytes(made(300, 34, 34, seed)))


def sound(path: Path, seed: int) -> None:
    write_wav(path.with_suffix(".wav"), np.random.default_rng(seed).integers(-9000, 9000, 3000).astype(np.int16))


def classes(
    root: Path, make: Callable[[Path, int], None], each: int = 10, names: tuple[str, ...] = ("cat", "dog")
) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            make(root / name / f"{i:02}.png", 100 * label + i)
    return root


KINDS: dict[str, tuple[Callable[[Path, int], None], dict[str, Any], type]] = {
    "folder": (picture, {"size": 16}, ImageDataset),
    "recordings": (recording, {"sensor": (34, 34), "T": 4}, FrameDataset),
    "audio": (sound, {"T": 20}, SpikeDataset),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_a_class_is_split(name: str, tmp_path: Path) -> None:
    make, options, kind = KINDS[name]
    root = classes(tmp_path / "own", make)
    (root / ".cache").mkdir()
    train, test = (create_dataset(name, root, split, **options) for split in ("train", "test"))
    assert isinstance(train, kind)
    assert train.classes == test.classes == ["cat", "dog"]
    assert (len(train), len(test)) == (16, 4)
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert "own" in train.title
    # Every file is in one part, and the split is a function of the files and `draws` alone.
    rows = {x.numpy().tobytes() for part in (train, test) for x in part.batch(range(len(part)))[0]}
    assert len(rows) == 20
    again = create_dataset(name, root, "test", **options)
    assert torch.equal(again.batch(range(4))[0], test.batch(range(4))[0])
    other = create_dataset(name, root, "test", draws=1, **options)
    assert not torch.equal(other.batch(range(4))[0], test.batch(range(4))[0])
    assert len(create_dataset(name, root, "test", test=0.5, **options)) == 10
    assert create_dataset(name, root, "train", subset=4, **options).labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", KINDS)
def test_a_given_split_is_taken(name: str, tmp_path: Path) -> None:
    make, options, _ = KINDS[name]
    classes(tmp_path / "train", make, 3)
    classes(tmp_path / "test", make, 2)
    assert len(create_dataset(name, tmp_path, "train", **options)) == 6
    test = create_dataset(name, tmp_path, "test", **options)
    assert test.labels.tolist() == [0, 0, 1, 1]
    # What a user predicts later is read in the same way.
    ending = {"folder": ".png", "recordings": ".bin", "audio": ".wav"}[name]
    paths = [tmp_path / "test" / label / f"{i:02}{ending}" for label in ("cat", "dog") for i in range(2)]
    found = own_files(name, options, paths, 2, test.classes)
    assert torch.equal(found.batch(range(4))[0], test.batch(range(4))[0])
    assert found.classes == ["cat", "dog"]


def test_pictures(tmp_path: Path) -> None:
    root = classes(tmp_path, picture, 2)
    data = create_dataset("folder", root, "train", size=16, resize=20, gray=True, mean=(0.4,), std=(0.2,))
    assert data.input_shape == (1, 16, 16)
    expected = (data.images[0].float() / 255 - 0.4) / 0.2
    assert torch.allclose(data[0][0], expected)


@pytest.mark.parametrize("given", [True, False])
def test_arrays(given: bool, tmp_path: Path) -> None:
    x = np.arange(20 * 3 * 8 * 8, dtype=np.int64).reshape(20, 3, 8, 8).astype(np.uint8)
    y = np.arange(20) % 4
    if given:
        np.savez(tmp_path / "train.npz", x=x[:16], y=y[:16])
        np.savez(tmp_path / "test.npz", x=x[16:19], y=y[16:19])
    else:
        np.savez(tmp_path / "data.npz", x=x, y=y)
    train, test = (create_dataset("arrays", tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == ((16, 3) if given else (16, 4))
    assert train.classes == test.classes == ["0", "1", "2", "3"]
    assert isinstance(train, ImageDataset)
    np.savez(
        tmp_path / ("train.npz" if given else "data.npz"),
        x=x.reshape(20, 8, 24)[: 16 if given else 20],
        y=y[: 16 if given else 20],
    )
    sequences = create_dataset("arrays", tmp_path, "train", subset=3)
    assert isinstance(sequences, SpikeDataset)
    assert sequences.encode(sequences.batch([0, 1])[0]).shape == (8, 2, 24)


def broken(tmp_path: Path, what: str) -> Path:
    root = tmp_path / what
    root.mkdir(parents=True)
    if what == "an empty class":
        classes(root, picture, 2)
        (root / "fox").mkdir()
    elif what == "a class of the test part alone":
        classes(root / "train", picture, 2)
        classes(root / "test", picture, 2, ("cat", "fox"))
    elif what == "one picture a class":
        classes(root, picture, 1)
    elif what == "a damaged picture":
        classes(root, picture, 2)
        (root / "cat" / "00.png").write_bytes(b"\x89PNG")
        (root / "cat" / "01.png").write_bytes(b"\x89PNG")
    return root


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "holds no folders of classes: make it"),
        ("an empty class", "fox: a class without pictures (.jpeg, .jpg, .png); add some, or remove the folder"),
        ("a class of the test part alone", "fox: this class has no folder in"),
        ("one picture a class", "class 0 has a single sample, too few to train and test"),
        ("a damaged picture", ".png: not a whole JPEG or PNG picture"),
    ],
)
def test_what_is_wrong_is_named(what: str, message: str, tmp_path: Path) -> None:
    split = "test" if "test" in what else "train"
    root = broken(tmp_path, what)
    with pytest.raises(UsageError) as error:
        create_dataset("folder", root, split, size=16)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no such file; write it with numpy.savez('data.npz', x=x, y=y)"),
        ({"x": np.zeros((2, 3, 4, 4))}, "not a readable .npz file with arrays x and y (KeyError)"),
        (
            {"x": np.zeros((2, 3, 4, 4)), "y": np.zeros(2, int)},
            "x is float64 (2, 3, 4, 4), expected uint8 [N, C",
        ),
        ({"x": np.zeros((2, 3, 4, 4), np.uint8), "y": np.zeros(3, int)}, "expected 2 labels from 0 on"),
        ({"x": np.zeros((2, 3, 4, 4), np.uint8), "y": np.array([-1, 0])}, "expected 2 labels from 0 on"),
    ],
)
def test_arrays_of_another_kind(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    if values:
        np.savez(tmp_path / "data.npz", **values)
    with pytest.raises(UsageError) as error:
        create_dataset("arrays", tmp_path, "train")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "mean needs 3 numbers, or 1 with gray=true, got [0.5]"),
        ({"std": ()}, "std needs 3 numbers, or 1 with gray=true, got []"),
        ({"mean": 0.5}, "mean needs 3 numbers, or 1 with gray=true, got 0.5"),
        ({"mean": (0.5, 0.5, 0.5), "gray": True}, "mean needs 1 number with gray=true, got [0.5, 0.5, 0.5]"),
        ({"std": (1.0, 0.0, 1.0)}, "each of std must be a number from 1e-06 to 1e+06, got 0.0"),
        ({"std": (-1.0, 1.0, 1.0)}, "each of std must be a number from 1e-06 to 1e+06, got -1.0"),
        ({"std": (1.0, 1.0, float("inf"))}, "each of std must be a number from 1e-06 to 1e+06, got inf"),
        ({"mean": (0.5, 0.5, float("nan"))}, "each of mean must be a number from -1e+06 to 1e+06, got nan"),
    ],
)
def test_a_normalisation_that_is_none(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        create_dataset("folder", classes(tmp_path, picture, 2), "train", **options)
    assert str(error.value) == message


def test_a_normalisation_of_other_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 2, 5, 5), np.uint8), y=np.array([0, 0, 1, 1]))
    with pytest.raises(UsageError, match=r"std needs 2 numbers, one for each channel of x, got \[1.0\]"):
        create_dataset("arrays", tmp_path, "train", std=(1.0,))


def test_from_folders_to_an_answer(tmp_path: Path) -> None:
    """The command trains on a user's pictures, and names a class by its folder."""
    root, run = classes(tmp_path / "pets", picture, 10), tmp_path / "run"
    found = spikeloom(
        "train",
        "quickstart/own#pictures",
        f"data.root={root}",
        "budget=smoke",
        "--out",
        str(run),
        "model.widths=[8,8,8,8,8]",
        "data.mean=[0.4,0.5,0.6]",
        "data.subset=8",
        "data.test_subset=4",
    )
    assert found.code == 0, found.err
    [answer] = predict(run, [root / "dog" / "03.png"])
    assert answer.name in ("cat", "dog")
    assert answer.label == ["cat", "dog"].index(answer.name)
