"""Event files: real ones to the last event, made ones there and back, and damaged ones with a clear error."""

from __future__ import annotations

import csv
import hashlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.golden_vectors import shared_folder
from helpers.made_events import (
    FORMATS,
    GAPS,
    aedat2,
    aedat3,
    aedat4,
    aedat4_packet,
    bs1,
    dat,
    davis240,
    evt2,
    evt3,
    five_bytes,
    gappy,
    made,
    st_mnist,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeloom.data import EventFileError, Events, read_events
from spikeloom.data.formats.events import TOLERANCE_US, unwrap
from spikeloom.errors import UsageError

DATA = shared_folder() / "data"


def rows() -> list[dict[str, str]]:
    with (DATA / "events_manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def real_files() -> list[str]:
    """One of each kind of real file; none where they are not installed."""
    if not (DATA / "events_manifest.csv").is_file():
        return []
    first = [next(r["path"] for r in rows() if r["format"] == kind) for kind in sorted({r["format"] for r in rows()})]
    return [*first, "STMNIST/sample.mat", "NTIDIGITS/sample_1.bs1"]


def digest(events: Events) -> str:
    found = hashlib.sha256()
    for column in (events.t, events.x, events.y, events.p):
        found.update(column.astype("<i8").tobytes())
    return found.hexdigest()


def check_valid(e: Events) -> None:
    assert len(e.t) == len(e.x) == len(e.y) == len(e.p)
    assert [a.dtype for a in (e.t, e.x, e.y, e.p)] == [np.int64, np.int16, np.int16, np.uint8]
    if len(e):
        assert e.x.min() >= 0
        assert e.x.max() < e.width
        assert e.y.min() >= 0
        assert e.y.max() < e.height
        assert e.p.max() <= 1
        assert (np.maximum.accumulate(e.t) - e.t).max() <= TOLERANCE_US


def refused(path: Path, reason: str, sensor: tuple[int, int] | None = None) -> str:
    with pytest.raises(EventFileError, match=reason) as caught:
        read_events(path, sensor)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# --- real files -------------------------------------------------------------------------------------------------------


def test_real_files_to_the_last_event(real_data: Callable[[str], Path]) -> None:
    root = real_data("events_manifest.csv")
    for row in rows():
        # What the manifest has of EVT3 was made with expelliarmus.
        events = read_events(root / row["path"], evt3_time="expelliarmus")
        check_valid(events)
        assert len(events) == int(row["events"]), row["path"]
        if len(events):
            assert digest(events) == row["events_sha256"], row["path"]
        # N-CARS' header names no sensor: it is told.
        if row["width"] and row["format"] != "dat":
            assert (events.width, events.height) == (int(row["width"]), int(row["height"])), row["path"]
        told = read_events(root / row["path"], (int(row["width"]), int(row["height"]))) if row["width"] else events
        assert len(told) == len(events)
    assert (told.width, told.height) == (240, 180)


def test_real_touch_and_sound(real_data: Callable[[str], Path]) -> None:
    from scipy.io import loadmat

    path = real_data("STMNIST") / "STMNIST" / "sample.mat"
    events, matrix = read_events(path), loadmat(path)["spiketrain"]
    assert len(events) == 2346
    assert np.array_equal(events.t, np.rint(1e6 * matrix[100]))
    assert np.array_equal(events.y * 10 + events.x, np.abs(matrix[:100]).argmax(0))
    assert np.array_equal(events.p, matrix[:100].sum(0) > 0)
    sound = read_events(real_data("NTIDIGITS") / "NTIDIGITS" / "sample_1.bs1")
    assert (len(sound), sound.t[0], sound.t[-1], sound.x.max(), sound.width) == (898, 0, 1_079_040, 63, 64)


@pytest.mark.parametrize("name", real_files())
def test_memory_stays_below_ten_times_the_file(name: str) -> None:
    size = (DATA / name).stat().st_size
    read_events(DATA / name)  # what is imported on the first call is not the file's
    tracemalloc.start()
    read_events(DATA / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * size + 2**21


# --- made files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 333, 9000])
def test_there_and_back(tmp_path: Path, name: str, n: int) -> None:
    ending, write, (width, height), span = FORMATS[name]
    e = made(n, width, height, seed=n, span=min(span, 2**22 if n < 9 else 2**40))
    if name == "st_mnist":
        e = Events(np.unique(e.t), *(a[: len(np.unique(e.t))] for a in (e.x, e.y, e.p)), 10, 10)
    if name == "bs1":
        e = Events(e.t, e.x, np.zeros_like(e.y), np.ones_like(e.p), 64, 1)
    path = tmp_path / f"made{ending}"
    path.write_bytes(write(e))
    sensor = (34, 34) if name == "five_bytes" else None
    found = read_events(path, sensor)
    check_valid(found)
    assert digest(found) == digest(e)
    assert (found.width, found.height) == (width, height)


@pytest.mark.parametrize("squeeze", ["none", "zstd"])
def test_aedat4_compressions(tmp_path: Path, squeeze: str) -> None:
    if squeeze == "zstd":
        pytest.importorskip("zstandard")
    e = made(500, 320, 240)
    (tmp_path / "a").write_bytes(aedat4(e, squeeze=squeeze))
    assert digest(read_events(tmp_path / "a")) == digest(e)


@pytest.mark.parametrize("name", GAPS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.sampled_from([1, 2, 400]))
def test_gaps_and_turns_of_counters(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int, n: int) -> None:
    """Bursts, long gaps, many turns of each counter, and events up to 1 ms late."""
    ending, write, (width, height), _ = FORMATS[name]
    e = gappy(n, width, height, seed, *GAPS[name])
    if name == "bs1":
        e = Events(e.t, e.x, np.zeros_like(e.y), np.ones_like(e.p), 64, 1)
    path = tmp_path_factory.mktemp("made") / f"made{ending}"
    path.write_bytes(write(e))
    assert digest(read_events(path, (width, height))) == digest(e)


def test_counters_turn_over() -> None:
    def check(t: list[int], wanted: list[int], period: int = 2**32) -> None:
        assert unwrap(np.array(t, np.uint32), period).tolist() == wanted

    check([2**32 - 5, 3, 2], [2**32 - 5, 2**32 + 3, 2**32 + 2])
    check([2, 2**32 - 5, 3], [2, -5, 3])
    check([], [])
    check([7], [7])
    # A gap of more than half a turn, and one across a turn.
    check([5, 3 * 2**30, 3 * 2**30 + 1, 4], [5, 3 * 2**30, 3 * 2**30 + 1, 2**32 + 4])
    # A lone time far ahead is damage: no turn is made of the way back.
    check([5, 3 * 2**30, 6, 7], [5, 3 * 2**30, 6, 7])
    # A step back by less than half a turn is no turn.
    check([2**30, 5], [2**30, 5])


def test_five_bytes_longer_than_the_counter(tmp_path: Path) -> None:
    """20 s of events, one each ms: 23 bits of microseconds turn twice."""
    t = np.arange(0, 20_000_000, 1000)
    e = Events(t, (t // 1000 % 34).astype(np.int16), np.full(len(t), 5, np.int16), np.ones(len(t), np.uint8), 34, 34)
    (tmp_path / "a.bin").write_bytes(five_bytes(e))
    found = read_events(tmp_path / "a.bin")
    assert digest(found) == digest(e)
    assert int(found.t[-1]) == 19_999_000
    (tmp_path / "a.bs1").write_bytes(bs1(e))
    assert np.array_equal(read_events(tmp_path / "a.bs1").t, t)


def test_five_bytes_overflow(tmp_path: Path) -> None:
    """y = 240 says that 2^13 us passed, where the sensor has no such row; elsewhere it is an event."""
    path = tmp_path / "a.bin"

    def made_of(t: list[int], x: list[int], y: list[int]) -> None:
        path.write_bytes(five_bytes(Events(*(np.array(a) for a in (t, x, y, [1] * len(t))), 256, 256)))

    made_of([5, 6, 7], [1, 0, 3], [2, 240, 4])
    for sensor in ((34, 34), (240, 180), None, (256, 240)):
        found = read_events(path, sensor)
        assert (found.t.tolist(), found.x.tolist(), found.y.tolist()) == ([5, 7 + 8192], [1, 3], [2, 4])
    found = read_events(path, (256, 256))
    assert (found.t.tolist(), found.y.tolist()) == ([5, 6, 7], [2, 240, 4])
    # An event above shows that there is such a row.
    made_of([5, 6, 7], [1, 0, 3], [241, 240, 4])
    found = read_events(path)
    assert (found.t.tolist(), found.y.tolist(), found.height) == ([5, 6, 7], [241, 240, 4], 256)


def test_events_outside_can_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    e = Events(*(np.array(a) for a in ([5, 6, 7, 8], [1, 34, 200, 3], [2, 3, 4, 40], [1, 1, 0, 1])), 34, 34)
    path.write_bytes(five_bytes(e))
    refused(path, "event 1 is at x = 34, y = 3, outside the sensor of 34x34", (34, 34))
    found = read_events(path, (34, 34), outside="drop")
    assert (found.t.tolist(), found.x.tolist(), found.y.tolist(), found.p.tolist()) == ([5], [1], [2], [1])
    assert (len(found), found.dropped, found.width, found.height) == (1, 3, 34, 34)
    assert read_events(path, outside="drop").dropped == 0  # without a sensor one is taken that holds all
    # Their times do not matter either; those of the others do, and messages name the right byte.
    e.t[1] = 3000
    path.write_bytes(five_bytes(e))
    assert read_events(path, (34, 34), outside="drop").dropped == 3
    e.t[0] = 2000
    e.y[3] = 0
    path.write_bytes(five_bytes(e))
    with pytest.raises(EventFileError, match="at byte 15 of 20: event 1 is 1992 us earlier"):
        read_events(path, (34, 34), outside="drop")
    with pytest.raises(UsageError, match="outside must be 'error' or 'drop', got 'clip'"):
        read_events(path, outside="clip")  # type: ignore[arg-type]


# --- AEDAT 2: whose addresses? ----------------------------------------------------------------------------------------


def test_a_davis_is_not_read_as_a_dvs128(tmp_path: Path) -> None:
    """In the layout of a DVS128 any address gives coordinates below 128: the header's chip decides."""
    path = tmp_path / "a.aedat"
    e = made(200, 100, 90)
    path.write_bytes(davis240(e))
    with pytest.warns(UserWarning, match=r"a.aedat: .*\.DAVIS240C of 240x180, which is not sensor=\(128, 128\)"):
        found = read_events(path, (128, 128))
    assert digest(found) == digest(e)
    path.write_bytes(davis240(made(200, 240, 180)))
    with pytest.warns(UserWarning, match="DAVIS240C"), pytest.raises(EventFileError, match="outside the sensor"):
        read_events(path, (128, 128))
    path.write_bytes(aedat2(e))
    with pytest.warns(UserWarning, match="DVS128 of 128x128, which is not"):
        assert digest(read_events(path, (240, 180))) == digest(e)
    path.write_bytes(davis240(e).replace(b"DAVIS240C", b"DAVIS128"))  # 128x128, but a DAVIS
    assert digest(read_events(path)) == digest(read_events(path, (128, 128))) == digest(e)


def test_addresses_of_an_unnamed_chip_are_told_by_their_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.aedat"
    e = made(200, 100, 90)
    path.write_bytes(davis240(e).replace(b"# AEChip: eu.seebetter.DAVIS240C\r\n", b""))
    assert digest(read_events(path, (128, 128))) == digest(e)
    assert digest(read_events(path, (240, 180))) == digest(e)
    refused(path, "camera not named; known are DVS128, DAVIS128")
    path.write_bytes(aedat2(e).replace(b"# AEChip: eu.seebetter.DVS128\r\n", b""))
    assert digest(read_events(path)) == digest(read_events(path, (240, 180))) == digest(e)
    glitch = bytearray(path.read_bytes())
    glitch[-8] |= 0x40
    path.write_bytes(bytes(glitch))
    assert digest(read_events(path)) == digest(e)


def test_the_real_davis_as_a_dvs128(real_data: Callable[[str], Path]) -> None:
    path = real_data("AEDAT2") / "AEDAT2" / "davis240" / "translating_boxes.aedat"
    with pytest.warns(UserWarning, match="DAVIS240C of 240x180, which is not"):
        found = read_events(path, (128, 128), outside="drop")
    whole = read_events(path)
    inside = (whole.x < 128) & (whole.y < 128)
    assert (len(found), found.dropped) == (int(inside.sum()), int((~inside).sum()))
    assert np.array_equal(found.t, whole.t[inside])


def test_triggers_and_other_words_are_no_events(tmp_path: Path) -> None:
    pairs = np.array([[3, 10], [0x8000, 11], [5, 12]], ">u4")
    (tmp_path / "a").write_bytes(b"#!AER-DAT2.0\r\n" + pairs.tobytes())  # no camera named: DVS128
    assert read_events(tmp_path / "a").t.tolist() == [10, 12]
    words = np.array([0x0000_0001, 0x8000_0001, 0x1000_0001, 0xA000_0000, 0xE000_0000], "<u4")
    (tmp_path / "b").write_bytes(b"% evt 2.0\n" + words.tobytes())
    assert read_events(tmp_path / "b", (8, 8)).t.tolist() == [64]  # the first one has no time yet


# --- bad files --------------------------------------------------------------------------------------------------------

E34 = made(40, 34, 34)
BIG = made(40, 128, 128)


def packet4(data: bytes) -> bytes:
    """An AEDAT 4 file with one packet, not compressed, of given bytes."""
    whole = aedat4(made(0, 320, 240), squeeze="none")
    start = whole.index(b"the index")
    body = struct.pack("<ii", 0, len(data)) + data
    at = whole.index(struct.pack("<q", start))
    return whole[:at] + struct.pack("<q", start + len(body)) + whole[at + 8 : start] + body


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.bin", b"", "at byte 0 of 0: the file is empty"),
        ("a.bin", five_bytes(E34)[:-2], "at byte 195 of 198: truncated: the last record has 3 of 5 bytes"),
        ("a.bin", b"\x89PNG\r\n\x1a\n" + bytes(92), "not an event file but a PNG picture"),
        ("a.bin", b"\xff\xd8\xff\xe0" + bytes(96), "a JPEG picture"),
        ("a.bin", b"BM" + struct.pack("<I", 100) + bytes(94), "a BMP picture"),
        ("a.bin", b"\x93NUMPY" + bytes(94), "a NumPy array"),
        ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(92), "an HDF5 file, which holds many recordings: use create_dataset"),
        ("a.zip", b"PK\x03\x04" + bytes(96), "a ZIP archive; unpack it"),
        ("a.bin", five_bytes(made(40, 34, 34))[::-1], "earlier than one before it"),
        ("a.aedat", b"#!AER-DAT5.0\r\n", "AEDAT version b'5.0', expected 2.0, 3.1 or 4.0"),
        ("a.aedat", b"#!AER-DAT2.0\n" + b"#\n" * 2**20, "no end within 1048576 bytes"),
        ("a.aedat", b"#!AER-DAT2.0", "a line of the header has no end"),
        ("a.aedat", aedat2(BIG)[:-3], "truncated: the last record has 5 of 8 bytes"),
        ("a.aedat", aedat2(BIG, "PAER"), "camera eu.seebetter.PAER; known are DVS128, DAVIS128, DAVIS208"),
        ("a.aedat", aedat3(BIG)[:-3], "truncated: 40 events of 8 bytes do not fit into the 317 left"),
        ("a.aedat", aedat3(BIG).replace(b"#Source", b"#Format: PNG\r\n#Source"), "the format 'PNG', expected 'RAW'"),
        ("a.aedat", aedat3(BIG) + bytes(9), "truncated: in the header of a packet"),
        ("a.aedat", aedat3(BIG).replace(b"#!END-HEADER\r\n", b""), "does not end with #!END-HEADER"),
        ("a.aedat", aedat3(BIG)[:47] + struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, 2**31 - 1, 2**31 - 1, 0), "do not fit"),
        ("a.aedat", aedat3(BIG)[:47] + struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, 1, -1, 0), "damaged packet header"),
        ("a.aedat4", aedat4(BIG)[:40], "truncated: a header of"),
        ("a.aedat4", aedat4(BIG)[:-300], "truncated: the index is at byte"),
        ("a.aedat4", aedat4(BIG).replace(b"EVTS<", b"IMUS<"), "names no stream of events"),
        ("a.aedat4", aedat4(BIG).replace(b"sizeX", b"sizeQ"), "no valid sizeX and sizeY"),
        ("a.aedat4", packet4(b"12"), "damaged packet: shorter than it says"),
        ("a.aedat4", packet4(aedat4_packet(BIG, 2**32 - 1)), "4294967295 events do not fit into its"),
        ("a.aedat4", packet4(aedat4_packet(made(40, 999, 240))), "outside the sensor of 320x240"),
        ("a.raw", evt2(BIG)[:-1], "truncated: the last record has 3 of 4 bytes"),
        ("a.raw", b"% evt 2.0\n" + b"\0\0\0\x80" + b"\0\0\0\x50", "at byte 14 of 18: a word of the unknown type 5"),
        ("a.raw", b"% evt 3.0\n" + b"\0\x80" + b"\0\x90", "at byte 12 of 14: a word of the unknown type 9"),
        ("a.raw", evt3(made(40, 1280, 720, span=99)).replace(b"width=1280", b"width=100"), "the sensor of 100x"),
        ("a.raw", evt2(BIG).replace(b"128x128", b"99999x1"), "the header names a sensor of 99999x1"),
        ("a.dat", dat(BIG)[:-7], "truncated: the last record has 1 of 8 bytes"),
        ("a.dat", b"% Data\n\x01\x02", r"event type and size \[1, 2\]"),
        ("a.es", b"Event Stream\2", "truncated: in the header"),
        ("a.es", b"Event Stream\1\0\0\1\x22\0\x22\0", "version 1, type 1; expected version 2"),
        ("a.es", b"Event Stream\2\0\0\1\0\0\x22\0", "a sensor of 0x34"),
        ("a.es", b"Event Stream\2\0\0\1\x22\0\x22\0\xff\x04\1", "at byte 21 of 23: truncated"),
        ("a.es", b"Event Stream\2\0\0\1\x22\0\x22\0\x04\x01\x00\xff\xff", "outside the sensor of 34x34"),
        ("a.mat", st_mnist(made(9, 10, 10))[:-9], "truncated: a variable of"),
        ("a.mat", st_mnist(made(9, 10, 10), False).replace(b"spiketrain", b"spiketrunk"), "without a matrix named"),
        ("a.mat", st_mnist(made(9, 10, 10))[:130], "truncated: in the header of a MATLAB file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, reason)


def test_places(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(five_bytes(E34))
    late = bytearray(five_bytes(E34))
    late[5 * 20 + 2] = late[5 * 20 + 3] = 0
    path.write_bytes(bytes(late))
    assert "at byte 100 of 200: event 20 is " in refused(path, "us earlier")
    wide = bytearray(five_bytes(E34))
    wide[5 * 7] = 34
    path.write_bytes(bytes(wide))
    assert "at byte 35 of 200: event 7 is at x = 34" in refused(path, "outside the sensor of 34x34", (34, 34))
    x = np.arange(40, dtype=np.int16)
    path.write_bytes(aedat3(Events(BIG.t, x, BIG.y, BIG.p, 128, 128), 15))
    # The header of 47 bytes, two packets of 15 with a header of 28, the third one's header, 4 events.
    place = 47 + 2 * (28 + 15 * 8) + 28 + 4 * 8
    assert f"at byte {place} of " in refused(path, "event 34 is at x = 34", (34, 128))


def test_a_little_out_of_order_is_kept(tmp_path: Path) -> None:
    e = Events(*(np.array(a) for a in ([2000, 1000, 3000], [1, 2, 3], [1, 2, 3], [0, 1, 0])), 34, 34)
    (tmp_path / "a").write_bytes(five_bytes(e))
    assert read_events(tmp_path / "a").t.tolist() == [2000, 1000, 3000]
    e.t[1] = 999
    (tmp_path / "a").write_bytes(five_bytes(e))
    refused(tmp_path / "a", "event 1 is 1001 us earlier")


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "cannot be read: No such file")
    refused(tmp_path, "cannot be read")
    (tmp_path / "a").write_bytes(five_bytes(E34))
    for sensor in ((0, 4), (34,), 34, (34.5, 34), "ab"):
        refused(tmp_path / "a", r"sensor must be \(width, height\), each from 1 to 32767", sensor)  # type: ignore
    assert issubclass(EventFileError, ValueError)
    assert issubclass(EventFileError, UsageError)


@pytest.mark.parametrize("squeeze", ["lz4", "zstd"])
def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path, squeeze: str) -> None:
    if squeeze == "zstd":
        pytest.importorskip("zstandard")
    zeros = Events(np.zeros(10**6, np.int64), *(np.zeros(10**6, np.int16) for _ in range(3)), 320, 240)
    path = tmp_path / "bomb.aedat4"
    path.write_bytes(aedat4(zeros, 10**6, squeeze))
    assert path.stat().st_size < 10**6 / 10
    tracemalloc.start()
    refused(path, "grow to more than 7 times the file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * path.stat().st_size + 2**21


def test_a_matrix_of_zeros_is_not_unfolded(tmp_path: Path) -> None:
    path = tmp_path / "zeros.mat"
    n = 20_000
    path.write_bytes(st_mnist(Events(np.zeros(n, np.int64), *(np.zeros(n, np.int16) for _ in range(3)), 10, 10)))
    tracemalloc.start()
    assert len(read_events(path)) == n
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * 101 * 8 / 4


def test_events_whose_first_byte_is_the_mark_of_header_lines(tmp_path: Path) -> None:
    """y = 140 of a DAVIS begins its address with "#", and nothing behind it is the end of a line."""
    e = Events(np.array([1, 2]), np.array([5, 6]), np.array([140, 140]), np.array([1, 0]), 240, 180)
    data = davis240(e)
    assert data.partition(b"DAVIS240C\r\n")[2][:1] == b"#"
    assert b"\n" not in data.partition(b"DAVIS240C\r\n")[2]
    path = tmp_path / "a.aedat"
    path.write_bytes(data)
    found = read_events(path)
    assert (found.x.tolist(), found.y.tolist(), found.t.tolist()) == ([5, 6], [140, 140], [1, 2])
