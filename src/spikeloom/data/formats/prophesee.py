"""Prophesee's formats: EVT2, EVT2.1, EVT3 and DAT, decoded as their specifications and openeb say."""

from __future__ import annotations

import re

import numpy as np

from spikeloom.data.formats.events import Array, Columns, Decoded, EventFile, Evt3Time, unwrap

# Sensors by the end of "plugin_name hal_plugin_...", for headers that name no size.
_CAMERAS = {
    "gen3": (640, 480),
    "gen31": (640, 480),
    "gen4": (1280, 720),
    "gen41": (1280, 720),
    "imx636": (1280, 720),
    "imx646": (1280, 720),
    "genx320": (320, 320),
}
_CHUNK = 1 << 12  # words at a time: what is needed for a word is many times its size


def prophesee(file: EventFile, evt3_time: Evt3Time) -> Decoded:
    """The events of a file of lines that begin with "% " and what they name: EVT2, EVT2.1, EVT3 or DAT."""
    lines, start = file.lines(b"% ", ("% end",))
    text = "\n".join(lines).lower()
    size = _sensor(file, text)
    # "% format EVT21;height=320;width=320;endianness=little" goes before "% evt 2.1", which older headers have.
    named = re.search(r"^% format\s+([^;\s]+)", text, re.MULTILINE) or re.search(r"^% evt\s+(\S+)", text, re.MULTILINE)
    if named is None:
        return _dat(file, start, size, text)
    version = re.sub(r"\.0$", "", named[1].removeprefix("evt")).replace(".", "")
    endianness = re.search(r"endianness[= ](\w+)", text)
    order = endianness[1] if endianness else None
    if version not in ("2", "21", "3"):
        raise file.error(0, f"the header names the format {named[1]!r}, expected EVT2, EVT2.1 or EVT3")
    if order not in (None, "little", "legacy" if version == "21" else None):
        raise file.error(0, f"the header names the byte order {order!r}, expected 'little'")
    if version == "2":
        return _evt2(file, start, size)
    return _evt21(file, start, size, order) if version == "21" else _evt3(file, start, size, evt3_time)


def _sensor(file: EventFile, text: str) -> tuple[int, int] | None:
    """The sensor's width and height, if the header says them or names a known camera."""
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
    return size


def _dat(file: EventFile, start: int, size: tuple[int, int] | None, text: str) -> Decoded:
    """DAT: a byte for the type, one for the size, 8; then pairs of 32-bit microseconds and word, little-endian.

    Word: bits 0 to 13 x, 14 to 27 y, 28 polarity; before version 2: bits 0 to 8 x, 9 to 16 y, 17 polarity.
    """
    kind = file.data[start : start + 2].tolist()
    if kind not in ([0, 8], [12, 8]):
        raise file.error(
            start, f"the header names no EVT format, and event type and size {kind} are not DAT's, [0, 8] or [12, 8]"
        )
    pairs = file.records(start + 2, "V8").view("<u4").reshape(-1, 2)
    word = pairs[:, 1]
    version = re.search(r"^% version\s+(\d)", text, re.MULTILINE)
    # Old headers name no version; their words have 18 bits.
    old = int(version[1]) < 2 if version else bool(len(word)) and int(word.max()) < 2**18
    x_bits, y_bits = (9, 8) if old else (14, 14)
    x, y = word & (1 << x_bits) - 1, word >> x_bits & (1 << y_bits) - 1
    p = (word >> x_bits + y_bits & 1).astype(np.uint8)
    t = unwrap(pairs[:, 0], 2**32)
    return Decoded(t, x.astype(np.int16), y.astype(np.int16), p, size, lambda i: start + 2 + 8 * i)


def _turns(high: Array, period: int) -> Array:
    """How often a counter has started again at each of its values, the first of which has seen no turn.

    A step back by half of the period or more is a turn. Any other step is taken as it is: the high bits of the time
    are sent in order, and jump forward where no pixel fired.
    """
    back = np.zeros(len(high), np.bool_)
    back[1:] = high[1:].astype(np.int64) - high[:-1] <= -(period // 2)
    return np.cumsum(back, dtype=np.int64)


def _check_kinds(file: EventFile, start: int, size: int, kind: Array, known: tuple[int, ...]) -> None:
    count = np.bincount(kind, minlength=16)
    count[list(known)] = 0
    if count.any():
        i = int(np.flatnonzero(~np.isin(kind, known))[0])
        raise file.error(start + size * i, f"a word of the unknown type {kind[i]}")


# --- EVT2 and EVT2.1 --------------------------------------------------------------------------------------------------

_EVT2_KINDS = (0, 1, 8, 10, 14, 15)


def _evt2(file: EventFile, start: int, size: tuple[int, int] | None) -> Decoded:
    """EVT2: 32-bit words, little-endian. Top 4 bits 0 OFF, 1 ON: bits 22 to 27 the low 6 bits of the time, 11 to 21 x,
    0 to 10 y; 8: the time from bit 6 on; A trigger, E and F others. Events before the first time are left out.
    """
    words = file.records(start, "<u4")
    _check_kinds(file, start, 4, (words >> 28).astype(np.uint8), _EVT2_KINDS)
    kept, t, x, y, p = _evt2_events(words)
    return Decoded(t, x, y, p, size, lambda i: start + 4 * int(kept[i]))


def _evt2_events(words: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Of the words of events after the first time: their indices, times, x, y and polarities."""
    kind = (words >> 28).astype(np.uint8)
    is_high = kind == 8
    high = (words[is_high] & 0xFFFFFFF).astype(np.int64)
    high += _turns(high, 2**28) << 28
    group = np.cumsum(is_high, dtype=np.int32)
    kept = np.flatnonzero((kind <= 1) & (group > 0)).astype(np.int32)
    word = words[kept]
    t = high[group[kept] - 1] << 6 if len(kept) else np.empty(0, np.int64)
    t |= word >> 22 & 0x3F
    return kept, t, (word >> 11 & 0x7FF).astype(np.int16), (word & 0x7FF).astype(np.int16), kind[kept]


def _evt21(file: EventFile, start: int, size: tuple[int, int] | None, order: str | None) -> Decoded:
    """EVT2.1: 64-bit words, of which one half is a word of EVT2 and the other a mask of 32 pixels from x on.

    The half of EVT2 is the upper one of a little-endian word (GenX320, "little"), or comes first ("legacy": IMX636).
    """
    halves = file.records(start, "V8").view("<u4").reshape(-1, 2)
    kinds = {"little": halves[:, 1] >> 28, "legacy": halves[:, 0] >> 28}
    if order is None:
        possible = [name for name, kind in kinds.items() if np.isin(kind, _EVT2_KINDS).all() and (kind == 8).any()]
        if len(halves) and len(possible) != 1:
            raise file.error(
                0,
                "the header does not say which half of an EVT2.1 word comes first: add the line '% endianness little' "
                "(GenX320) or '% endianness legacy' (IMX636) to it",
            )
        order = possible[0] if possible else "little"
    _check_kinds(file, start, 8, kinds[order].astype(np.uint8), _EVT2_KINDS)
    word, mask = (halves[:, 1], halves[:, 0]) if order == "little" else (halves[:, 0], halves[:, 1])
    kept, t, x, y, p = _evt2_events(word)
    parts = Columns()
    for begin in range(0, len(kept), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        row, bit = np.nonzero(mask[kept[part], None] >> np.arange(32, dtype=np.uint32) & 1)
        row += begin
        at = 8 * (kept[row] - kept[begin])
        parts.add(t[row], x[row] + bit, y[row], p[row], start + 8 * int(kept[begin]), at.astype(np.uint32))
    return parts.decoded(size)


# --- EVT3 -------------------------------------------------------------------------------------------------------------

_Y, _OTHER_Y, _X, _BASE, _VECTOR_12, _VECTOR_8, _LOW, _HIGH = 0, 1, 2, 3, 4, 5, 6, 8
_EVT3_KINDS = (_Y, _OTHER_Y, _X, _BASE, _VECTOR_12, _VECTOR_8, _LOW, 7, _HIGH, 10, 13, 14, 15)


def _evt3(file: EventFile, start: int, size: tuple[int, int] | None, time: Evt3Time) -> Decoded:
    """EVT3: 16-bit words, little-endian, of which the top 4 bits say what they set.

    0 y; 1 the y of events that are none of pixels' changes, which are left out; 2 an event at x, with polarity in bit
    11; 3 the base x and polarity of vectors; 4 and 5 vectors of 12 and 8 pixels from the base on, which moves behind
    them; 6 and 8 bits 0 to 11 and 12 to 23 of the time; 10, 13 and 14 triggers, IMU and others, 7 and 15 what continues
    them. All words before the first of type 8 are left out, as are events before the first y and vectors before the
    first base.
    """
    words = file.records(start, "<u2")
    parts = Columns()
    clock: _Clock | None = None
    y = on = -1  # none yet
    base = 0
    for begin in range(0, len(words), _CHUNK):
        word, at = words[begin : begin + _CHUNK], start + 2 * begin
        kind, value = (word >> 12).astype(np.uint8), (word & 0xFFF).astype(np.int32)
        _check_kinds(file, at, 2, kind, _EVT3_KINDS)
        if clock is None:
            first = int(np.argmax(kind == _HIGH))
            if kind[first] != _HIGH:
                continue
            clock = _Clock(int(value[first]), time)
            kind, value, at = kind[first:], value[first:], at + 2 * first
        t = clock(kind, value)
        y_of, y = _latest(kind <= _OTHER_Y, np.where(kind == _Y, value & 0x7FF, -1), y)
        # A vector's base: where its base word says, and behind the vectors since then. A lone event is a vector of one.
        width = np.where(kind == _VECTOR_12, 12, np.where(kind == _VECTOR_8, 8, 0))
        moved = np.cumsum(width) - width
        base_of, _ = _latest(kind == _BASE, (value & 0x7FF) - moved, base)
        on_of, on = _latest(kind == _BASE, value >> 11, on)
        base = int(base_of[-1] + moved[-1] + width[-1])
        chosen = np.flatnonzero(((kind == _X) | ((width > 0) & (on_of >= 0))) & (y_of >= 0))
        single = kind[chosen] == _X
        mask = np.where(single, 1, value[chosen] & np.where(width[chosen] == 8, 0xFF, 0xFFF))
        row, bit = np.nonzero(mask[:, None] >> np.arange(12) & 1)
        of = chosen[row]
        x = np.where(single[row], value[of] & 0x7FF, base_of[of] + moved[of] + bit)
        p = np.where(single[row], value[of] >> 11, on_of[of])
        parts.add(t[of], x, y_of[of], p, at, (2 * of).astype(np.uint16))
    return parts.decoded(size)


def _latest(at: Array, values: Array, before: int) -> tuple[Array, int]:
    """For each word, the value of the latest word that sets it (where `at`); and the last such value."""
    table = np.concatenate([np.array([before], np.int64), values[at].astype(np.int64)])
    return table[np.cumsum(at)], int(table[-1])


class _Clock:
    """The time of EVT3's words.

    By the specification the time is its high bits and then its low ones, which are 0 from a change of the high bits to
    the next word that sets them. expelliarmus 1.1 adds 2^12 us for each step back of the low bits to what the high ones
    say, and takes each step back of these for a turn of the counter.

    Args:
        high: the first value of bits 12 to 23.
    """

    def __init__(self, high: int, rule: Evt3Time):
        self._high, self._low, self._steps_back = high, 0, 0
        self._expelliarmus = rule == "expelliarmus"

    def __call__(self, kind: Array, value: Array) -> Array:
        """Microseconds at each of the next words."""
        is_high, is_low = kind == _HIGH, kind == _LOW
        highs = np.concatenate([[self._high % 2**12], value[is_high]])
        turns = np.cumsum(np.diff(highs, prepend=0) < 0) if self._expelliarmus else _turns(highs, 2**12)
        highs += (turns + self._high // 2**12) * 2**12
        self._high = int(highs[-1])
        time = highs[np.cumsum(is_high)]
        if self._expelliarmus:
            lows = np.concatenate([[self._low], value[is_low]])
            steps_back = self._steps_back + np.cumsum(np.diff(lows, prepend=0) < 0)
            self._low, self._steps_back = int(lows[-1]), int(steps_back[-1])
            group = np.cumsum(is_low)
            return (time + steps_back[group] << 12) + lows[group]
        resets = is_low.copy()
        resets[is_high] = np.diff(highs) != 0
        low_of, self._low = _latest(resets, np.where(is_low, value, 0), self._low)
        return (time << 12) + low_of
