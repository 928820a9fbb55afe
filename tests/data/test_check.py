"""What is there of a data set, and what is missing: of real files and of made ones in the layout of the originals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import spikeloom
from helpers.golden_vectors import shared_folder
from helpers.made_files import jpeg_bytes, write_cifar10
from helpers.made_sets import SAME_FILES, nmnist_root
from PIL import Image

from spikeloom.data import DATASETS, SOURCES, create_dataset
from spikeloom.data.check import check_dataset
from spikeloom.errors import DataFileError, UsageError

OPTIONS = {"recordings": ("data.sensor=[128,128]", "data.T=4"), "imagenet": ("data.size=224", "data.resize=256")}
SHAPES = {  # of a sample
    "imagenet": [3, 224, 224],
    "cifar10_dvs": [10, 2, 128, 128],
    "dvs_gesture": [10, 2, 128, 128],
    "n_caltech101": [10, 2, 180, 240],
    "shd": [15, 700],
}
REAL = {  # samples of both parts, and classes, of the files that are kept beside the repository
    "mnist": (60_000, 10_000, 10),
    "cifar10": (50_000, 8_000, 10),
    "nmnist": (1_000, 100, 10),
    "fsdd": (2_400, 300, 10),
}
MADE = {  # of made files
    "digits": (1_438, 359, 10),
    "mnist": (60_000, 100, 10),
    "cifar10": (100, 100, 10),
    "nmnist": (30, 30, 10),
    "fsdd": (100, 100, 10),
    "imagenet": (100, 100, 100),
    "cifar10_dvs": (180, 20, 10),
    "dvs_gesture": (24, 12, 11),
    "n_caltech101": (1010, 101, 101),
    "shd": (40, 20, 20),
    "n_tidigits": (22, 22, 11),
    "cifar100": (200, 100, 100),
    "folder": (16, 4, 2),
    "recordings": (16, 4, 2),
    "audio": (16, 4, 2),
    "arrays": (16, 4, 2),
    "colored_mnist": (40_000, 20_000, 2),
}


def test_every_data_set_says_where_it_comes_from() -> None:
    assert list(SOURCES) == list(DATASETS)
    for name, source in SOURCES.items():
        assert source.title
        if source.classes and source.layout:
            assert "https://" in source.get, name
            assert set(source.published) in ({"train", "test"}, {"both"}, set()), name


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_there(name: str, data_of: Callable[[str], Path], tmp_path: Path) -> None:
    root, picture = data_of(name), tmp_path / "sample.png"
    words = (name, f"data.root={root}", *OPTIONS.get(name, ()), f"--picture={picture}")
    result = spikeloom("data", "check", *words, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found["usable"]
    assert found["picture"] == str(picture)
    source = SOURCES[name]
    assert found["folder"] == (str(root) if source.layout else None)
    assert [list(files) for files in found["files"]] == [list(paths) for paths in source.layout]
    assert not source.layout or any(all(files.values()) for files in found["files"])
    train, test = (found["parts"][split] for split in ("train", "test"))
    kind = name if name in MADE else SAME_FILES[name]
    expected = REAL[kind] if kind in REAL and source.is_in(shared_folder() / "data") else MADE[kind]
    assert (train["samples"], test["samples"], train["classes"]) == expected
    for split, part in found["parts"].items():
        assert part["published"] == source.published.get(split)
        assert part["shape"] == SHAPES.get(name, part["shape"])
        assert part["dtype"] == "float32"
        assert part["low"] < part["high"]
        assert part["label"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 180
        assert len(image.getcolors(1 << 20) or range(99)) > 1, "an empty picture"
    text = spikeloom("data", "check", *words)
    assert text.code == 0
    assert text.out.splitlines()[0].startswith(source.title)
    assert text.out.splitlines()[-1].startswith("usable")
    assert f"{found['parts']['train']['samples']:,}" in text.out


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.layout])
def test_what_is_missing(name: str, tmp_path: Path) -> None:
    words = ("data", "check", name, f"data.root={tmp_path}", *OPTIONS.get(name, ()))
    result = spikeloom(*words)
    assert result.code == 2
    [line] = result.err.splitlines()
    assert line.startswith("spikeloom: error: ")
    source = SOURCES[name]
    if source.classes:
        assert source.get in line
    assert str(tmp_path) in line
    for paths in source.layout:
        for path in paths:
            assert f"  missing  {path}\n" in result.out
    as_json = spikeloom(*words, "--json")
    assert (as_json.code, as_json.err) == (2, result.err)
    found = json.loads(as_json.out)
    assert not found["usable"]
    assert not found["parts"]
    assert set(found["errors"]) == {"train", "test"}
    # The same words as of a command that needs the data.
    with pytest.raises(UsageError) as caught:
        create_dataset(name, tmp_path, **({"sensor": (128, 128)} if name == "recordings" else {}))
    assert line == f"spikeloom: error: {caught.value}"


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    shutil.rmtree(nmnist_root(tmp_path) / "NMNIST" / "Test")
    result = spikeloom("data", "check", "nmnist", f"data.root={tmp_path}")
    assert result.code == 2
    assert "found    NMNIST/Train/<digit>/<number>.bin\n" in result.out
    assert "missing  NMNIST/Test/<digit>/<number>.bin\n" in result.out
    assert re.search(r"train\W+30\W+60,000\W+10 of 10", result.out)
    assert "usable" not in result.out
    [line] = result.err.splitlines()
    assert "Test/0/00001.bin" in line


def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    path = nmnist_root(tmp_path) / "NMNIST" / "Test" / "0" / "00009.bin"
    path.write_bytes(b"123")
    found = check_dataset("nmnist", tmp_path)
    assert list(found.parts) == ["train"]
    assert str(path) in found.errors["test"]


def test_a_class_without_samples_shows(tmp_path: Path) -> None:
    shutil.rmtree(nmnist_root(tmp_path) / "NMNIST" / "Train" / "3")
    found = check_dataset("nmnist", tmp_path)
    assert (found.parts["train"].classes, found.parts["test"].classes, found.classes) == (9, 10, 10)
    assert found.incomplete() == ["train 27 of 60,000", "test 30 of 10,000"]


def test_a_set_of_the_published_size_is_called_usable_alone() -> None:
    assert spikeloom("data", "check", "digits").out.splitlines()[-1] == "usable"


def test_the_folder_of_the_set_itself_was_given(tmp_path: Path) -> None:
    nmnist_root(tmp_path)
    for create in (create_dataset, lambda name, root: check_dataset(name, root).errors["train"]):
        try:
            message = create("nmnist", tmp_path / "NMNIST")
        except DataFileError as error:
            message = str(error)
        assert str(message).endswith(f"it is in the folder above, data.root={tmp_path}")


def test_only_a_few_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, read, picture = list[Path](), Path.read_bytes, jpeg_bytes(np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(Path, "read_bytes", lambda path: (opened.append(path), read(path))[1])
    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "imagenet" / part / label).mkdir(parents=True)
            for i in range(200):
                (tmp_path / "imagenet" / part / label / f"{i}.jpeg").write_bytes(picture)
    found = check_dataset("imagenet", tmp_path, size=8)
    assert found.parts["train"].samples == 400
    assert len(opened) <= 12


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("mnis", ["unknown dataset 'mnis'", "did you mean mnist"]),
        ("mnist data.siz=3", ["unknown key 'siz'", "size"]),
        ("mnist data.size=big", ["size", "'big'"]),
        ("recordings data.root=.", ["sensor is missing"]),
        ("mnist data=cifar10", ["the data set is mnist", "without data.name"]),
        ("mnist data.name=cifar10", ["the data set is mnist"]),
        ("mnist data.subset=3", ["data.subset", "all samples"]),
        ("mnist data.validation=0.1", ["data.validation", "all samples"]),
        ("mnist train.lr=3", ["'train'"]),
        ("mnist", ["no folder to read MNIST from", "data.root=FOLDER"]),
        ("digits --picture=a.jpg", [".png"]),
        ("digits --picture=nowhere/a.png", ["cannot write nowhere/a.png"]),
        ("", ["NAME"]),
    ],
)
def test_mistakes_are_one_line(words: str, parts: list[str]) -> None:
    result = spikeloom("data", "check", *words.split())
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert all(part in line for part in parts), line


def test_copies_and_originals_are_told(tmp_path: Path) -> None:
    write_cifar10(tmp_path, 20)
    out = spikeloom("data", "check", "cifar10", f"data.root={tmp_path}").out
    assert "CIFAR10/train.npz" in out
    assert "cifar-10-batches-py" not in out, "a distribution that is whole is shown alone"
