"""Event files of every format, made from arrays: the other direction of `spikeloom.data.read_events`."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np

from spikeloom.data import Events


def made(n: int, width: int, height: int, seed: int = 0, span: int = 100_000) -> Events:
    """Random events with times that never go back."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, span, n))
    x, y = rng.integers(0, width, n, np.int16), rng.integers(0, height, n, np.int16)
    return Events(t, x, y, rng.integers(0, 2, n, np.uint8), width, height)


def gappy(n: int, width: int, height: int, seed: int, longest: int, late: bool) -> Events:
    """Random events with bursts, steps of 0, gaps of up to `longest` and, if `late`, some up to 1 ms out of order."""
    rng = np.random.default_rng(seed)
    e = made(n, width, height, seed)
    steps = rng.integers(0, 200, n)
    steps[rng.random(n) < 0.3] = 0
    gap = rng.random(n) < 0.1
    steps[gap] = rng.integers(0, longest, gap.sum())
    steps[0] = 0
    t = rng.integers(0, min(longest, 2**24)) + np.cumsum(steps)
    if late:
        t[1:] = np.maximum(t[1:] - np.where(rng.random(n - 1) < 0.1, rng.integers(0, 1000, n - 1), 0), 0)
    # Rows of one polarity, which vectors are made of.
    run = np.cumsum(rng.random(n) < 0.2)
    return Events(
        t, e.x, rng.permutation(height)[run % height].astype(np.int16), (run % 2).astype(np.uint8), width, height
    )


def five_bytes(e: Events) -> bytes:
    rows = np.stack([e.x, e.y, e.t >> 16 & 0x7F | e.p.astype(int) << 7, e.t >> 8 & 0xFF, e.t & 0xFF], 1)
    return rows.astype(np.uint8).tobytes()


def bs1(e: Events) -> bytes:
    rows = np.stack([e.x >> 8, e.x & 255, e.t >> 16 & 0x7F | 128, e.t >> 8 & 0xFF, e.t & 0xFF], 1)
    return rows.astype(np.uint8).tobytes()


def aedat2(e: Events, camera: str = "DVS128") -> bytes:
    x, y, p = (a.astype(np.uint32) for a in (e.x, e.y, e.p))
    address = p | x << 1 | y << 8 if camera == "DVS128" else p << 11 | x << 12 | y << 22
    pairs = np.stack([address, e.t.astype(np.uint32)], 1).astype(">u4")
    return f"#!AER-DAT2.0\r\n# AEChip: eu.seebetter.{camera}\r\n".encode() + pairs.tobytes()


def davis240(e: Events) -> bytes:
    return aedat2(e, "DAVIS240C")


def aedat3(e: Events, packet: int = 50) -> bytes:
    words = e.x.astype(np.uint32) << 17 | e.y.astype(np.uint32) << 2 | e.p.astype(np.uint32) << 1 | 1
    parts = [b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"]
    starts = sorted({*range(0, len(e), packet), *(np.flatnonzero(np.diff(e.t >> 31)) + 1).tolist()})
    for i, end in zip(starts, [*starts[1:], len(e)], strict=True):
        w, t = words[i:end], e.t[i:end]
        overflow = int(t[0]) >> 31
        pairs = np.stack([w, (t - (overflow << 31)).astype(np.uint32)], 1).astype("<u4")
        parts.append(struct.pack("<hhiiiiii", 1, 1, 8, 4, overflow, len(w), len(w), len(w)) + pairs.tobytes())
    return b"".join(parts)


def aedat4_packet(e: Events, count: int | None = None) -> bytes:
    rows = np.zeros(len(e), [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1"), ("pad", "V3")])
    rows["t"], rows["x"], rows["y"], rows["p"] = e.t, e.x, e.y, e.p
    table = struct.pack("<I4sHHHHiII", 16, b"EVTS", 6, 8, 4, 0, 8, 4, len(e) if count is None else count)
    body = table + rows.tobytes()
    return struct.pack("<I", len(body)) + body


def aedat4(e: Events, packet: int = 50, squeeze: str = "lz4") -> bytes:
    compress, number = _compressor(squeeze)
    xml = (
        '<dv><node name="outInfo" path="/mainloop/Recorder/outInfo/">'
        '<node name="0" path="/mainloop/Recorder/outInfo/0/">'
        '<attr key="typeIdentifier" type="string">EVTS</attr>'
        f'<attr key="sizeX" type="int">{e.width}</attr><attr key="sizeY" type="int">{e.height}</attr>'
        "</node></node></dv>"
    ).encode()
    packets = b""
    for i in range(0, len(e), packet):
        part = Events(*(a[i : i + packet] for a in (e.t, e.x, e.y, e.p)), e.width, e.height)
        data = compress(aedat4_packet(part))
        packets += struct.pack("<ii", 0, len(data)) + data
        packets += struct.pack("<ii", 2, 5) + b"other"  # a packet of another stream
    start = 14 + 4 + 44 + len(xml) + 1
    table = struct.pack("<I4sHHHHHHiiqI", 20, b"IOHE", 10, 20, 4, 8, 16, 0, 12, number, start + len(packets), 4)
    header = table + struct.pack("<I", len(xml)) + xml + b"\0"
    assert len(header) == start - 18
    return b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header + packets + b"the index"


def _compressor(squeeze: str) -> tuple[Callable[[bytes], bytes], int]:
    if squeeze == "lz4":
        import lz4.frame

        return lz4.frame.compress, 1
    if squeeze == "zstd":
        import zstandard

        return zstandard.compress, 3
    return lambda data: data, 0


def _high_words(before: int | None, high: int, bits: int) -> list[int]:
    """High parts of the time to send, each within half a turn of the one before where the counter turns."""
    sent: list[int] = []
    if before is not None and before >> bits != high >> bits:
        sent = [*range(before + (1 << bits - 1), high, 1 << bits - 1)]
    return [value & (1 << bits) - 1 for value in [*sent, high]]


def _evt2_words(e: Events, seed: int) -> list[int]:
    rng, high = np.random.default_rng(seed), None
    words: list[int] = [0x1000_0001] if seed else []  # an event without time
    for t, x, y, p in zip(*(a.tolist() for a in (e.t, e.x, e.y, e.p)), strict=True):
        if seed and rng.random() < 0.05:  # trigger, others, continued
            words += [0xA000_0101, 0xE000_0014, 0xFFFF_FFFF]
        if t >> 6 != high or (seed and rng.random() < 0.1):
            words += [8 << 28 | value for value in _high_words(high, t >> 6, 28)]
            high = t >> 6
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
    return words


def evt2(e: Events, seed: int = 0) -> bytes:
    """With a seed, repeated times and words of other kinds lie between the events, and some before the first time."""
    head = f"% evt 2.0\n% geometry {e.width}x{e.height}\n".encode()
    return head + np.array(_evt2_words(e, seed), "<u4").tobytes()


def evt21(e: Events, seed: int = 0, order: str = "little") -> bytes:
    """As `evt2`; events of one word that follow with ascending x within 32 pixels share it."""
    words: list[int] = []
    masks: list[int] = []
    for word in _evt2_words(e, seed):
        x, base = word >> 11 & 0x7FF, (words[-1] if words else 0) >> 11 & 0x7FF
        alike = words and word >> 28 < 2 and (word ^ words[-1]) & ~(0x7FF << 11) == 0
        if alike and base <= x < base + 32 and masks[-1] < 1 << (x - base):
            masks[-1] |= 1 << (x - base)
        else:
            words.append(word)
            masks.append(1 if word >> 28 < 2 else 0)
    halves = [masks, words] if order == "little" else [words, masks]
    head = f"% evt 2.1\n% format EVT21;height={e.height};width={e.width};endianness={order}\n% end\n".encode()
    return head + np.stack([np.array(half, "<u4") for half in halves], 1).tobytes()


def evt3(e: Events, seed: int = 0) -> bytes:
    """With a seed: vectors; repeated times, y and words of other kinds between the events, and some before the first
    time.
    """
    rng = np.random.default_rng(seed)
    words: list[int] = [0x0003, 0x6123, 0x2001, 0x8000, 0x2002] if seed else []  # no time, then no y yet
    high, low, row, i = (0 if seed else None), None, None, 0
    columns = [a.tolist() for a in (e.t, e.x, e.y, e.p)]
    while i < len(e):
        t, x, y, p = (column[i] for column in columns)
        some = seed and rng.random() < 0.1
        if some:  # trigger, others, IMU, continued; events of another kind
            words += [0xA001, 0xE014, 0xF123, 0xF456, 0x7008, 0xD123, 0x1005, 0x2009, 0x3007, 0x4FFF]
        if t >> 12 != high or some:
            words += [8 << 12 | value for value in _high_words(high, t >> 12, 12)]
            low = 0 if t >> 12 != high else low
        if t & 0xFFF != low or some:
            words.append(6 << 12 | t & 0xFFF)
        if y != row or some:
            words.append((rng.integers(0, 2) << 11 if seed else 0) | y)  # bit 11: another camera
        high, low, row = t >> 12, t & 0xFFF, y
        mask, end = 1, i + 1
        while end < len(e) and [c[end] for c in (columns[0], *columns[2:])] == [t, y, p]:
            ahead = columns[1][end] - x
            if not 0 <= ahead < 32 or mask >= 1 << ahead:
                break
            mask, end = mask | 1 << ahead, end + 1
        if seed and (end > i + 1 or rng.random() < 0.1):
            words += [3 << 12 | p << 11 | x, 4 << 12 | mask & 0xFFF, 4 << 12 | mask >> 12 & 0xFFF, 5 << 12 | mask >> 24]
            i = end
        else:
            words.append(2 << 12 | p << 11 | x)
            i += 1
    head = f"% format EVT3;height={e.height};width={e.width}\n% end\n".encode()
    return head + np.array(words, "<u2").tobytes()


def dat(e: Events) -> bytes:
    words = e.x.astype(np.uint32) | e.y.astype(np.uint32) << 14 | e.p.astype(np.uint32) << 28
    head = f"% Data file\n% Version 2\n% Height {e.height}\n% Width {e.width}\n".encode()
    return head + bytes([12, 8]) + np.stack([e.t.astype(np.uint32), words], 1).astype("<u4").tobytes()


def event_stream(e: Events) -> bytes:
    parts = [b"Event Stream\2\0\0\1" + struct.pack("<HH", e.width, e.height)]
    now = 0
    for t, x, y, p in zip(*(a.tolist() for a in (e.t, e.x, e.y, e.p)), strict=True):
        overflows, rest = divmod(t - now, 127)
        now = t
        parts.append(b"\xff" * overflows + struct.pack("<BHH", rest << 1 | p, x, y))
    return b"".join(parts)


def st_mnist(e: Events, squeeze: bool = True) -> bytes:
    from scipy.io import savemat

    matrix = np.zeros((101, len(e)))
    matrix[e.y * 10 + e.x, np.arange(len(e))] = np.where(e.p == 1, 1, -1)
    matrix[100] = e.t / 1e6
    buffer = io.BytesIO()
    savemat(buffer, {"label": np.arange(3), "spiketrain": matrix}, do_compression=squeeze)
    return buffer.getvalue()


def evt21_legacy(e: Events, seed: int = 0) -> bytes:
    return evt21(e, seed, "legacy")


# Name: ending, writer, sensor, longest time.
FORMATS: dict[str, tuple[str, Callable[[Events], bytes], tuple[int, int], int]] = {
    "five_bytes": (".bin", five_bytes, (34, 34), 2**25),
    "bs1": (".bs1", bs1, (64, 1), 2**25),
    "aedat2": (".aedat", aedat2, (128, 128), 2**33),
    "davis240": (".aedat", davis240, (240, 180), 2**33),
    "aedat3": (".aedat", aedat3, (128, 128), 2**33),
    "aedat4": (".aedat4", aedat4, (320, 240), 2**50),
    "evt2": (".raw", evt2, (640, 480), 2**35),
    "evt21": (".raw", evt21, (320, 320), 2**35),
    "evt21_legacy": (".raw", evt21_legacy, (1280, 720), 2**35),
    "evt3": (".raw", evt3, (1280, 720), 2**26),
    "dat": (".dat", dat, (120, 100), 2**33),
    "event_stream": (".es", event_stream, (30, 32), 40_000),
    "st_mnist": (".mat", st_mnist, (10, 10), 900_000),
}
# Of formats with counters, the longest gap that they can tell, and whether events may be late.
GAPS: dict[str, tuple[int, bool]] = {
    "five_bytes": (2**22 - 2000, True),
    "bs1": (2**22 - 2000, True),
    "aedat2": (2**31 - 2000, True),
    "davis240": (2**31 - 2000, True),
    "aedat3": (2**33, True),
    "aedat4": (2**40, True),
    "evt2": (2**35, False),
    "evt21": (2**35, False),
    "evt21_legacy": (2**35, False),
    "evt3": (2**26, False),
    "dat": (2**31 - 2000, True),
    "event_stream": (30_000, False),
}
SEEDED = ("evt2", "evt21", "evt21_legacy", "evt3")
