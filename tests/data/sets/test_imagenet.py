"""ImageNet's folders, here of made pictures: which are taken, how they are cut, and what is wrong with them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikeloom.data import create_dataset
from spikeloom.data.sets.imagenet import Pictures
from spikeloom.errors import DataFileError, UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("n01", "n02")):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                value = 100 * label + 10 * i
                Image.new("RGB", (40 + 20 * i, 60), (value, value + 1, value + 2)).save(folder / f"{i}.png")
            (folder / "notes.txt").write_text("not a picture")
    return tmp_path


def test_pictures_and_labels(root: Path) -> None:
    train = create_dataset("imagenet", root, "train", size=32)
    test = create_dataset("imagenet", root, "test", size=32)
    assert (len(train), len(test), train.classes) == (6, 4, ["n01", "n02"])
    assert train.title == "ImageNet folders of 6 pictures"
    assert train.input_shape == (3, 32, 32)
    x, y = train.batch([5, 0])
    assert y.tolist() == [1, 0]
    mean, std = torch.tensor(train.mean), torch.tensor(train.std)
    expected = (torch.tensor([[120.0, 121.0, 122.0], [0.0, 1.0, 2.0]]) / 255 - mean) / std
    torch.testing.assert_close(x, expected[:, :, None, None].expand(2, 3, 32, 32))
    assert torch.equal(train[5][0], x[0])
    half = create_dataset("imagenet", root, "train", size=32, subset=2)
    assert half.labels.tolist() == [0, 1]
    assert "2 of 6" in half.title


def test_the_middle_is_cut_out(root: Path) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = np.arange(64, dtype=np.uint8)[:, None, None]
    Image.fromarray(pixels).save(root / "imagenet" / "train" / "n01" / "0.png")
    dataset = create_dataset("imagenet", root, "train", size=64)
    assert torch.equal(dataset.images[0], torch.from_numpy(pixels[:, 32:96]).permute(2, 0, 1))
    enlarged = create_dataset("imagenet", root, "train", size=64, resize=128).images[0]
    assert enlarged.shape == (3, 64, 64)
    assert enlarged[0, 0].float().mean() == pytest.approx(16, abs=1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])  # what Pillow makes of such a file has changed
@pytest.mark.parametrize("gray", [True, False])
def test_pictures_of_16_bits(root: Path, mode: str, gray: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.tile([0, 257, 32700, 65535], (4, 1)).astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    opened = Image.fromarray(values)
    assert opened.mode == mode
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened)
    read = Pictures([root / "imagenet" / "train" / "n01" / "0.png"], 4, 4, 1 if gray else 3)[0]
    assert read.tolist() == [[[0, 1, 127, 255]] * 4] * (1 if gray else 3)


def test_a_file_of_16_bits(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 25_700, np.uint16)).save(root / "imagenet" / "train" / "n01" / "0.png")
    assert create_dataset("imagenet", root, "train", size=32).images[0].unique().tolist() == [100]


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_random_part_of_the_whole_picture(root: Path, name: str) -> None:
    ramp = np.arange(128, dtype=np.uint8).repeat(64).reshape(128, 64).T  # brightness is the column
    for part in ("train", "val"):
        Image.fromarray(ramp).save(root / "imagenet" / part / "n01" / "0.png")
    (root / "imagenet" / "val").rename(root / "imagenet" / ("val" if name == "imagenet" else "test"))
    where = root if name == "imagenet" else root / "imagenet"
    train, test = (create_dataset(name, where, part, size=32, min_area=0.1) for part in ("train", "test"))
    torch.manual_seed(1)
    drawn = torch.stack([train.images[0] for _ in range(64)])
    columns = drawn[:, 0, 0].float()
    assert columns.min() < 16, "left of the middle square"
    assert columns.max() > 112, "right of it"
    assert (columns.diff(dim=1) >= 0).all()
    widths = columns[:, -1] - columns[:, 0]
    assert widths.min() > 20, "a tenth of the area, as 3 to 4"
    assert widths.std() > 5
    torch.manual_seed(1)
    assert torch.equal(train.images[0], drawn[0])
    assert torch.equal(test.images[0], test.images[0])
    assert test.images[0][0, 0].tolist() == pytest.approx(range(33, 96, 2), abs=2), "the middle of test pictures"


@pytest.mark.parametrize("wrong", [0, 1.5, True, "0.1"])
def test_a_wrong_part(root: Path, wrong: object) -> None:
    with pytest.raises(UsageError, match="min_area must be a number above 0 and at most 1, got"):
        create_dataset("imagenet", root, "train", min_area=wrong)


def test_what_is_wrong(root: Path) -> None:
    with pytest.raises(DataFileError, match=r"ImageNet is not in .*: no file .*n01440764; .* get ILSVRC2012"):
        create_dataset("imagenet", root / "elsewhere" / "below", "train")
    with pytest.raises(UsageError, match="resize must be an integer of at least 64, size, got 32"):
        create_dataset("imagenet", root, "train", size=64, resize=32)
    (root / "imagenet" / "train" / "n01" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataFileError, match=r"0\.png: not a whole JPEG or PNG picture"):
        create_dataset("imagenet", root, "train", size=32).batch([0])


def test_parts_with_other_classes_are_refused(root: Path) -> None:
    # Labels would be shifted: n02 of one part is not n02 of the other.
    (root / "imagenet" / "val" / "n00").mkdir()
    for split in ("train", "test"):
        with pytest.raises(DataFileError, match="class n00 has a folder in one of train/ and val/ alone"):
            create_dataset("imagenet", root, split, size=32)
    (root / "imagenet" / "train").rename(root / "imagenet" / "elsewhere")
    assert create_dataset("imagenet", root, "test", size=32).classes == ["n00", "n01", "n02"]


def png(header: bytes, *others: bytes) -> bytes:
    pixels = (b"IDAT", zlib.compress(bytes(13)))
    chunks = [(b"IHDR", header), *((name, b"") for name in others), pixels, (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int) -> bytes:
    return struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(bytes(4)), "Truncated IHDR chunk"),  # a ValueError of Pillow
        (png(header(4, 1), b"\xff\xff\xff\xff"), "it is neither"),  # a SyntaxError, which Pillow keeps
        (png(header(1, 2**20)), "1x1048576 pixels"),  # 32 GB when enlarged
        (png(header(2**15, 2**15)), "exceeds limit"),
        (b"GIF89a" + bytes(40), "it is neither"),
    ],
    ids=["header", "chunk", "long", "large", "GIF"],
)
def test_damaged_pictures(root: Path, data: bytes, reason: str) -> None:
    (root / "imagenet" / "train" / "n01" / "0.png").write_bytes(data)
    with pytest.raises(DataFileError, match=rf"0\.png: not a whole JPEG or PNG picture: .*{reason}"):
        create_dataset("imagenet", root, "train", size=32, resize=100).__getitems__([0])


def test_images_may_be_enlarged() -> None:
    from spikeloom.data import ImageDataset

    images = torch.full((2, 3, 8, 8), 51, dtype=torch.uint8)
    made = {"name": "x", "title": "x", "classes": ["a"], "mean": (0.2, 0.2, 0.2), "std": (1.0, 1.0, 1.0)}
    dataset = ImageDataset(images, torch.zeros(2, dtype=torch.int64), **made, resize=20)
    assert dataset.input_shape == (3, 20, 20)
    x, _ = dataset.batch([0, 1])
    assert x.shape == (2, 3, 8, 8), "augmentation comes before"
    torch.testing.assert_close(dataset.encode(x), torch.zeros(2, 3, 20, 20), rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="resize must be an integer from 1 to 4096, got 0"):
        ImageDataset(images, torch.zeros(2, dtype=torch.int64), **made, resize=0)
