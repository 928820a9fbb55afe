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
    for i in range(0, len(e), packet):
        w, t = words[i : i + packet], e.t[i : i + packet]
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


def evt2(e: Events) -> bytes:
    words: list[int] = []
    high = -1
    for t, x, y, p in zip(*(a.tolist() for a in (e.t, e.x, e.y, e.p)), strict=True):
        if t >> 6 != high:
            high = t >> 6
            words.append(8 << 28 | high & 0xFFFFFFF)
        words.append(p << 28 | (t & 63) << 22 | x << 11 | y)
    head = f"% evt 2.0\n% geometry {e.width}x{e.height}\n".encode()
    return head + np.array(words, "<u4").tobytes()


def evt3(e: Events) -> bytes:
    """Single events only; of times the high bits do not change."""
    words: list[int] = [8 << 12 | int(e.t[0]) >> 12 & 0xFFF] if len(e) else []
    now, row = -1, -1
    for t, x, y, p in zip(*(a.tolist() for a in (e.t, e.x, e.y, e.p)), strict=True):
        if t != now:
            words.append(6 << 12 | t & 0xFFF)
        if y != row:
            words.append(y)
        now, row = t, y
        words.append(2 << 12 | p << 11 | x)
    head = f"% format EVT3;height={e.height};width={e.width}\n% end\n".encode()
    return head + np.array(words, "<u2").tobytes()


def dat(e: Events) -> bytes:
    words = e.x.astype(np.uint32) | e.y.astype(np.uint32) << 14 | e.p.astype(np.uint32) << 28
    head = f"% Data file\n% Height {e.height}\n% Width {e.width}\n".encode()
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


# Name: ending, writer, sensor, longest time.
FORMATS: dict[str, tuple[str, Callable[[Events], bytes], tuple[int, int], int]] = {
    "five_bytes": (".bin", five_bytes, (34, 34), 300_000),
    "bs1": (".bs1", bs1, (64, 1), 1_000_000),
    "aedat2": (".aedat", aedat2, (128, 128), 2**32),
    "davis240": (".aedat", davis240, (240, 180), 2**32),
    "aedat3": (".aedat", aedat3, (128, 128), 2**33),
    "aedat4": (".aedat4", aedat4, (320, 240), 2**50),
    "evt2": (".raw", evt2, (640, 480), 2**33),
    "evt3": (".raw", evt3, (1280, 720), 4096),
    "dat": (".dat", dat, (120, 100), 2**32),
    "event_stream": (".es", event_stream, (30, 32), 40_000),
    "st_mnist": (".mat", st_mnist, (10, 10), 900_000),
}
