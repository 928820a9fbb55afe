"""Prophesee's formats against plain word-by-word decoders, written from the specification, and against expelliarmus."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_events import FORMATS, GAPS, SEEDED, dat, evt2, evt3, evt21, gappy, made
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeloom.data import EventFileError, Events, read_events
from spikeloom.data.formats.events import Decoded, EventFile
from spikeloom.data.formats.prophesee import prophesee

Rows = list[tuple[int, int, int, int]]


def evt3_by_words(words: Sequence[int]) -> Rows:
    """(t, x, y, p) of each event, as openeb decodes: a turn of the high bits is a step back of 2,048 or more."""
    found: Rows = []
    high = y = on = None
    low = turns = base = 0
    for word in words:
        kind, value = word >> 12, word & 0xFFF
        if high is None and kind != 8:
            continue
        if kind == 8:
            if high is not None:
                turns += high >= 2048 + value
            if high != value:
                high, low = value, 0
        elif kind == 6:
            low = value
        elif kind in (0, 1):
            y = value & 0x7FF if kind == 0 else None
        elif kind == 3:
            base, on = value & 0x7FF, value >> 11
        t = (turns * 4096 + (high or 0)) * 4096 + low
        if kind == 2 and y is not None:
            found.append((t, value & 0x7FF, y, value >> 11))
        if kind in (4, 5):
            wide = 12 if kind == 4 else 8
            if y is not None and on is not None:
                found += [(t, base + i, y, on) for i in range(wide) if value >> i & 1]
            base += wide
    return found


def evt2_by_words(words: Sequence[int], masks: Sequence[int]) -> Rows:
    """The same of EVT2.1, and with masks of 1 of EVT2; a turn is a step back by half of the period or more."""
    found: Rows = []
    high, turns = None, 0
    for word, mask in zip(words, masks, strict=True):
        kind = word >> 28
        if kind == 8:
            value = word & 0xFFFFFFF
            turns += high is not None and high - value >= 2**27
            high = value
        elif kind < 2 and high is not None:
            t = turns << 34 | high << 6 | word >> 22 & 63
            x, y = word >> 11 & 0x7FF, word & 0x7FF
            found += [(t, x + i, y, kind) for i in range(32) if mask >> i & 1]
    return found


def decoded(header: str, words: Any) -> Decoded:
    data = header.encode() + np.asarray(words).tobytes()
    return prophesee(EventFile(Path("a.raw"), np.frombuffer(data, np.uint8)), "specification")


def rows(found: Decoded | Events) -> Rows:
    return list(zip(*(a.tolist() for a in (found.t, found.x, found.y, found.p)), strict=True))


def random_words(seed: int, n: int, kinds: Sequence[int], bits: int, high_bits: int) -> np.ndarray:
    """Words of which every second is an event; high words step by little, by anything, or not at all."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(kinds, n)
    value = rng.integers(0, 1 << bits, n)
    high = np.cumsum(rng.integers(0, 2, n)) + rng.integers(0, 1 << high_bits)
    wild = rng.random(n) < 0.2
    value = np.where((kind == 8) & ~wild, high & (1 << high_bits) - 1, value)
    return kind.astype(np.int64) << bits | value


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.sampled_from([1, 30, 5000]))
def test_evt3_by_words(seed: int, n: int) -> None:
    words = random_words(seed, n, [0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15], 12, 12)
    found = decoded("% evt 3.0\n", words.astype("<u2"))
    assert rows(found) == evt3_by_words(words.tolist())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), n=st.sampled_from([1, 30, 5000]))
def test_evt2_and_evt21_by_words(seed: int, n: int) -> None:
    words = random_words(seed, n, [0, 1, 1, 8, 10, 14, 15], 28, 28)
    assert rows(decoded("% evt 2.0\n", words.astype("<u4"))) == evt2_by_words(words.tolist(), [1] * n)
    masks = np.random.default_rng(seed).integers(0, 2**32, n)
    wanted = evt2_by_words(words.tolist(), masks.tolist())
    for order, halves in (("little", [masks, words]), ("legacy", [words, masks])):
        header = f"% evt 2.1\n% endianness {order}\n"
        assert rows(decoded(header, np.stack(halves, 1).astype("<u4"))) == wanted


# --- numbers by hand --------------------------------------------------------------------------------------------------


def read(tmp_path: Path, header: str, words: Any, dtype: str = "<u2", **options: Any) -> Events:
    (tmp_path / "a.raw").write_bytes(header.encode() + np.array(words, dtype).tobytes())
    return read_events(tmp_path / "a.raw", **options)


def test_evt3_jumps_of_the_high_bits(tmp_path: Path) -> None:
    words = [0x8000, 0x63E8, 0x0001, 0x2002, 0x8989, 0x6A68, 0x2003]
    e = read(tmp_path, "% evt 3.0\n", words)
    assert rows(e) == [(1000, 2, 1, 0), (0x989A68, 3, 1, 0)]
    assert 0x989A68 == 10_000_000 + 1000
    # A stale high word before the first event: nothing is lost, and nothing shifted.
    assert rows(read(tmp_path, "% evt 3.0\n", [0x8005, *words])) == [(1000, 2, 1, 0), (10_001_000, 3, 1, 0)]
    assert rows(read(tmp_path, "% evt 3.0\n", [0x8005, 0x8BB8, *words[1:4]])) == [(0xBB83E8, 2, 1, 0)]


def test_evt3_counts_a_turn_once(tmp_path: Path) -> None:
    """One event each 500 us for a second ends at 999,500 us."""
    t = np.arange(0, 1_000_000, 500)
    e = Events(t, *(np.ones(len(t), np.int16) for _ in range(3)), 1280, 720)
    (tmp_path / "a.raw").write_bytes(evt3(e))
    assert np.array_equal(read_events(tmp_path / "a.raw").t, t)
    # By expelliarmus' rule each of the 244 turns of the low bits counts once more.
    late = read_events(tmp_path / "a.raw", evt3_time="expelliarmus").t
    assert late[-1] == 999_500 + 244 * 4096 == 1_998_924


def test_evt3_low_bits_begin_at_0_with_new_high_ones(tmp_path: Path) -> None:
    words = [0x8001, 0x6FFF, 0x0001, 0x2001, 0x8001, 0x2002, 0x8002, 0x2003, 0x6001, 0x2004]
    assert read(tmp_path, "% evt 3.0\n", words).t.tolist() == [8191, 8191, 8192, 8193]


def test_expelliarmus_counts_each_step_back_of_the_low_bits(tmp_path: Path) -> None:
    words = [0x8000 | 4095, 0x6000 | 4000, 0x0000, 0x2001, 0x8000, 0x6000 | 10, 0x2002, 0x6000 | 5, 0x2003]
    # The high bits turn over (4096), and the low ones step back twice.
    wanted = [4095 * 4096 + 4000, 4097 * 4096 + 10, 4098 * 4096 + 5]
    assert read(tmp_path, "% evt 3.0\n", words, evt3_time="expelliarmus").t.tolist() == wanted
    # By the specification the last one is 5 us late.
    assert read(tmp_path, "% evt 3.0\n", words).t.tolist() == [4095 * 4096 + 4000, 2**24 + 10, 2**24 + 5]
    with pytest.raises(ValueError, match="evt3_time must be 'specification' or 'expelliarmus', got 'tonic'"):
        read(tmp_path, "% evt 3.0\n", words, evt3_time="tonic")


def test_evt3_vectors_across_chunks(tmp_path: Path) -> None:
    """Base 100, on; 12 pixels, 8 pixels, then a lone event; 4,000 times, so that chunks begin inside of each."""
    group = [0x0000 | 7, 0x3000 | 0x800 | 100, 0x4000 | 0b1000_0000_0001, 0x5000 | 0b1000_0001, 0x2000 | 5]
    e = read(tmp_path, "% evt 3.0\n", [0x8000 | 1, 0x6000 | 2, *(group * 4000)])
    assert np.array_equal(e.x.reshape(4000, 5), np.tile([100, 111, 112, 119, 5], (4000, 1)))
    assert np.array_equal(e.p.reshape(4000, 5), np.tile([1, 1, 1, 1, 0], (4000, 1)))
    assert set(e.t.tolist()) == {4098}
    assert set(e.y.tolist()) == {7}


def test_evt21_is_no_evt2(tmp_path: Path) -> None:
    """8 at high 1, 32 pixels from x = 64: the first and the last fire, at t = 64 + 5."""
    words = [0x80000001, 0, 1 << 28 | 5 << 22 | 64 << 11 | 9, 0x80000001]
    wanted = [(69, 64, 9, 1), (69, 95, 9, 1)]
    for header in ("% evt 2.1\n% endianness legacy\n", "% format EVT21;endianness=legacy;height=720;width=1280\n"):
        assert rows(read(tmp_path, header, words, "<u4")) == wanted
    swapped = [0, 0x80000001, 0x80000001, words[2]]
    for header in ("% evt 2.1\n% endianness little\n", "% format EVT21;height=320;width=320;endianness=little\n"):
        assert rows(read(tmp_path, header, swapped, "<u4")) == wanted
    # Without a word on the order it shows by the kinds of words, or not.
    other = [*words, 0xE0000014, 0x30000000]
    assert rows(read(tmp_path, "% evt 2.1\n", other, "<u4")) == wanted
    with pytest.raises(EventFileError, match=r"does not say which half of an EVT2\.1 word comes first: add the line"):
        read(tmp_path, "% evt 2.1\n", words, "<u4")
    assert len(read(tmp_path, "% evt 2.1\n", [], "<u4")) == 0


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("% evt 4.0\n", "the header names the format '4.0', expected EVT2, EVT2.1 or EVT3"),
        ("% evt 2.0\n% format HISTO3D;height=320;width=320\n", "the header names the format 'histo3d'"),
        ("% format EVT3;endianness=big\n", "the header names the byte order 'big', expected 'little'"),
        ("% evt 2.0\n% endianness legacy\n", "the header names the byte order 'legacy', expected 'little'"),
        ("% camera x\n", "the header names no EVT format, and event type and size"),
    ],
)
def test_other_formats_are_refused_by_their_header(tmp_path: Path, header: str, reason: str) -> None:
    with pytest.raises(EventFileError, match=reason):
        read(tmp_path, header, [0x8000] * 8)


def test_dat_of_version_1(tmp_path: Path) -> None:
    """9 bits of x, 8 of y; recognised by the header, or without one by words of 18 bits."""
    words = np.array([[7, 303 | 239 << 9 | 1 << 17], [9, 5 | 2 << 9]], "<u4").tobytes()
    for version in (b"% Version 1\n", b""):
        (tmp_path / "a.dat").write_bytes(b"% Data file\n" + version + bytes([0, 8]) + words)
        assert rows(read_events(tmp_path / "a.dat")) == [(7, 303, 239, 1), (9, 5, 2, 0)]
    e = made(20, 304, 240)
    (tmp_path / "a.dat").write_bytes(dat(e).replace(b"% Version 2\n", b""))
    assert rows(read_events(tmp_path / "a.dat")) == rows(e)


# --- peers and real files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEDED)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(1, 2**32))
def test_foreign_words_and_first_words(tmp_path_factory: pytest.TempPathFactory, name: str, seed: int) -> None:
    """Words of other kinds, repeated words, and words before the first time change nothing."""
    path = tmp_path_factory.mktemp("made") / "a.raw"
    _, write, (width, height), _ = FORMATS[name]
    e = gappy(300, width, height, seed, *GAPS[name])
    path.write_bytes(write(e, seed))  # type: ignore[call-arg]
    assert rows(read_events(path)) == rows(e)


@pytest.mark.parametrize("kind", ["evt2", "evt3", "dat"])
def test_expelliarmus_reads_the_same(tmp_path: Path, kind: str) -> None:
    wizard = pytest.importorskip("expelliarmus").Wizard
    write: Callable[[Events], bytes] = {"evt2": evt2, "evt3": evt3, "dat": dat}[kind]
    e = made(4000, 300, 200, seed=3, span=3_000_000)
    path = tmp_path / f"a.{'dat' if kind == 'dat' else 'raw'}"
    path.write_bytes(write(e))
    theirs, ours = wizard(encoding=kind).read(path), read_events(path, evt3_time="expelliarmus")
    for column in "txyp":
        assert np.array_equal(theirs[column], getattr(ours, column)), column


def test_the_real_evt3_recording(real_data: Callable[[str], Path]) -> None:
    path = real_data("PROPHESEE") / "PROPHESEE" / "evt3_gen41.raw"
    data = path.read_bytes()
    words = np.frombuffer(data.split(b"% system_ID 48\n", 1)[1], "<u2").tolist()
    e = read_events(path)
    assert rows(e) == evt3_by_words(words)
    assert (len(e), int(e.t[-1] - e.t[0])) == (219_596, 8801)
    # Where and in what order the events are is the same by both rules; what the manifest has is expelliarmus'.
    other = read_events(path, evt3_time="expelliarmus")
    assert int(other.t[-1] - other.t[0]) == 53_857
    assert [hashlib.sha256(a.tobytes()).digest() for a in (e.x, e.y, e.p)] == [
        hashlib.sha256(a.tobytes()).digest() for a in (other.x, other.y, other.p)
    ]


def test_evt21_vectors_hold_many(tmp_path: Path) -> None:
    """Half of all events of a burst lie in rows, which share words."""
    e = Events(
        np.repeat(np.arange(100), 32),
        np.tile(np.arange(32, dtype=np.int16), 100),
        *(np.zeros(3200, np.int16) for _ in range(2)),
        320,
        320,
    )
    (tmp_path / "a.raw").write_bytes(evt21(e))
    assert (tmp_path / "a.raw").stat().st_size < 1100
    assert rows(read_events(tmp_path / "a.raw")) == rows(e)
