"""Networks and streams over the C library: NumPy in, NumPy out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikeloom.runtime.library import Info, NetworkError, failure, library

Logits = NDArray[np.float32]


def load(path: str | os.PathLike[str], max_bytes: float = 0, max_operations: float = 0) -> Network:
    """A network from the file that `spikeloom run RUN --save FILE` wrote. Nothing in it is executed; all is checked.

    Args:
        path: of the file.
        max_bytes, max_operations: the most that one image may cost; 0 for 2 GiB of maps and 200 billion operations.

    Raises:
        NetworkError: the file is not there or not whole, its plan and weights do not fit together, or an image costs
            more than is allowed.
    """
    found = library().spikeloom_load(os.fsencode(path), max_bytes, max_operations)
    if not found:
        raise failure()
    return Network(found)


class Network:
    """A trained network. Called with images [N, C, H, W], or sequences [T, N, C, H, W] where it takes such; of
    features, [N, C] and [T, N, C]. Threads may call it at the same time."""

    def __init__(self, handle: int):
        self._handle, self._info = handle, Info()
        library().spikeloom_describe(handle, ctypes.byref(self._info))

    def __repr__(self) -> str:
        info = self._info
        steps = f"{info.steps} steps of an image" if info.is_static else "sequences"
        return f"Network({info.channels}x{info.height}x{info.width} -> {info.classes}, {steps})"

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().spikeloom_free(self._handle)
            self._handle = 0

    @property
    def info(self) -> dict[str, Any]:
        """Shapes and costs: the fields of `spikeloom_info` in spikeloom.h."""
        names = (field[0] for field in Info._fields_ if field[0] != "unused")
        return {name: getattr(self._info, name) for name in names}

    def __call__(self, x: ArrayLike) -> Logits:
        """Logits [T, N, classes], or [N, classes] of a network that joins its steps.

        Raises:
            NetworkError: x has another shape, or holds NaN or infinite numbers.
        """
        given, steps, images = self._input(x)
        count = library().spikeloom_count(self._handle, steps, images)
        if count < 0:
            raise failure()
        return self._logits(
            images,
            count,
            lambda out: library().spikeloom_run(
                self._handle, given.ctypes.data, steps, images, out.ctypes.data, out.size
            ),
        )

    def stream(self) -> Stream:
        """The network with neurons that remember: a call continues where the one before it ended."""
        return Stream(self)

    def advance(self, stream: int, x: ArrayLike, images: int) -> Logits:
        """A stream's next steps."""
        given, steps, found = self._input(x)
        if found != images:
            raise NetworkError(f"this stream carries {images} images, got {found}: start another")
        count = (steps if self._info.per_step else 1) * images * self._info.classes
        return self._logits(
            images,
            count,
            lambda out: library().spikeloom_stream_run(stream, given.ctypes.data, steps, out.ctypes.data, out.size),
        )

    def new_stream(self, x: ArrayLike) -> tuple[int, int]:
        """The library's handle of a stream for as many images as x has, and their number."""
        images = self._input(x)[2]
        handle = library().spikeloom_stream_new(self._handle, images)
        if not handle:
            raise failure()
        return handle, images

    def _logits(self, images: int, count: int, run: Callable[[Logits], int]) -> Logits:
        shape = (-1, images, self._info.classes) if self._info.per_step else (images, self._info.classes)
        out = np.empty(count, np.float32)
        if run(out) != 0:
            raise failure()
        return out.reshape(shape)

    def _input(self, x: ArrayLike) -> tuple[NDArray[np.float32], int, int]:
        """The input as numbers side by side, its steps and its images."""
        info, array = self._info, np.asarray(x)
        whole = (info.channels, info.height, info.width)
        shapes: list[tuple[int, ...]] = [whole]
        if info.height == 1:
            shapes.append((info.channels, info.width))
        if whole[1:] == (1, 1):
            shapes.append((info.channels,))
        axes = 1 if info.is_static else 2
        if array.dtype.kind in "biuf" and array.size:
            for shape in shapes:
                lead = array.ndim - len(shape)
                if lead == axes and array.shape[lead:] == shape:
                    steps, images = (1, array.shape[0]) if info.is_static else array.shape[:2]
                    return np.ascontiguousarray(array, np.float32), int(steps), int(images)
        begin = "[N, " if info.is_static else "[T, N, "
        expected = " or ".join(f"{begin}{', '.join(map(str, shape))}]" for shape in shapes)
        raise NetworkError(f"this network takes {expected}, got {array.dtype} {list(array.shape)}")


class Stream:
    """Steps as they come: carries the potentials of all neurons from call to call."""

    def __init__(self, network: Network):
        self._network = network
        self._handle, self._images = 0, 0

    def __repr__(self) -> str:
        return f"Stream({self._network!r}, {'neurons remember' if self._handle else 'at rest'})"

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().spikeloom_stream_free(self._handle)
            self._handle = 0

    def __call__(self, x: ArrayLike) -> Logits:
        """Logits of the next steps, as the network's; of an image that is repeated, one step."""
        if not self._handle:
            self._handle, self._images = self._network.new_stream(x)
        return self._network.advance(self._handle, x, self._images)


def set_threads(threads: int) -> None:
    """Threads of all calls from here on; 0 for as many as there are cores."""
    if library().spikeloom_threads(threads) != 0:
        raise failure()


def level(name: str | None = None) -> str:
    """The instruction level in use; with a name, that of networks that are loaded from here on."""
    found = library().spikeloom_level(None if name is None else name.encode())
    if found is None:
        raise failure()
    return found.decode()
