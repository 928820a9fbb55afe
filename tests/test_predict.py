"""Answers for a user's own files: they are what the data set would have made of them."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import spikeloom
from helpers.made_events import aedat2, five_bytes, made
from helpers.made_sets import cifar10_dvs_root, nmnist_root, write_wav
from PIL import Image

import spikeloom as package
from spikeloom.data import create_dataset
from spikeloom.data.own_files import own_files
from spikeloom.errors import UsageError
from spikeloom.models import trained_weights
from spikeloom.predict import predict

DIGITS = "weights:report_sew_resnet34/digits"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test images as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    data = create_dataset("digits", None, "test", subset=6)
    for index, image in enumerate(data.images):
        Image.fromarray(image[0].numpy()).save(folder / f"{index}.png")
    (folder / ".hidden").write_text("not a picture")
    return folder


def test_answers_are_those_of_the_network(digits: Path) -> None:
    data = create_dataset("digits", None, "test", subset=6)
    model = package.create_model("report_sew_resnet34", weights="digits")
    with torch.no_grad():
        expected = model(data.encode(data.batch(range(6))[0])).mean(0).softmax(1)
    found = predict(DIGITS, [digits])
    assert [Path(each.file).name for each in found] == [f"{index}.png" for index in range(6)]
    for each, row in zip(found, expected, strict=True):
        assert each.label == int(row.argmax())
        assert each.name == str(each.label) == each.top[0][0]
        assert each.probability == pytest.approx(float(row.max()), abs=1e-5)
        assert [p for _, p in each.top] == pytest.approx(sorted(row.tolist(), reverse=True)[:3], abs=1e-5)
        assert each.spikes > 0
        assert each.energy_uJ > 0
        assert each.ms > 0
        assert each.by == "engine"
    assert [each.label for each in found] == data.labels.tolist()


def test_the_command(digits: Path) -> None:
    found = spikeloom("predict", DIGITS, str(digits / "0.png"), str(digits), "--top", "2")
    assert (found.code, found.err) == (0, "")
    assert found.out.count("spikes, ") == 7
    assert f"{digits / '0.png'}: " in found.out
    rows = json.loads(spikeloom("predict", DIGITS, str(digits), "--json", "--top", "2").out)
    assert [len(row["top"]) for row in rows] == [2] * 6
    table = list(csv.DictReader(io.StringIO(spikeloom("predict", DIGITS, str(digits), "--csv").out)))
    assert [row["class"] for row in table] == [row["name"] for row in rows]
    assert [int(row["spikes"]) for row in table] == [row["spikes"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png"], "none.png: no such file"),
        (["empty"], "empty: a folder without files"),
        (["words.txt"], "words.txt: not a whole JPEG or PNG picture: it is neither"),
        (["words.txt", "--json", "--csv"], "--csv and --json are two ways to print"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("seven")
    found = spikeloom("predict", DIGITS, *words)
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert message in found.err


def test_pictures_of_another_size_and_kind(tmp_path: Path) -> None:
    """The square in the middle, at the set's side; colours for CIFAR, brightness for digits."""
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 10:70] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    paths = [tmp_path / "wide.png"]
    cifar = own_files("cifar10", {}, paths, 10)
    assert torch.equal(cifar.images[0], torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32))
    assert cifar.classes[3] == "cat"
    assert own_files("cifar10", {"resize": 64}, paths, 10).input_shape == (3, 64, 64)
    grey = own_files("mnist", {"size": 32}, paths, 10)
    assert grey.images.shape == (1, 1, 32, 32)
    assert grey.images[0, 0, 16, 16] == 76  # 0.299 x 255
    assert grey.images[0, 0, 0, 0] == 0  # padding
    assert own_files("sequential_cifar10", {}, paths, 10).encode(torch.zeros(1, 3, 32, 32)).shape == (32, 1, 3, 32)
    assert own_files("imagenet", {"size": 48, "resize": 56}, paths, 1000).images.shape == (1, 3, 48, 48)


def test_recordings_are_framed_as_the_data_set_frames_them(tmp_path: Path) -> None:
    root = nmnist_root(tmp_path, 1)
    for options in ({"T": 4}, {"frames": "bins", "dt": 5.0, "polarity": 0, "flatten": True}, {"T": 3, "size": 16}):
        data = create_dataset("nmnist", root, "test", **options)
        paths = [root / "NMNIST" / "Test" / str(digit) / "00009.bin" for digit in range(10)]
        assert torch.equal(own_files("nmnist", options, paths, 10).batch(range(10))[0], data.batch(range(10))[0])
    (tmp_path / "own.bin").write_bytes(five_bytes(made(300, 34, 34, 1)))
    assert own_files("nmnist", {}, [tmp_path / "own.bin"], 10).batch([0])[0].shape == (1, 10, 2, 34, 34)


def test_cifar10_dvs_is_turned_upright(tmp_path: Path) -> None:
    root = cifar10_dvs_root(tmp_path, 10)
    data = create_dataset("cifar10_dvs", root, "test", T=4)
    paths = [root / "CIFAR10DVS" / name / f"cifar10_{name}_9.aedat" for name in data.classes]
    assert torch.equal(own_files("cifar10_dvs", {"T": 4}, paths, 10).batch(range(10))[0], data.batch(range(10))[0])
    (tmp_path / "other.aedat").write_bytes(aedat2(made(60, 128, 128, 1)))
    assert (
        own_files("dvs_gesture", {"T": 4, "other": False}, [tmp_path / "other.aedat"], 10).classes[-1] == "air_guitar"
    )


def test_sound_is_encoded_as_the_data_set_encodes_it(tmp_path: Path) -> None:
    folder = tmp_path / "FSDD" / "recordings"
    folder.mkdir(parents=True)
    for take in range(2):
        samples = np.random.default_rng(take).integers(-9000, 9000, 3000 + 900 * take).astype(np.int16)
        write_wav(folder / f"7_theo_{take}.wav", samples)
    data = create_dataset("fsdd", tmp_path, "test", T=50)
    paths = sorted(folder.iterdir())
    assert torch.equal(own_files("fsdd", {"T": 50}, paths, 10).batch(range(2))[0], data.batch(range(2))[0])
    [answer] = predict("weights:paralif_shd/fsdd", [paths[0]])
    assert answer.by == "network"  # the engine has no ParaLIF
    assert 0 <= answer.label < 10


def test_a_network_for_data_without_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a network for shd takes no files"):
        own_files("shd", {}, [tmp_path], 20)


def test_a_file_that_does_not_fit_the_network_is_one_line(tmp_path: Path) -> None:
    """Frames of another size than the network's linear layer has weights for."""
    run, recording = tmp_path / "run", tmp_path / "a.bin"
    shutil.copytree(trained_weights.FOLDER / "colored_mnist_net" / "nmnist", run)
    settings = json.loads((run / "settings.json").read_text())
    settings["settings"]["data"]["size"] = 40
    (run / "settings.json").write_text(json.dumps(settings))
    recording.write_bytes(five_bytes(made(300, 34, 34, 1)))
    found = spikeloom("predict", str(run), str(recording))
    assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
    assert f"cannot take {recording} of shape (10, 1, 2, 40, 40)" in found.err
