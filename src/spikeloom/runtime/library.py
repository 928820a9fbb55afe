"""The functions of spikeloom.h (native/include) by ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path


class NetworkError(ValueError):
    """A file, an input or a setting that the runtime does not take; the message says which, and why."""


class Info(ctypes.Structure):
    """`spikeloom_info`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "height", "width", "classes", "steps")),
        *((name, ctypes.c_int32) for name in ("is_static", "per_step", "fixed_steps", "unused")),
        *((name, ctypes.c_double) for name in ("bytes", "operations")),
    )

    channels: int
    height: int
    width: int
    classes: int
    steps: int
    is_static: int
    per_step: int
    fixed_steps: int
    bytes: float
    operations: float


_P, _N, _D, _S, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_char_p, ctypes.c_int
_FUNCTIONS = {  # result and arguments
    "load": (_P, _S, _D, _D),
    "load_memory": (_P, _S, ctypes.c_size_t, _D, _D),
    "free": (None, _P),
    "describe": (_I, _P, ctypes.POINTER(Info)),
    "count": (_N, _P, _N, _N),
    "run": (_I, _P, _P, _N, _N, _P, _N),
    "stream_new": (_P, _P, _N),
    "stream_run": (_I, _P, _P, _N, _P, _N),
    "stream_free": (None, _P),
    "error": (_S,),
    "threads": (_I, _I),
    "level": (_S, _S),
}


@cache
def library() -> ctypes.CDLL:
    """The library: of the package `spikeloom-runtime`, or inside Spikeloom's native kernels.

    Raises:
        NetworkError: there is none, or it does not load.
    """
    here = Path(__file__).parent
    found = [*here.glob("libspikeloom.*"), *here.parent.glob("_native.*.so"), *here.parent.glob("_native.*.pyd")]
    if not found:
        raise NetworkError("this installation has no native kernels: install a C++ compiler, then the package again")
    try:
        loaded = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise NetworkError(f"the native library does not load: {error}") from None
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(loaded, f"spikeloom_{name}")
        function.restype, function.argtypes = result, arguments
    wanted = os.environ.get("SPIKELOOM_LEVEL")
    if wanted and loaded.spikeloom_level(wanted.encode()) is None:
        raise NetworkError(f"SPIKELOOM_LEVEL: {loaded.spikeloom_error().decode(errors='replace')}")
    return loaded


def failure() -> NetworkError:
    """The error of the last call of this thread."""
    return NetworkError(library().spikeloom_error().decode(errors="replace"))
