"""Event data sets: the folders of the originals, frames, labels, splits and the cache, on made and real recordings."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.made_events import aedat3, aedat4, five_bytes, made
from helpers.made_sets import caltech_root, cifar10_dvs_root, gesture_root, nmnist_root, tonic_gestures

from spikeloom.data import DATASETS, EventFileError, Events, FrameDataset, create_dataset, event_frames
from spikeloom.data.cache import cache_folder
from spikeloom.errors import DataFileError, UsageError

NAMES = ("nmnist", "cifar10_dvs", "dvs_gesture", "n_caltech101", "shd", "n_tidigits")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPIKELOOM_CACHE", str(folder))
    return folder


def loaded(name: str, root: Path, split: str = "train", **options: object) -> FrameDataset:
    data = create_dataset(name, root, split, **options)
    assert isinstance(data, FrameDataset)
    return data


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_set_names_the_page(tmp_path: Path, name: str) -> None:
    assert name in DATASETS
    with pytest.raises(DataFileError, match=r"is not in .*: no file .* get .*https://") as caught:
        create_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no folder to read"):
        create_dataset(name)


def test_nmnist(tmp_path: Path) -> None:
    data = loaded("nmnist", nmnist_root(tmp_path), frames="count", T=6)
    assert (len(data), data.title) == (30, "N-MNIST files of 30 recordings")
    assert data.labels.tolist() == [d for d in range(10) for _ in range(3)]
    assert (data.in_channels, data.input_shape) == (2, (2, 34, 34))
    x, y = data.batch([7, 0])
    assert (x.dtype, x.shape, y.tolist()) == (torch.float32, (2, 6, 2, 34, 34), [2, 0])
    # Files are taken by number: 9, 19, 29.
    assert torch.equal(x[0].long(), event_frames(made(300, 34, 34, 12), "count", 6))
    assert torch.equal(data.encode(x)[3, 1], x[1, 3])
    assert torch.equal(data[7][0], x[0])
    assert data[7][1] == 2
    fewer = loaded("nmnist", tmp_path, subset=10)
    assert fewer.labels.tolist() == list(range(10))
    assert fewer.title == "N-MNIST files of 30 recordings, 10 of 30 recordings"


def test_windows_of_fixed_length_are_padded_in_front(tmp_path: Path) -> None:
    root = nmnist_root(tmp_path, 1)
    (root / "NMNIST" / "Train" / "0" / "00009.bin").write_bytes(five_bytes(made(50, 34, 34, 5, span=20_000)))
    data = loaded("nmnist", root, frames="bins", dt=5.0, polarity=0, flatten=True)
    assert (data.in_channels, data.input_shape) == (34 * 34, (34 * 34,))
    x, _ = data.batch([0, 1])
    short, long = data[0][0], data[1][0]
    assert len(short) == 4
    assert len(long) == 20
    assert torch.equal(x[0, -4:], short)
    assert x[0, :-4].sum() == 0
    assert torch.equal(x[1], long)
    e = made(300, 34, 34, 1)
    assert torch.equal(long.long().view(20, 34, 34), event_frames(e, "bins", dt=5.0)[:, 0])


def test_cifar10_dvs_splits(tmp_path: Path) -> None:
    root = cifar10_dvs_root(tmp_path)
    names = {"last": ([*range(18)], [18, 19]), "first": ([*range(2, 20)], [0, 1])}
    for test_part, (train, test) in names.items():
        for split, numbers in (("train", train), ("test", test)):
            data = loaded("cifar10_dvs", root, split, T=2, test_part=test_part)
            assert torch.bincount(data.labels).tolist() == [len(numbers)] * 10
            for i in (0, len(numbers) - 1):
                # Upright: x is 127 - the stored y, brighter is the stored 0.
                e = made(60, 128, 128, numbers[i])
                upright = Events(e.t, 127 - e.y, 127 - e.x, 1 - e.p, 128, 128)
                assert torch.equal(data[i][0].long(), event_frames(upright, "count", 2))
    parts = [loaded("cifar10_dvs", root, split, T=2, test_part="random") for split in ("train", "test")]
    assert [len(part) for part in parts] == [180, 20]
    seen = {part[i][0].numpy().tobytes() for part in parts for i in range(len(part))}
    assert len(seen) == 200, "every recording is in one part"
    assert all(
        a.equal(b)
        for a, b in zip(
            loaded("cifar10_dvs", root, "test", T=2, test_part="random")[3][:1], parts[1][3][:1], strict=True
        )
    )
    with pytest.raises(UsageError, match="test_part must be last, first or random"):
        create_dataset("cifar10_dvs", root, test_part="middle")


def test_cifar10_dvs_sizes(tmp_path: Path) -> None:
    root = cifar10_dvs_root(tmp_path, 10, ".aedat4")
    whole = loaded("cifar10_dvs", root, "test", T=2)
    small = loaded("cifar10_dvs", root, "test", T=2, downsample=3.04)
    assert small.input_shape == (2, 42, 42)
    assert small[0][0].sum() == whole[0][0].sum() == 60
    for resize in ("nearest", "bilinear", "bilinear_corners"):
        resized = loaded("cifar10_dvs", root, "test", T=2, size=48, resize=resize)
        assert resized.input_shape == (2, 48, 48)
        corners = {"align_corners": True} if resize == "bilinear_corners" else {}
        wanted = torch.nn.functional.interpolate(whole[0][0], (48, 48), mode=resize.split("_")[0], **corners)
        assert torch.equal(resized[0][0], wanted)
    for options, reason in (({"downsample": 0.5}, "downsample must be a number from 1"), ({"size": 0}, "size must be")):
        with pytest.raises(UsageError, match=reason):
            create_dataset("cifar10_dvs", root, **options)


def test_dvs_gesture_originals(tmp_path: Path) -> None:
    root = gesture_root(tmp_path)
    data = loaded("dvs_gesture", root, T=4)
    assert data.labels.tolist() == [7, 10, 7, 7, 10, 7]
    assert loaded("dvs_gesture", root, "test", T=4).labels.tolist() == [7, 10, 7]
    e = made(500, 128, 128, 1, 10_000)
    inside = (e.t >= 1000) & (e.t < 3000)
    cut = Events(e.t[inside], e.x[inside], e.y[inside], e.p[inside], 128, 128)
    assert torch.equal(data[0][0].long(), event_frames(cut, "count", 4))
    ten = loaded("dvs_gesture", root, T=4, other=False, size=64, resize="nearest")
    assert (ten.labels.tolist(), len(ten.classes), ten.input_shape) == ([7, 7, 7, 7], 10, (2, 64, 64))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("12,1,2", "line 2: class 12, expected 1 to 11"),
        ("0,1,2", "class 0"),
        ("3,9,9", "before its start"),
        ("a,1,2", "line 2 is 'a,1,2'"),
        ("²,1,2", "line 2 is '²,1,2'"),
        ("1 2 3", "line 2 is '1 2 3'"),
        ("3,1", "expected class,start,end"),
        ("3,90000,99999", "of 0 events is too short"),
    ],
)
def test_dvs_gesture_wrong_labels(tmp_path: Path, cache: Path, line: str, reason: str) -> None:
    root = gesture_root(tmp_path, f"class,start,end\n{line}\n")
    with pytest.raises(DataFileError, match=reason) as caught:
        create_dataset("dvs_gesture", root)
    assert "user01_led" in str(caught.value)
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    "labels",
    [
        "class, startTime_usec, endTime_usec\n8, 1000, 3000\n11,\t3000, 9000 \n 8,9000,9900\n\n",
        "\ufeffclass,start,end\r\n8,1000,3000\r\n\r\n11,3000,9000\r\n8,9000,9900",
    ],
    ids=["spaces", "as a spreadsheet writes it"],
)
def test_dvs_gesture_labels_as_people_write_them(tmp_path: Path, labels: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data = loaded("dvs_gesture", gesture_root(tmp_path / "a", labels), T=4)
    plain = loaded("dvs_gesture", gesture_root(tmp_path / "b"), T=4)
    assert data.labels.tolist() == plain.labels.tolist()
    assert all(torch.equal(data[i][0], plain[i][0]) for i in range(len(plain)))


@pytest.mark.parametrize("name", ["nmnist", "cifar10_dvs", "dvs_gesture", "tonic's dvs_gesture", "n_caltech101"])
def test_events_outside_are_dropped_where_asked(tmp_path: Path, name: str) -> None:
    """One event of one recording lies outside: it refuses the set, or is left out and counted."""
    kind = name.split()[-1]
    t, one = np.arange(100), np.ones(100, np.int16)
    e = Events(t, one.copy(), one.copy(), one.copy(), 256, 256)
    e.x[50] = 250
    if name == "nmnist":
        path, data = nmnist_root(tmp_path, 1) / "NMNIST" / "Train" / "3" / "00009.bin", five_bytes(e)
    elif name == "cifar10_dvs":
        path, data = cifar10_dvs_root(tmp_path, 10, ".aedat4") / "CIFAR10DVS" / "cat" / "cifar10_cat_3.aedat4", None
        data = aedat4(e)
    elif name == "dvs_gesture":
        root = gesture_root(tmp_path, "class,start,end\n3,0,100\n")
        path, data = root / "DVSGesture" / "DvsGesture" / "user01_led.aedat", aedat3(e)
    elif name == "n_caltech101":
        for i in range(101):
            (tmp_path / "Caltech101" / f"class_{i:03}").mkdir(parents=True)
            (tmp_path / "Caltech101" / f"class_{i:03}" / "image_0001.bin").write_bytes(five_bytes(made(9, 150, 170)))
        path, data = tmp_path / "Caltech101" / "class_007" / "image_0001.bin", five_bytes(e)
    else:
        tonic_gestures(tmp_path, np.stack([e.x, e.y, e.p, e.t // 10], 1))
        path, data = tmp_path / "DVSGesture" / "ibmGestureTrain" / "user01_led" / "3.npy", None
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(EventFileError, match="x = 250, y = 1, outside the sensor"):
        create_dataset(kind, tmp_path, T=1)
    with pytest.warns(
        UserWarning, match=r"left out 1 of 100 events, which lie outside the sensor of \d+x\d+"
    ) as warned:
        found = loaded(kind, tmp_path, T=1, outside="drop")
    assert str(path) in str(warned[0].message)
    assert found.title.endswith(", without events outside the sensor")
    assert 99 in [int(found[i][0].sum()) for i in range(len(found))]
    with pytest.raises(UsageError, match="outside must be 'error' or 'drop', got 'clip'"):
        create_dataset(kind, tmp_path, outside="clip")


def test_dvs_gesture_of_tonic(tmp_path: Path) -> None:
    e = made(200, 128, 128, span=500)
    data = loaded("dvs_gesture", tonic_gestures(tmp_path, np.stack([e.x, e.y, e.p, e.t], 1).astype(np.float64)), T=4)
    assert data.labels.tolist() == [3]
    assert torch.equal(data[0][0].long(), event_frames(e, "count", 4))


@pytest.mark.parametrize(
    ("rows", "label", "reason"),
    [
        (np.array([{}], object), "1", r"not a readable \.npy file of numbers \(ValueError\)"),
        (np.zeros((4, 3)), "1", r"holds float64 \(4, 3\), expected"),
        (np.full((4, 4), np.nan), "1", "no coordinates or times"),
        (np.full((40, 4), 2), "1", "polarities other than 0 and 1"),
        (np.array([[128, 0, 0, 0]] * 20), "1", "event 0 is at x = 128, y = 0, outside"),
        (np.array([[1, 0, 0, 9]] * 10 + [[1, 0, 0, 2]] * 10), "1", "event 10 is 7000 us earlier"),
        (np.zeros((40, 4)), "11", "label '11' out of range"),
    ],
)
def test_dvs_gesture_of_tonic_damaged(tmp_path: Path, cache: Path, rows: np.ndarray, label: str, reason: str) -> None:
    with pytest.raises(DataFileError, match=reason) as caught:
        create_dataset("dvs_gesture", tonic_gestures(tmp_path, rows, label))
    assert ".npy: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))


def test_n_caltech101(tmp_path: Path) -> None:
    data = loaded("n_caltech101", caltech_root(tmp_path), "test", T=2)
    assert data.labels.tolist() == list(range(101))
    assert data.input_shape == (2, 180, 240)
    assert len(loaded("n_caltech101", tmp_path, "train", T=1, subset=101)) == 101
    (tmp_path / "Caltech101" / "class_102").mkdir()
    with pytest.raises(DataFileError, match="there are 102 of 101 classes"):
        create_dataset("n_caltech101", tmp_path)


def test_downloads_are_left_to_tonic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def fetch(folder: str, train: bool) -> None:
        asked.append((folder, train))
        nmnist_root(Path(folder), 1)

    monkeypatch.setitem(sys.modules, "tonic.datasets", SimpleNamespace(NMNIST=fetch))
    assert len(loaded("nmnist", tmp_path, "test", download=True)) == 10
    assert asked == [(str(tmp_path), False)]
    loaded("nmnist", tmp_path, "test", download=True)
    assert len(asked) == 1, "what is there is not fetched"
    with pytest.raises(UsageError, match=r"CIFAR10DVS could not be downloaded into .*AttributeError"):
        create_dataset("cifar10_dvs", tmp_path, download=True)
    monkeypatch.setitem(sys.modules, "tonic.datasets", None)
    with pytest.raises(UsageError, match=r"needs tonic: pip install 'spikeloom\[events\]'"):
        create_dataset("shd", tmp_path, download=True)


def test_what_is_used_of_tonic_is_there() -> None:
    datasets = pytest.importorskip("tonic.datasets")
    for name in ("NMNIST", "CIFAR10DVS", "DVSGesture", "NCALTECH101", "SHD", "NTIDIGITS18"):
        known = inspect.signature(getattr(datasets, name)).parameters
        assert next(iter(known)) == "save_to"
        assert ("train" in known) == (name not in ("CIFAR10DVS", "NCALTECH101"))


# --- the cache --------------------------------------------------------------------------------------------------------


def entries(cache: Path) -> list[str]:
    return sorted(path.suffix for path in cache.glob("*"))


def test_frames_come_from_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = nmnist_root(tmp_path, 1)
    first = loaded("nmnist", root, T=4)
    assert cache_folder() == cache
    assert entries(cache) == [".frames", ".json"]
    with monkeypatch.context() as patch:
        patch.setattr("spikeloom.data.sets.dvs.read_events", lambda *_: pytest.fail("read again"))
        again = loaded("nmnist", root, T=4)
        assert all(torch.equal(first[i][0], again[i][0]) for i in range(10))
    # Other options, another part, other files: other entries.
    loaded("nmnist", root, T=5)
    loaded("nmnist", root, frames="time", T=4)
    loaded("nmnist", root, "test", T=4)
    assert len(entries(cache)) == 8
    path = root / "NMNIST" / "Train" / "4" / "00009.bin"
    path.write_bytes(five_bytes(made(300, 34, 34, 77)))
    os.utime(path, (1, 1))
    assert torch.equal(loaded("nmnist", root, T=4)[4][0].long(), event_frames(made(300, 34, 34, 77), "count", 4))


@pytest.mark.parametrize("damage", ["frames cut", "index cut", "index of another type", "frames gone"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, cache: Path, damage: str) -> None:
    root = nmnist_root(tmp_path, 1)
    before = loaded("nmnist", root, T=4)[3][0]
    frames, index = next(cache.glob("*.frames")), next(cache.glob("*.json"))
    if damage == "frames gone":
        frames.unlink()
    elif damage == "index of another type":
        index.write_text('{"lengths": 3, "dtype": "object"}')
    else:
        path = frames if damage == "frames cut" else index
        path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(loaded("nmnist", root, T=4)[3][0], before)


@pytest.mark.parametrize(("count", "dtype"), [(255, "uint8"), (256, "uint16"), (66_000, "uint32")])
def test_counts_are_never_cut(tmp_path: Path, cache: Path, count: int, dtype: str) -> None:
    root = nmnist_root(tmp_path, 1, 20)
    e = Events(*(np.zeros(count, np.int64) for _ in range(4)), 34, 34)
    (root / "NMNIST" / "Train" / "9" / "00009.bin").write_bytes(five_bytes(e))
    data = loaded("nmnist", root, T=1)
    assert data[9][0].max() == count
    assert data.counts.frames.dtype == dtype
    assert entries(cache) == [".frames", ".json"]


def test_bad_files_leave_nothing_behind(tmp_path: Path, cache: Path) -> None:
    root = nmnist_root(tmp_path, 1)
    bad = root / "NMNIST" / "Train" / "6" / "00009.bin"
    for data, reason in (
        (b"", "the file is empty"),
        (five_bytes(made(300, 34, 34))[:-1], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(92), "a PNG picture"),
        (five_bytes(made(300, 128, 128)), "outside the sensor of 34x34"),
        (five_bytes(made(5, 34, 34)), "a recording of 5 events is too short, expected at least 10"),
    ):
        bad.write_bytes(data)
        with pytest.raises(EventFileError, match=reason) as caught:
            create_dataset("nmnist", root, T=10)
        assert str(bad) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(cache.glob("*"))
    (root / "NMNIST" / "Train" / "10").mkdir()
    with pytest.raises(DataFileError, match="label '10' out of range"):
        create_dataset("nmnist", root)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIKELOOM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"cannot write .*nmnist.*\.frames: .*set SPIKELOOM_CACHE"):
        create_dataset("nmnist", nmnist_root(tmp_path, 1))


def test_leftovers_of_killed_processes_go(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    old, new = cache / ".a.frames.1.tmp", cache / ".b.frames.2.tmp"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (1, 1))
    loaded("nmnist", nmnist_root(tmp_path, 1), T=4)
    assert not old.exists()
    assert new.exists()


def test_several_processes_make_the_same_entry(tmp_path: Path, cache: Path) -> None:
    root = nmnist_root(tmp_path, 20)
    code = (
        "import os, sys, hashlib, numpy as np\n"
        "from spikeloom.data import create_dataset\n"
        "child = os.fork()\n"  # now both begin at once
        "data = create_dataset('nmnist', sys.argv[1], T=4)\n"
        "found = hashlib.sha256(np.ascontiguousarray(data.counts.frames).tobytes()).hexdigest()\n"
        "os.write(1, f'{len(data)} {found}\\n'.encode())\n"  # in one piece: print may write several
        "sys.exit(os.waitpid(child, 0)[1] if child else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True, timeout=100, check=True
    )
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert len(set(answers)) == 1
    assert answers[0].startswith("200 ")
    assert entries(cache) == [".frames", ".json"]
    assert not list(cache.glob(".*"))


# --- real recordings --------------------------------------------------------------------------------------------------


def test_the_real_nmnist(real_data: Callable[[str], Path]) -> None:
    root = real_data("NMNIST")
    data = loaded("nmnist", root, "test")
    assert torch.bincount(data.labels).tolist() == [8, 14, 8, 11, 14, 7, 10, 15, 2, 11]
    x, y = data.batch(range(100))
    assert x.shape == (100, 10, 2, 34, 34)
    # A pixel's events over all frames show the digits: a nearest mean on the test part itself tells most apart.
    pictures = torch.nn.functional.normalize(x.sum((1, 2)).flatten(1))
    means = torch.stack([pictures[y == digit].mean(0) for digit in range(10)])
    assert ((pictures @ means.T).argmax(1) == y).float().mean() > 0.7
