"""Five bytes an event, without a header: N-MNIST, N-Caltech101 and N-TIDIGITS."""

from __future__ import annotations

import numpy as np

from spikeloom.data.formats.events import Decoded, EventFile, unwrap


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
