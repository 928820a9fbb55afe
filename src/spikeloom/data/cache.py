"""Frames of recordings on disk as small integers, made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikeloom.data.formats.events import Array
from spikeloom.errors import UsageError

Json = dict[str, Any]
_VERSION = 1  # of what the cache holds: another version is another key
_DAY = 86400.0


@dataclass(frozen=True)
class Counts:
    """Frames of N recordings, end to end.

    Attributes:
        frames: unsigned integers [sum of lengths, *shape], on disk.
        ends: int64 [N + 1]; recording i is frames[ends[i]:ends[i + 1]].
    """

    frames: Array
    ends: Array


def cache_folder() -> Path:
    """Where frames are kept: SPIKELOOM_CACHE, or spikeloom in the user's cache folder."""
    place = os.environ.get("SPIKELOOM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(place).expanduser() if place else Path(base) / "spikeloom"


def cached(
    name: str,
    key: Json,
    sources: Sequence[Path],
    count: int,
    shape: tuple[int, ...],
    read: Callable[[int], Array],
) -> Counts:
    """The frames of some recordings, from the cache or made now.

    Several processes may do this at once: each writes files of its own and renames them when they are whole. What
    they hold is the same, so it does not matter whose stay. When `read` fails, nothing is kept.

    Args:
        name: of the data set, for the files' names.
        key: all options that decide the frames.
        sources: the files they are read from; another size or time of change is another entry.
        count: recordings.
        shape: of a frame.
        read: the frames [T, *shape] of a recording, by its index.

    Raises:
        UsageError: the cache cannot be written.
        EventFileError: from `read`.
    """
    place = cache_place(name, [key, count, shape], sources)
    found = _open(place, count, shape)
    if found is None:
        _build(place, name, count, shape, read)
        found = _open(place, count, shape)
    if found is None:
        raise UsageError(f"the frames of {name} in {place.parent} are damaged as soon as written: is the disk full?")
    return found


def cache_place(name: str, key: Any, sources: Sequence[Path]) -> Path:
    """Where something made from files is kept, without an ending: it depends on the key, and on the files' sizes and
    times of change.
    """
    stats = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sources]
    text = json.dumps([_VERSION, key, stats], sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def _open(place: Path, count: int, shape: tuple[int, ...]) -> Counts | None:
    """An entry that is there and whole, or None."""
    try:
        with place.with_suffix(".json").open() as file:
            index = json.load(file)
        ends = np.cumsum([0, *index["lengths"]])
        dtype = np.dtype({"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}[index["dtype"]])
        path = place.with_suffix(".frames")
        wanted = (int(ends[-1]), *shape)
        if len(ends) != count + 1 or path.stat().st_size != int(np.prod(wanted)) * dtype.itemsize:
            return None
        frames = np.memmap(path, dtype, "r", shape=wanted) if wanted[0] else np.zeros(wanted, dtype)
        return Counts(frames, ends)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: made anew


class _TooLarge(Exception):
    """A count that a type does not hold."""


def _build(place: Path, name: str, count: int, shape: tuple[int, ...], read: Callable[[int], Array]) -> None:
    from rich.console import Console
    from rich.progress import track

    for dtype in (np.uint8, np.uint16, np.uint32):  # counts above a byte are rare, and never cut
        try:
            with writing(place.with_suffix(".frames")) as temporary, temporary.open("wb") as file:
                lengths: list[int] = []
                console = Console(stderr=True)
                order: Iterable[int] = range(count)
                if console.is_terminal:  # a disabled bar writes an empty line before rich 14.1
                    order = track(order, f"reading {name}", console=console, transient=True)
                for i in order:
                    frames = read(i)
                    if frames.size and frames.max() > np.iinfo(dtype).max:
                        raise _TooLarge
                    assert frames.shape[1:] == shape, (frames.shape, shape)
                    file.write(frames.astype(dtype).tobytes())
                    lengths.append(len(frames))
        except _TooLarge:
            continue
        # The index goes last: where it is, the frames are.
        with writing(place.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({"dtype": np.dtype(dtype).name, "lengths": lengths}))
        return
    raise UsageError(f"{name}: a pixel has more than 2^32 events in a frame")


@contextlib.contextmanager
def writing(path: Path) -> Generator[Path]:
    """A file of this process's own, which takes the name `path` when the block ends well and goes when it does not.

    Raises:
        UsageError: the cache cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            try:
                temporary.replace(path)
            except PermissionError:
                # Windows: another process has the same contents open already.
                if not path.exists():
                    raise
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; free some space or set SPIKELOOM_CACHE to another folder"
        ) from None


def _remove_leftovers(folder: Path) -> None:
    # Of killed processes; a day is longer than any build.
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _DAY:
                path.unlink()
