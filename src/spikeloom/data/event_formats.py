"""Decoders of the event formats, each from the format's public description; all vectorised over events.

Bit layouts are given beside each decoder. None allocates by a count that a file claims before comparing it with the
file's length.
"""

from __future__ import annotations

import re

import numpy as np

from spikeloom.data.aedat4 import aedat4
from spikeloom.data.events import Array, Columns, Decoded, EventFile
from spikeloom.data.matlab import st_mnist

# What is often given by mistake: known beginnings of other files.
_FOREIGN = {
    b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture", b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture", b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive; unpack it", b"\x1f\x8b\x08": "gzip-compressed; unpack it",
    b"\x93NUMPY": "a NumPy array", b"RIFF": "a WAV, AVI or WebP file", b"\x80\x04\x95": "a pickle",
    b"\x89HDF\r\n": "an HDF5 file, which holds many recordings: use create_dataset('shd' or 'n_tidigits', ...)",
}  # fmt: skip


def decode(file: EventFile, sensor: tuple[int, int] | None) -> Decoded:
    """The events of a file in any known format, their coordinates and times not yet checked.

    Raises:
        EventFileError: another kind of file, or a damaged one.
    """
    start = file.data[:16].tobytes()
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic):
            raise file.error(0, f"not an event file but {kind}")
    if start.startswith(b"BM") and int.from_bytes(start[2:6], "little") == len(file.data):
        raise file.error(0, "not an event file but a BMP picture")
    if start.startswith(b"#!AER-DAT"):
        version = start[9:].split(b"\r")[0].split(b"\n")[0]
        readers = {b"2": aedat2, b"3": aedat3}
        if version.startswith(b"4"):
            return aedat4(file)
        if version[:1] in readers:
            return readers[version[:1]](file, sensor)
        raise file.error(9, f"AEDAT version {version!r}, expected 2.0, 3.1 or 4.0")
    if start.startswith(b"% "):
        return prophesee(file)
    if start.startswith(b"Event Stream"):
        return event_stream(file)
    if start.startswith(b"MATLAB 5.0"):
        return st_mnist(file)
    return five_bytes(file)


def unwrap(t: Array, period: int) -> Array:
    """Times of a counter that starts again at 0 after `period`: a step back by more than half of it is such a start."""
    turns = np.zeros(len(t), np.int64)
    if len(t) > 1:
        # Unsigned counters: widen in place of the result, so that no third array is needed.
        turns[1:] = t[1:]
        turns[1:] -= t[:-1]
        turns = np.cumsum(turns < -(period // 2), dtype=np.int64) - np.cumsum(turns > period // 2, dtype=np.int64)
        turns *= period
    turns += t
    return turns


def five_bytes(file: EventFile) -> Decoded:
    """N-MNIST, N-Caltech101, and N-TIDIGITS where the name ends in .bs1: no header, 5 bytes an event.

    Byte 0 x, byte 1 y, then 24 bits, big-endian: polarity, 23 bits of microseconds. y = 240 is no event: it says that
    2^13 us passed that the time does not count. In .bs1 the first two bytes are the channel, big-endian.
    """
    rows = file.records(0, "V5").view(np.uint8).reshape(-1, 5)
    cochlea = file.path.suffix.lower() == ".bs1"
    passed = np.empty(0, np.int64) if cochlea else np.flatnonzero(rows[:, 1] == 240)
    t = (rows[:, 2] & 0x7F).astype(np.int64)
    for column in (3, 4):
        t <<= 8
        t |= rows[:, column]
    p = rows[:, 2] >> 7
    if cochlea:
        channel = rows[:, 0].astype(np.int16) << 8 | rows[:, 1]
        return Decoded(t, channel, np.zeros(len(t), np.int16), p, (64, 1), lambda i: 5 * i)
    if not len(passed):
        return Decoded(t, rows[:, 0], rows[:, 1], p, None, lambda i: 5 * i)
    kept = np.flatnonzero(rows[:, 1] != 240)
    t = t[kept] + 2**13 * np.searchsorted(passed, kept)
    return Decoded(t, rows[kept, 0], rows[kept, 1], p[kept], None, lambda i: 5 * int(kept[i]))


# --- AEDAT 2 and 3.1 --------------------------------------------------------------------------------------------------


def aedat2(file: EventFile, sensor: tuple[int, int] | None) -> Decoded:
    """AEDAT 2: text lines, then pairs of a big-endian 32-bit address and 32-bit microseconds, unsigned.

    DVS128 address: bit 0 polarity, 1 to 7 x, 8 to 14 y, 15 trigger. DAVIS: bit 31 frame or IMU word, 22 to 30 y,
    12 to 21 x, 11 polarity, 10 trigger. The camera is told by the header, or by `sensor`.
    """
    lines, start = file.lines(b"#", ("#End Of ASCII Header", "# End Of ASCII Header"))
    pairs = file.records(start, ">u4").reshape(-1, 2) if (len(file.data) - start) % 8 == 0 else None
    if pairs is None:
        file.records(start, "V8")
        raise AssertionError("a length that is no multiple of 8 is an error")
    address, t = pairs[:, 0], pairs[:, 1]
    chip = next((line.split(":", 1)[1] for line in lines if "AEChip:" in line), "").lower()
    sizes = {"dvs128": (128, 128), "davis240": (240, 180), "davis346": (346, 260)}
    size = sensor or next((size for name, size in sizes.items() if name in chip), None)
    if size is None:
        if chip or bool((address >> 16).any()):
            raise file.error(0, f"camera {chip.strip() or 'not named'}; known are DVS128, DAVIS240 and DAVIS346: "
                                "give sensor=(width, height) if its layout is one of theirs")  # fmt: skip
        size = (128, 128)  # no camera named, and addresses of 16 bits
    dvs128 = size == (128, 128)
    kept = np.flatnonzero((address & (0x8000 if dvs128 else 0x80000400)) == 0)
    address, t = address[kept].astype(np.uint32), unwrap(t[kept], 2**32)
    if dvs128:
        x, y, p = address >> 1 & 0x7F, address >> 8 & 0x7F, address & 1
    else:
        x, y, p = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
    return Decoded(t, x.astype(np.int16), y.astype(np.int16), p, size, lambda i: start + 8 * int(kept[i]))


_PACKET = np.dtype([("type", "<i2"), ("source", "<i2"), ("size", "<i4"), ("ts_offset", "<i4"), ("overflow", "<i4"),
                    ("capacity", "<i4"), ("number", "<i4"), ("valid", "<i4")])  # fmt: skip


def aedat3(file: EventFile, sensor: tuple[int, int] | None) -> Decoded:
    """AEDAT 3.1: text lines, then packets with a header of 28 bytes, little-endian; polarity events are of type 1.

    An event: 32 bits (0 valid, 1 polarity, 2 to 16 y, 17 to 31 x) and 32 bits of microseconds, to which the header's
    overflow times 2^31 is added.
    """
    lines, start = file.lines(b"#", ("#!END-HEADER",))
    if not any(line.startswith("#!END-HEADER") for line in lines):
        raise file.error(start, "the header does not end with #!END-HEADER")
    parts = Columns()
    while start < len(file.data):
        if start + _PACKET.itemsize > len(file.data):
            raise file.error(start, "truncated: in the header of a packet")
        head = file.data[start : start + _PACKET.itemsize].view(_PACKET)[0]
        kind, size, number, capacity = (int(head[key]) for key in ("type", "size", "number", "capacity"))
        body = start + _PACKET.itemsize
        if size < 1 or not 0 <= number <= capacity or int(head["overflow"]) < 0 or (kind == 1 and size != 8):
            raise file.error(start, f"damaged packet header: {number} of {capacity} events of {size} bytes")
        if body + size * capacity > len(file.data):
            raise file.error(
                start, f"truncated: {capacity} events of {size} bytes do not fit into the {len(file.data) - body} left"
            )
        if kind == 1:
            pairs = file.data[body : body + 8 * number].view("<u4").reshape(-1, 2)
            valid = np.flatnonzero(pairs[:, 0] & 1)
            word = pairs[valid, 0]
            t = pairs[valid, 1].astype(np.int64) + (int(head["overflow"]) << 31)
            parts.add(t, word >> 17, word >> 2 & 0x7FFF, word >> 1 & 1, body, (8 * valid).astype(np.uint32))
        start = body + size * capacity
    source = next((line for line in lines if "DVS128" in line), None)
    return parts.decoded(sensor or ((128, 128) if source else None))


# --- Prophesee --------------------------------------------------------------------------------------------------------

_CAMERAS = {"gen3": (640, 480), "gen31": (640, 480), "gen41": (1280, 720), "imx636": (1280, 720), "genx320": (320, 320)}


def prophesee(file: EventFile) -> Decoded:
    """Prophesee's formats: lines that begin with "% ", then what they name, EVT2, EVT3 or DAT."""
    lines, start = file.lines(b"% ", ("% end",))
    text = "\n".join(lines).lower()
    # "% format EVT3;height=720;width=1280", "% geometry 640x480", "% Width 304", or only the name of the camera.
    sides = re.search(r"geometry\s*[:= ]\s*(\d{1,5})x(\d{1,5})", text)
    width, height = (re.search(rf"\b{side}[= ](\d{{1,5}})", text) for side in ("width", "height"))
    size: tuple[int, int] | None = None
    if sides:
        size = (int(sides[1]), int(sides[2]))
    elif width and height:
        size = (int(width[1]), int(height[1]))
    else:
        camera = re.search(r"plugin_name hal_plugin_(gen\d+|imx\d+|genx\d+)", text)
        size = _CAMERAS.get(camera[1]) if camera else None
    if size is not None and not all(0 < side < 2**15 for side in size):
        raise file.error(0, f"the header names a sensor of {size[0]}x{size[1]}")
    version = re.search(r"% (?:evt |format evt)(\d)", text)
    if version and version[1] == "2":
        return evt2(file, start, size)
    if version and version[1] == "3":
        return evt3(file, start, size)
    if version:
        raise file.error(0, f"EVT version {version[1]}, expected 2 or 3")
    return dat(file, start, size)


def dat(file: EventFile, start: int, size: tuple[int, int] | None) -> Decoded:
    """DAT: a byte for the type, one for the size, 8; then pairs of 32-bit microseconds and word, little-endian.

    Word: bits 0 to 13 x, 14 to 27 y, 28 polarity.
    """
    kind = file.data[start : start + 2].tolist()
    if kind not in ([0, 8], [12, 8]):
        raise file.error(start, f"event type and size {kind}, expected [0, 8] or [12, 8]")
    pairs = file.records(start + 2, "V8").view("<u4").reshape(-1, 2)
    word = pairs[:, 1]
    x, y = (word & 0x3FFF).astype(np.int16), (word >> 14 & 0x3FFF).astype(np.int16)
    t = unwrap(pairs[:, 0], 2**32)
    return Decoded(t, x, y, (word >> 28 & 1).astype(np.uint8), size, lambda i: start + 2 + 8 * i)


def evt2(file: EventFile, start: int, size: tuple[int, int] | None) -> Decoded:
    """EVT2: 32-bit words, little-endian. Top 4 bits 0 OFF, 1 ON: bits 22 to 27 the low 6 bits of the time, 11 to 21 x,
    0 to 10 y; 8: the time from bit 6 on; A trigger, E and F others. Events before the first time are left out.
    """
    words = file.records(start, "<u4")
    kind = (words >> 28).astype(np.uint8)
    _check_kinds(file, start, 4, kind, (0, 1, 8, 10, 14, 15))
    is_high = kind == 8
    high = unwrap(words[is_high] & 0xFFFFFFF, 2**28)
    group = np.cumsum(is_high, dtype=np.int32)
    kept = np.flatnonzero((kind <= 1) & (group > 0)).astype(np.int32)
    word = words[kept]
    t = high[group[kept] - 1] << 6 if len(kept) else np.empty(0, np.int64)
    t |= word >> 22 & 0x3F
    x, y = (word >> 11 & 0x7FF).astype(np.int16), (word & 0x7FF).astype(np.int16)
    return Decoded(t, x, y, kind[kept], size, lambda i: start + 4 * int(kept[i]))


def _check_kinds(file: EventFile, start: int, size: int, kind: Array, known: tuple[int, ...]) -> None:
    count = np.bincount(kind, minlength=16)
    count[list(known)] = 0
    if count.any():
        i = int(np.flatnonzero(~np.isin(kind, known))[0])
        raise file.error(start + size * i, f"a word of the unknown type {kind[i]}")


def _latest(at: Array, values: Array, before: int) -> tuple[Array, int]:
    """For each word, the value of the latest word that sets it (where `at`); and the last such value."""
    table = np.concatenate([np.array([before], np.int64), values[at].astype(np.int64)])
    return table[np.cumsum(at)], int(table[-1])


_EVT3_KINDS = (0, 2, 3, 4, 5, 6, 7, 8, 10, 14, 15)
_CHUNK = 1 << 12  # words at a time: what is needed for a word is many times its size


def evt3(file: EventFile, start: int, size: tuple[int, int] | None) -> Decoded:
    """EVT3: 16-bit words, little-endian, of which the top 4 bits say what they set.

    0 y; 2 an event at x, with polarity in bit 11; 3 the base x and polarity of vectors; 4 and 5 vectors of 12 and 8
    pixels from the base on, which moves behind them; 6 and 8 bits 0 to 11 and 12 to 23 of the time; others are no
    pixel events. Events before the first time are left out.

    Each step back of bits 0 to 11 adds 2^12 us to what bits 12 to 23 say, as expelliarmus does, whose arrays the tests
    compare with (see `docs/events.md`).
    """
    words = file.records(start, "<u2")
    parts = Columns()
    y = base = on = low = wraps = 0
    high: int | None = None
    for begin in range(0, len(words), _CHUNK):
        word = words[begin : begin + _CHUNK]
        kind, value = (word >> 12).astype(np.uint8), (word & 0xFFF).astype(np.int32)
        _check_kinds(file, start + 2 * begin, 2, kind, _EVT3_KINDS)
        y_of, y = _latest(kind == 0, value & 0x7FF, y)
        is_high, is_low = kind == 8, kind == 6
        highs = value[is_high].astype(np.int64)
        if len(highs):
            before = int(highs[0]) if high is None else high
            # The counter goes on from `before`, which may have turned over already.
            highs = unwrap(np.concatenate([[before % 2**12], highs]), 2**12)[1:] + before // 2**12 * 2**12
        known = np.concatenate([[-1 if high is None else high], highs])
        high_of = known[np.cumsum(is_high)]
        high = int(known[-1]) if known[-1] >= 0 else None
        lows = np.concatenate([[low], value[is_low]])
        steps_back = wraps + np.concatenate([[0], np.cumsum(lows[1:] < lows[:-1])])
        low_group = np.cumsum(is_low)
        low_of, wraps_of = lows[low_group], steps_back[low_group]
        low, wraps = int(lows[-1]), int(steps_back[-1])
        # A vector's base: where its base word says, and behind the vectors since then. A lone event is a vector of one.
        width = np.where(kind == 4, 12, np.where(kind == 5, 8, 0))
        moved = np.cumsum(width) - width
        is_base = kind == 3
        base_of, _ = _latest(is_base, (value & 0x7FF) - moved, base)
        on_of, on = _latest(is_base, value >> 11, on)
        base = int(base_of[-1] + moved[-1] + width[-1])
        chosen = np.flatnonzero(((kind == 2) | (kind == 4) | (kind == 5)) & (high_of >= 0))
        single = kind[chosen] == 2
        mask = np.where(single, 1, value[chosen] & np.where(kind[chosen] == 5, 0xFF, 0xFFF))
        row, bit = np.nonzero(mask[:, None] >> np.arange(12) & 1)
        of = chosen[row]
        x = np.where(single[row], value[of] & 0x7FF, base_of[of] + moved[of] + bit)
        p = np.where(single[row], value[of] >> 11, on_of[of])
        t = (high_of[of] + wraps_of[of] << 12) + low_of[of]
        parts.add(t, x, y_of[of], p, start + 2 * begin, (2 * of).astype(np.uint16))
    return parts.decoded(size)


# --- Event Stream -----------------------------------------------------------------------------------------------------


def event_stream(file: EventFile) -> Decoded:
    """Event Stream 2, DVS: a header of 20 bytes, then a byte b at a time.

    255: 127 us pass; 254: reset, no event; else b >> 1 us pass, bit 0 is the polarity, and 16-bit x and y follow.
    """
    head = file.data[:20].tobytes()
    if len(head) < 20:
        raise file.error(0, "truncated: in the header of an Event Stream file")
    if head[12] != 2 or head[15] != 1:
        raise file.error(12, f"Event Stream version {head[12]}, type {head[15]}; expected version 2, type 1 (DVS)")
    size = (int.from_bytes(head[16:18], "little"), int.from_bytes(head[18:20], "little"))
    if not all(0 < side < 2**15 for side in size):
        raise file.error(16, f"the header names a sensor of {size[0]}x{size[1]}")
    parts = Columns()
    begin, now = 20, 0
    while begin < len(file.data):
        data = file.data[begin : begin + _CHUNK + 4]
        # Where a record begins depends on all before it: jumps of 1, 2, 4, ... records find all beginnings fast.
        jump = np.arange(len(data)) + np.where(data >= 254, 1, 5)
        jump = np.append(np.minimum(jump, len(data)), len(data))
        starts = np.zeros(1, np.int64)
        while starts[-1] < len(data):
            starts = np.concatenate([starts, jump[starts]])
            jump = jump[jump]
        starts = np.unique(starts)[:-1]
        # The last records of a chunk may be cut: they belong to the next one, unless the file ends.
        ends = starts + np.where(data[starts] >= 254, 1, 5)
        if ends[-1] > len(data):
            if begin + len(data) == len(file.data):
                raise file.error(
                    begin + int(starts[-1]), f"truncated: the last record has {len(data) - starts[-1]} of 5 bytes"
                )
            starts, ends = starts[:-1], ends[:-1]
        code = data[starts]
        t = now + np.cumsum(np.where(code == 255, 127, np.where(code == 254, 0, code >> 1)), dtype=np.int64)
        of = np.flatnonzero(code < 254)
        at = starts[of]
        x, y = (data[at + i].astype(np.int32) | data[at + i + 1].astype(np.int32) << 8 for i in (1, 3))
        parts.add(t[of], x, y, code[of] & 1, begin, at.astype(np.uint16))
        begin, now = begin + int(ends[-1]), int(t[-1])
    return parts.decoded(size)
