"""The settings of a scan of neurons as ops, kernels and the engine pass them on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.surrogates import SLOPE, Formula

Packed = tuple[float, ...]

# The kernels' numbers of surrogates, and back.
_KIND: dict[str, int] = {} if _dispatch.native is None else {k.name: int(k) for k in _dispatch.native.Surrogate}
_NAME = {number: name for name, number in _KIND.items()}
_OTHERS = 8  # packed numbers in front of the thresholds


class KernelFields(NamedTuple):
    """Fields of kernel arguments, and the tensors that their addresses point to.

    Attributes:
        forward: thresholds and reset.
        backward: surrogate, and whether the reset is detached.
        kept: must live as long as a kernel may read the fields.
    """

    forward: dict[str, Any]
    backward: dict[str, Any]
    kept: tuple[Tensor, Tensor]


class ScanParams(NamedTuple):
    """What a scan (`ops.scan`) knows of its neurons besides tensors.

    Attributes:
        thresholds: potentials at which a neuron fires, one a level.
        v_reset: potential after a spike, and at rest; None for the soft reset.
        strict: fire on `>` instead of `>=`.
        detach_reset: whether the reset is a constant in the backward pass.
        surrogate: the derivative of the step function; `SLOPE` for one that comes as a tensor.
        decay, gain: of the charge, where they are numbers; 0 where they are tensors.
    """

    thresholds: tuple[float, ...]
    v_reset: float | None
    strict: bool = False
    detach_reset: bool = True
    surrogate: Formula = SLOPE
    decay: float = 0.0
    gain: float = 0.0

    @property
    def levels(self) -> int:
        return len(self.thresholds)

    def pack(self) -> Packed:
        """All as numbers, the form in which a custom op takes them."""
        kind, p, q = self.surrogate
        v_reset = math.nan if self.v_reset is None else self.v_reset
        return (self.decay, self.gain, v_reset, self.strict, self.detach_reset, _KIND[kind], p, q, *self.thresholds)

    @staticmethod
    def unpack(numbers: Sequence[float]) -> ScanParams:
        """The inverse of `pack`."""
        return _unpack(tuple(numbers))

    @staticmethod
    def levels_of(numbers: Sequence[float]) -> int:
        """How many thresholds stand in packed numbers, which may be symbols of a trace."""
        return len(numbers) - _OTHERS

    def kernel_fields(self) -> KernelFields:
        """The settings as fields of `ScanForward`, `ScanBackward` and `Epilogue` (native/kernels.hpp)."""
        return _kernel_fields(self)


@lru_cache(maxsize=1024)
def packed(
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    strict: bool,
    detach_reset: bool,
    surrogate: Formula,
    decay: float,
    gain: float,
) -> Packed:
    """`ScanParams.pack` of these; a layer's calls look it up."""
    thresholds = v_threshold if isinstance(v_threshold, tuple) else (v_threshold,)
    return ScanParams(thresholds, v_reset, strict, detach_reset, surrogate, decay, gain).pack()


def surrogate_number(kind: str) -> int:
    """The kernels' number of a surrogate's formula."""
    return _KIND[kind]


@lru_cache(maxsize=1024)
def _unpack(numbers: Packed) -> ScanParams:
    decay, gain, v_reset, strict, detach_reset, kind, p, q, *thresholds = numbers
    surrogate = Formula(_NAME[int(kind)], p, q)
    reset = None if math.isnan(v_reset) else v_reset
    return ScanParams(tuple(thresholds), reset, bool(strict), bool(detach_reset), surrogate, decay, gain)


@lru_cache(maxsize=1024)
def _kernel_fields(params: ScanParams) -> KernelFields:
    threshold = torch.tensor(params.thresholds, dtype=torch.float32, device="cpu")
    above = torch.full_like(threshold, math.inf)
    fire_at = torch.nextafter(threshold, above) if params.strict else threshold
    forward = {
        "v_rest": params.v_reset or 0.0,
        "hard": params.v_reset is not None,
        "levels": params.levels,
        "threshold": threshold.data_ptr(),
        "fire_at": fire_at.data_ptr(),
    }
    kind, p, q = params.surrogate
    backward = {
        "surrogate": _KIND[kind],
        "p": p,
        "q": q,
        "detach_reset": params.detach_reset,
    }
    return KernelFields(forward, backward, (threshold, fire_at))
