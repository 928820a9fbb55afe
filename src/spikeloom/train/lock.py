"""A lock on a folder, held by one process; the operating system ends it with the process, whatever ends that."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path

from spikeloom.errors import UsageError

NAME = ".lock"
"""Of the file that is locked. It is removed with the lock; a killed process leaves it behind, unlocked."""

_held: set[int] = set()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Holds a folder for this process while the block runs.

    Children made by `fork` do not hold the lock. On a file system without locks nothing is held.

    Raises:
        UsageError: another process, or another part of this one, holds it.
        OSError: the folder cannot be written.
    """
    file = _open(folder)
    _held.add(file)
    try:
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        if file in _held:  # not in a child
            with contextlib.suppress(OSError):  # Windows does not remove open files: there it stays
                (folder / NAME).unlink()
            _held.remove(file)
            os.close(file)


def _open(folder: Path) -> int:
    path = folder / NAME
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(file):
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise UsageError(f"{folder} is in use by {holder}: wait until it ends or stop it, or choose another folder")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)  # of a lock that ended, with its file, between the first two lines


def _lock(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, 1 << 20, os.SEEK_SET)  # others may read what stands before
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _release_in_child() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
