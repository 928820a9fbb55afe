"""ST-MNIST: a MATLAB 5 file with one matrix of spikes."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from spikeloom.data.formats.events import Array, Columns, Decoded, EventFile

_ROWS = 101  # 100 sensors, then the time in seconds
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_SAMPLE = 1 << 16


class _Reader:
    """The bytes of an element, decompressed as they are asked for: a matrix of zeros would unfold a thousand times."""

    def __init__(self, file: EventFile, at: int, data: bytes, compressed: bool):
        self.file, self.at = file, at
        self.decoder = zlib.decompressobj() if compressed else None
        self.rest, self.ready = data, b""

    def take(self, count: int) -> bytes:
        while len(self.ready) < count:
            if self.decoder is None:
                more, self.rest = self.rest, b""
            else:
                try:
                    more = self.decoder.decompress(self.rest, max(count - len(self.ready), _SAMPLE))
                except zlib.error as error:
                    raise self.file.error(self.at, f"damaged: {error}") from None
                self.rest = self.decoder.unconsumed_tail
            if not more:
                raise self.file.error(self.at, f"truncated: {count} bytes of a matrix wanted, {len(self.ready)} there")
            self.ready += more
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken

    def tag(self) -> tuple[int, int, bytes | None]:
        """An element's type and bytes, and these bytes themselves where they are at most 4."""
        kind, size = struct.unpack("<II", self.take(8))
        if kind >> 16:
            return kind & 0xFFFF, kind >> 16, struct.pack("<I", size)[: kind >> 16]
        return kind, size, None

    def small(self, most: int) -> bytes:
        """A short element with its padding to 8 bytes."""
        _, size, inside = self.tag()
        if inside is not None:
            return inside
        if size > most:
            raise self.file.error(self.at, f"damaged: {size} bytes for a part of a matrix's header")
        return self.take(size + -size % 8)[:size]


def st_mnist(file: EventFile) -> Decoded:
    """ST-MNIST: variable `spiketrain`, 101 rows: 100 touch sensors with -1, 0 or 1, and the time in seconds.

    Sensor i is at x = i mod 10, y = floor(i / 10); p is 1 for 1.
    """
    if len(file.data) < 136:
        raise file.error(len(file.data), "truncated: in the header of a MATLAB file")
    if file.data[126:128].tobytes() != b"IM":
        raise file.error(126, "a MATLAB file of a big-endian machine or of a version other than 5")
    start = 128
    while start + 8 <= len(file.data):
        kind, size = file.unpack("<II", start)
        body = start + 8
        if body + size > len(file.data):
            raise file.error(
                start, f"truncated: a variable of {size} bytes, of which {len(file.data) - body} are there"
            )
        reader = _Reader(file, start, file.data[body : body + size].tobytes(), kind == _COMPRESSED)
        if kind == _COMPRESSED:
            kind, _, _ = reader.tag()
        if kind == _MATRIX:
            reader.small(16)  # flags
            shape = np.frombuffer(reader.small(64), np.uint8)
            name = reader.small(256)
            if name == b"spiketrain" and len(shape) == 8:
                rows, columns = shape.view("<i4").tolist()
                return _spikes(file, start, reader, rows, columns)
        start = body + size
    raise file.error(start, "a MATLAB file without a matrix named spiketrain")


def _spikes(file: EventFile, start: int, reader: _Reader, rows: int, columns: int) -> Decoded:
    kind, size, _ = reader.tag()
    if rows != _ROWS or kind not in _NUMBERS:
        raise file.error(start, f"spiketrain has {rows} rows of type {kind}, expected {_ROWS} rows of numbers")
    number = np.dtype(_NUMBERS[kind])
    if columns < 0 or size != rows * columns * number.itemsize:
        raise file.error(start, f"spiketrain has {size} bytes, expected {rows} x {columns} x {number.itemsize}")
    parts = Columns()
    at_once = 64  # columns: 50 kB
    for done in range(0, columns, at_once):
        count = min(at_once, columns - done)
        block: Array = np.frombuffer(reader.take(count * rows * number.itemsize), number).reshape(count, rows)
        seconds = block[:, 100].astype(np.float64)
        if not (np.isfinite(block).all() and (np.abs(seconds) < 1e9).all()):
            raise file.error(start, f"spiketrain has a value that is no spike or time, in columns {done + 1} and on")
        column, sensor = np.nonzero(block[:, :100])
        t = np.rint(1e6 * seconds[column]).astype(np.int64)
        p = block[column, sensor] > 0
        parts.add(t, sensor % 10, sensor // 10, p, start, np.zeros(len(t), np.uint8))
    return parts.decoded((10, 10))
