"""AEDAT 2 and 3.1, each from the format's public description; vectorised over events.

Bit layouts are given beside each decoder. None allocates by a count that a file claims before comparing it with the
file's length.
"""

from __future__ import annotations

import warnings

import numpy as np

from spikeloom.data.formats.events import Columns, Decoded, EventFile, unwrap

# Sizes of the chips whose class is named in a header, such as "eu.seebetter.ini.chips.davis.DAVIS240C".
_CHIPS = {
    "dvs128": (128, 128),
    "davis128": (128, 128),
    "davis208": (208, 192),
    "davis240": (240, 180),
    "davis346": (346, 260),
}


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


_PACKET = np.dtype(
    [
        ("type", "<i2"),
        ("source", "<i2"),
        ("size", "<i4"),
        ("ts_offset", "<i4"),
        ("overflow", "<i4"),
        ("capacity", "<i4"),
        ("number", "<i4"),
        ("valid", "<i4"),
    ]
)


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
