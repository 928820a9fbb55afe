"""Event Stream files (.es): bytes, each of which says how much time passed or begins an event."""

from __future__ import annotations

import numpy as np

from spikeloom.data.formats.events import Columns, Decoded, EventFile

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
