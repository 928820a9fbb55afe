"""Which implementation of an op runs: the forced one, else native (CPU), compiled (accelerators) or reference."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spikeloom.errors import UsageError
from spikeloom.modes import tracing, transformed

Backend = Literal["reference", "native", "compiled"]

_log = logging.getLogger("spikeloom")
_forced: Backend | None = None
_logged: set[tuple[str, str]] = set()


def _mkl_threads() -> int:
    """The address of the function that sets how many threads MKL takes in the calling thread, 0 without MKL."""
    name = "MKL_Set_Num_Threads_Local"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded before
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _load_native() -> Any:
    try:
        module = importlib.import_module("spikeloom._native")
    except ImportError:
        return None
    module.use_mkl(_mkl_threads())
    level = os.environ.get("SPIKELOOM_LEVEL")
    if level:
        try:
            module.set_level(level)
        except ValueError as error:
            raise UsageError(f"SPIKELOOM_LEVEL: {error}; this one has {', '.join(module.levels())}") from None
    return module


# Loaded after torch, so that both share one OpenMP pool. None where the package was built without a compiler.
native: Any = _load_native()


@cache
def enum_number(enum: str, name: str) -> int:
    """The number of a name in one of the native module's enums (native/kernels.hpp)."""
    return int(getattr(native, enum)[name])


@contextmanager
def backend(name: Backend) -> Generator[None]:
    """Forces one implementation of every op, for the whole process, inside the `with` block.

    Args:
        name: "reference" (plain PyTorch, the definition), "native" (fused CPU kernels) or "compiled"
            (the reference and its backward under `torch.compile`, what accelerators run).

    Raises:
        UsageError: unknown name, or "native" without the compiled kernels.
    """
    global _forced
    if name not in get_args(Backend):
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(get_args(Backend))}")
    if name == "native" and native is None:
        raise UsageError("this installation has no native kernels: install a C++ compiler, then Spikeloom again")
    outer, _forced = _forced, name
    try:
        yield
    finally:
        _forced = outer


def choose(op: str, x: Tensor, native_dtypes: tuple[torch.dtype, ...], compiled: bool = False) -> Backend:
    """The backend for an op on x, logged once per op; a forced one that cannot take x is an error.

    An op that has no compiled path (`compiled` False) is parallel over time already: its reference runs instead.
    Transforms of `torch.func` and forward-mode differentiation are served by the reference.

    Raises:
        TypeError: x is not of a floating-point type.
        UsageError: the forced backend cannot take x, or cannot be transformed.
    """
    able = native is not None and x.is_cpu and x.dtype in native_dtypes
    if not able and not x.is_floating_point():
        raise TypeError(f"{op} takes floating-point tensors, got {x.dtype}: convert with x.float()")
    compiling = torch.compiler.is_compiling()
    # ONNX has no operators of ours; of its two exporters one traces and one compiles, but not by dynamo.
    onnx = (not torch.compiler.is_dynamo_compiling() if compiling else tracing()) and torch.onnx.is_in_onnx_export()
    if onnx or (not compiling and transformed()):
        if _forced == "native" or (_forced == "compiled" and compiled):
            raise UsageError(f"{op}: torch.func and ONNX need plain PyTorch; leave out backend({_forced!r})")
        chosen: Backend = "reference"
    elif _forced is not None:
        if _forced == "native" and not able:
            raise UsageError(f"{op}: no native kernel for {x.dtype} on {x.device.type}; use backend('reference')")
        chosen = _forced if compiled or _forced != "compiled" else "reference"
    elif able:
        chosen = "native"
    elif compiled and x.device.type not in ("cpu", "meta") and not compiling:
        chosen = "compiled"
    else:
        # Inside a user's own torch.compile the reference is traced and fused with its neighbours.
        chosen = "reference"
    if not compiling and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _log.info("%s: %s backend (%s, %s)", op, chosen, x.device.type, x.dtype)
    return chosen
