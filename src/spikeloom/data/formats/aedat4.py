"""AEDAT 4: packets of flatbuffers, compressed.

"#!AER-DAT4.0\\r\\n"; a header, size-prefixed: compression, position of the index, XML that names the streams
packets up to the index: int32 stream, int32 bytes, then that many bytes, compressed, of a size-prefixed flatbuffer
an event packet: one vector of 16 bytes an event: int64 microseconds, int16 x, int16 y, bool polarity, 3 unused
"""

from __future__ import annotations

import importlib
import re
import struct
from typing import Any

import numpy as np

from spikeloom.data.formats.events import Columns, Decoded, EventFile

_START = 14
_LZ4, _ZSTD = (1, 2), (3, 4)
# Event packets shrink to about half. What grows more than this was made to fill the memory.
MOST_GROWTH = 7


def aedat4(file: EventFile) -> Decoded:
    """The events of the first event stream.

    Raises:
        EventFileError: truncated, damaged, without an event stream, or compressed in an unknown way.
    """
    compression, end, xml, start = _header(file)
    stream, size = _stream(file, xml)
    parts = Columns()
    budget = MOST_GROWTH * len(file.data)
    while start < end:
        if start + 8 > end:
            raise file.error(start, "truncated: in the header of a packet")
        of, length = file.unpack("<ii", start)
        body = start + 8
        if length < 0 or body + length > end:
            raise file.error(start, f"truncated: a packet of {length} bytes, of which {end - body} are there")
        if of == stream:
            packet = _decompress(file, body, length, compression, budget)
            budget -= len(packet)
            events = _vector(file, body, packet)
            words = events.view("<u8").reshape(-1, 2)
            shorts = events.view("<i2").reshape(-1, 8)
            # All events of a compressed packet lie, for messages, at its first byte.
            at = np.zeros(len(words), np.uint8)
            parts.add(words[:, 0], shorts[:, 4], shorts[:, 5], events.reshape(-1, 16)[:, 12] != 0, body, at)
        start = body + length
    return parts.decoded(size)


def _header(file: EventFile) -> tuple[int, int, str, int]:
    """Compression, the byte where packets end, the XML, and the byte where packets begin."""
    data = file.data
    if len(data) < _START + 4:
        raise file.error(len(data), "truncated: in the header")
    (length,) = file.unpack("<I", _START)
    start = _START + 4 + length
    if start > len(data):
        raise file.error(_START, f"truncated: a header of {length} bytes in a file of {len(data)}")
    table = _Table(data[_START + 4 : start].tobytes())
    try:
        compression = table.field(0, "<i", 0)
        end = table.field(1, "<q", -1)
        xml = table.text(2)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise file.error(_START + 4, "damaged header: an offset leads out of it") from None
    if end < 0:
        end = len(data)  # a recording that was not closed has no index
    if not start <= end <= len(data):
        raise file.error(_START, f"truncated: the index is at byte {end}, beyond the {len(data)} of the file")
    if compression not in (0, *_LZ4, *_ZSTD):
        raise file.error(_START, f"compression {compression}, expected 0 to 4 (none, LZ4, ZSTD)")
    return compression, end, xml, start


def _stream(file: EventFile, xml: str) -> tuple[int, tuple[int, int]]:
    """The first event stream and its sensor's width and height."""
    nodes = re.split(r'<node name="\d+" path="[^"]{0,200}outInfo/(\d{1,9})/">', xml)
    for number, text in sorted(zip(map(int, nodes[1::2]), nodes[2::2], strict=True)):
        if re.search(r'key="typeIdentifier"[^>]{0,100}>EVTS<', text):
            sides = [re.search(rf'key="size{axis}"[^>]{{0,100}}>(\d{{1,5}})<', text) for axis in "XY"]
            found = tuple(int(side[1]) for side in sides if side)
            if len(found) != 2 or not all(0 < side < 2**15 for side in found):
                raise file.error(_START, f"event stream {number} has no valid sizeX and sizeY")
            return number, (found[0], found[1])
    raise file.error(_START, "the header names no stream of events (EVTS)")


class _Table:
    """The root table of a flatbuffer: offsets are relative, and checked by `struct` and slices."""

    def __init__(self, data: bytes):
        self.data = data

    def _place(self, number: int) -> int | None:
        """The byte of a field, or None where it has its default."""
        (root,) = struct.unpack_from("<I", self.data, 0)
        (back,) = struct.unpack_from("<i", self.data, root)
        entries = root - back
        if entries < 0:
            raise IndexError(entries)
        (length,) = struct.unpack_from("<H", self.data, entries)
        if 4 + 2 * number >= length:
            return None
        (offset,) = struct.unpack_from("<H", self.data, entries + 4 + 2 * number)
        return root + offset if offset else None

    def field(self, number: int, kind: str, default: int) -> int:
        place = self._place(number)
        return default if place is None else int(struct.unpack_from(kind, self.data, place)[0])

    def span(self, number: int) -> tuple[int, int]:
        """Where a vector or string begins, and its length."""
        place = self._place(number)
        if place is None:
            return 0, 0
        place += struct.unpack_from("<I", self.data, place)[0]
        return place + 4, int(struct.unpack_from("<I", self.data, place)[0])

    def text(self, number: int) -> str:
        start, length = self.span(number)
        if start + length > len(self.data):
            raise IndexError(length)
        return self.data[start : start + length].decode()


def _vector(file: EventFile, at: int, packet: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a packet's events, 16 each."""
    if len(packet) < 4 or struct.unpack_from("<I", packet)[0] + 4 > len(packet):
        raise file.error(at, "damaged packet: shorter than it says")
    try:
        start, count = _Table(packet[4:]).span(0)
    except (struct.error, IndexError):
        raise file.error(at, "damaged packet: an offset leads out of it") from None
    if 4 + start + 16 * count > len(packet):
        raise file.error(at, f"damaged packet: {count} events do not fit into its {len(packet)} bytes")
    return np.frombuffer(packet, np.uint8, 16 * count, 4 + start)


def _decompress(file: EventFile, at: int, length: int, compression: int, budget: int) -> bytes:
    data = file.data[at : at + length].tobytes()
    if compression == 0:
        return data
    lz4 = compression in _LZ4
    name = "lz4" if lz4 else "zstandard"
    try:
        codec: Any = importlib.import_module("lz4.frame" if lz4 else name)
    except ImportError:
        raise file.error(at, f"compressed with {name}, which is not installed: pip install {name}") from None
    try:
        if lz4:
            decoder = codec.LZ4FrameDecompressor()
            packet, whole = decoder.decompress(data, max_length=budget + 1), decoder.eof
        else:
            decoder = codec.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
            packet, whole = decoder.read(budget + 1), True
    except Exception as error:  # RuntimeError of lz4, zstandard's own
        raise file.error(at, f"damaged packet: {' '.join(str(error).split())}") from None
    if len(packet) > budget:
        raise file.error(
            at, f"the packets grow to more than {MOST_GROWTH} times the file, which those of recordings do not"
        )
    if not whole:
        raise file.error(at, "damaged packet: its compressed data have no end")
    return packet
