"""Neurons that step through time: linear charge, threshold, reset.

    H[t] = V_rest + decay (V[t-1] - V_rest) + gain X[t]
    F[t] = H[t], or with a `scale` relu(scale H[t])
    S[t] = Theta(F[t] - V_threshold)
    V[t] = F[t] (1 - S[t]) + V_reset S[t]        hard reset, V_rest = V_reset
    V[t] = F[t] - V_threshold S[t]               soft reset (V_reset is None), V_rest = 0

Several thresholds make as many copies of this recurrence on the same input, whose spikes are added.

`scan` chooses between the reference, which is the definition, the native CPU kernel and the compiled path.
Potentials are float32 whatever the input's precision, float64 where the input is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._layout import NATIVE_DTYPES
from spikeloom.ops.scan.compiled import scan_compiled
from spikeloom.ops.scan.native import as_tensor, parted, scan_native, scan_native_potentials
from spikeloom.ops.scan.params import ScanParams, packed
from spikeloom.ops.scan.reference import Constant, per_level, potentials, scan_reference
from spikeloom.surrogates import SLOPE, Surrogate

__all__ = ["Constant", "ScanParams", "fire", "potentials", "scan", "scan_reference"]


def scan(
    x: Tensor,
    v: Tensor | None,
    decay: Constant,
    gain: Constant,
    v_threshold: float | tuple[float, ...],
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    return_v: bool = True,
    scale: Constant | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs one layer of neurons over a sequence (equations at the top of this file).

    Args:
        x: currents [T, N, ...].
        v: potentials [N, ...] before the first step, [levels, N, ...] with several thresholds; None for rest.
        decay, gain: constants of the charge; scalars of any kind, or 0-dimensional tensors that may need gradients.
        v_threshold, v_reset: potentials; v_reset None selects the soft reset.
        surrogate: its derivative replaces that of Theta.
        detach_reset: treat S[t] inside the reset as a constant in the backward pass.
        return_v: whether the caller wants the last potentials.
        scale: of the rectified charge, as decay; None for none.
        strict: fire on `>` instead of `>=`.

    Returns:
        Spikes [T, N, ...] of x's dtype, their sum over the levels, and the potentials after the last step, or None.
    """
    chosen = _dispatch.choose("scan", x, NATIVE_DTYPES, compiled=True)
    if chosen == "reference":
        return scan_reference(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset, scale, strict)
    if chosen == "compiled":
        return scan_compiled(x, v, decay, gain, v_threshold, v_reset, surrogate, detach_reset, scale, strict)
    one = not isinstance(v_threshold, tuple)
    if v is not None:
        v = (v.unsqueeze(0) if one else v).to(torch.float32)
    slope = None
    formula = surrogate.formula
    (fixed_decay, learned_decay), (fixed_gain, learned_gain) = parted(decay), parted(gain)
    # A compiler looks through the cache, and warns of it.
    pack = packed.__wrapped__ if torch.compiler.is_compiling() else packed
    numbers = pack(v_threshold, v_reset, strict, detach_reset, formula or SLOPE, fixed_decay, fixed_gain)
    constants = learned_decay, learned_gain, None if scale is None else as_tensor(scale)
    if formula is None and torch.is_grad_enabled():
        with torch.no_grad():
            f = scan_native_potentials(x, v, constants, numbers)
        slope = surrogate.checked_derivative(f - per_level((v_threshold,) if one else v_threshold, f))
    spikes, last = scan_native(x, v, constants, slope, numbers, return_v)
    return spikes, last.squeeze(0) if one and last is not None else last


def fire(u: Tensor, surrogate: Surrogate, strict: bool = False, threshold: float = 0.0) -> Tensor:
    """`Theta(u - threshold)` with a surrogate's gradient, for any u [T, N, ...], one pass each way: a scan without
    memory."""
    return scan(u, None, 0.0, 1.0, threshold, None, surrogate, True, return_v=False, strict=strict)[0]
