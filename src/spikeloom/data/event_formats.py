"""Decoders of the event formats, each from the format's public description; all vectorised over events.

Bit layouts are given beside each decoder. None allocates by a count that a file claims before comparing it with the
file's length.
"""

from __future__ import annotations

import warnings

import numpy as np

from spikeloom.data.aedat4 import aedat4
from spikeloom.data.events import Columns, Decoded, EventFile, Evt3Time, unwrap
from spikeloom.data.matlab import st_mnist
from spikeloom.data.prophesee import prophesee

# What is often given by mistake: known beginnings of other files.
_FOREIGN = {
    b"\x89PNG\r\n": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture", b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture", b"II*\0": "a TIFF picture", b"MM\0*": "a TIFF picture", b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive; unpack it", b"\x1f\x8b\x08": "gzip-compressed; unpack it",
    b"\x93NUMPY": "a NumPy array", b"RIFF": "a WAV, AVI or WebP file", b"\x80\x04\x95": "a pickle",
    b"\x89HDF\r\n": "an HDF5 file, which holds many recordings: use create_dataset('shd' or 'n_tidigits', ...)",
}  # fmt: skip


def decode(file: EventFile, sensor: tuple[int, int] | None, evt3_time: Evt3Time) -> Decoded:
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
        return prophesee(file, evt3_time)
    if start.startswith(b"Event Stream"):
        return event_stream(file)
    if start.startswith(b"MATLAB 5.0"):
        return st_mnist(file)
    return five_bytes(file, sensor)


def five_bytes(file: EventFile, sensor: tuple[int, int] | None) -> Decoded:
    """N-MNIST, N-Caltech101, and N-TIDIGITS where the name ends in .bs1: no header, 5 bytes an event.

    Byte 0 x, byte 1 y, then 24 bits, big-endian: polarity, 23 bits of microseconds. On a sensor of at most 240 rows,
    y = 240 is no event: it says that 2^13 us passed that the time does not count. In .bs1 the first two bytes are the
    channel, big-endian.
    """
    rows = file.records(0, "V5").view(np.uint8).reshape(-1, 5)
    cochlea = file.path.suffix.lower() == ".bs1"
    y = rows[:, 1]
    t = (rows[:, 2] & 0x7F).astype(np.int64)
    for column in (3, 4):
        t <<= 8
        t |= rows[:, column]
    t = unwrap(t, 2**23)
    p = rows[:, 2] >> 7
    if cochlea:
        channel = rows[:, 0].astype(np.int16) << 8 | y
        return Decoded(t, channel, np.zeros(len(t), np.int16), p, (64, 1), lambda i: 5 * i)
    # An event above row 240 shows that the sensor has that row.
    has_row_240 = bool((y > 240).any()) if sensor is None else sensor[1] > 240
    passed = np.empty(0, np.int64) if has_row_240 else np.flatnonzero(y == 240)
    if not len(passed):
        return Decoded(t, rows[:, 0], y, p, None, lambda i: 5 * i)
    kept = np.flatnonzero(y != 240)
    t = t[kept] + 2**13 * np.searchsorted(passed, kept)
    return Decoded(t, rows[kept, 0], y[kept], p[kept], None, lambda i: 5 * int(kept[i]))


# --- AEDAT 2 and 3.1 --------------------------------------------------------------------------------------------------


# Sizes of the chips whose class is named in a header, such as "eu.seebetter.ini.chips.davis.DAVIS240C".
_CHIPS = {
    "dvs128": (128, 128), "davis128": (128, 128), "davis208": (208, 192), "davis240": (240, 180),
    "davis346": (346, 260),
}  # fmt: skip


def aedat2(file: EventFile, sensor: tuple[int, int] | None) -> Decoded:
    """AEDAT 2: text lines, then pairs of a big-endian 32-bit address and 32-bit microseconds, unsigned.

    DVS128 address: bit 0 polarity, 1 to 7 x, 8 to 14 y, 15 trigger. DAVIS: bit 31 frame or IMU word, 22 to 30 y,
    12 to 21 x, 11 polarity, 10 trigger. The layout is that of the chip in the header, whatever `sensor` says; without
    one, addresses of 16 bits are a DVS128's. Warns where `sensor` is not the chip's size.
    """
    lines, start = file.lines(b"#", ("#End Of ASCII Header", "# End Of ASCII Header"))
    pairs = file.records(start, "V8").view(">u4").reshape(-1, 2)
    address, t = pairs[:, 0], pairs[:, 1]
    named = next((line.split(":", 1)[1].strip() for line in lines if "AEChip:" in line), "")
    chip = next((name for name in _CHIPS if name in named.lower()), None)
    if chip or "davis" in named.lower():
        dvs128 = chip == "dvs128"
    else:  # A DAVIS has its coordinates in the upper bits; a glitch may set some in an address of a DVS128.
        dvs128 = 2 * int(np.count_nonzero(address & 0x7FFF0000)) <= len(address)
    size = _CHIPS[chip] if chip else (128, 128) if dvs128 and not named else None
    if size is None and sensor is None:
        raise file.error(
            0,
            f"camera {named or 'not named'}; known are DVS128, DAVIS128, DAVIS208, DAVIS240 and DAVIS346: give "
            "sensor=(width, height) if its layout is one of theirs",
        )
    if chip and sensor not in (None, size):
        width, height = _CHIPS[chip]
        warnings.warn(
            f"{file.path}: read as a recording of the chip that its header names, {named} of {width}x{height}, which "
            f"is not sensor={sensor}",
            stacklevel=4,  # whoever called read_events
        )
    kept = np.flatnonzero((address & (0x8000 if dvs128 else 0x80000400)) == 0)
    address, t = address[kept].astype(np.uint32), unwrap(t[kept], 2**32)
    if dvs128:
        x, y, p = address >> 1 & 0x7F, address >> 8 & 0x7F, address & 1
    else:
        x, y, p = address >> 12 & 0x3FF, address >> 22 & 0x1FF, address >> 11 & 1
    size = sensor or size
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
    packing = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("#Format:")), "RAW")
    if packing != "RAW":
        raise file.error(0, f"the header names the format {packing!r}, expected 'RAW': compressed packets are not read")
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


# --- Event Stream -----------------------------------------------------------------------------------------------------

_CHUNK = 1 << 12  # bytes at a time: what is needed for one is many times its size


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
