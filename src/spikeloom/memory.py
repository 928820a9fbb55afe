"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Lets freed memory stay with this process instead of going back to the system; returns whether that is possible.

    glibc maps every block above 32 MB anew, and the system then clears its pages: writing an activation of 33 MB took
    two to three times as long as into memory that was used before. A training step frees what it allocates, so keeping
    it does not raise the peak. The command line, `fit` and `train_recipe` call it. A loop of your own is left alone,
    because it changes the allocator of the whole process. Does nothing without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])
