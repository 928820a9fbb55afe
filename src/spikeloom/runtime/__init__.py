"""Networks of `spikeloom run --save`, run with NumPy and the native library alone: nothing here imports PyTorch.

`spikeloom.runtime` is part of Spikeloom, and a package of its own (`spikeloom-runtime`) where nothing else is wanted.
"""

from __future__ import annotations

from spikeloom.runtime.network import Network, NetworkError, Stream, level, load, set_threads

__all__ = ["Network", "NetworkError", "Stream", "level", "load", "set_threads"]
