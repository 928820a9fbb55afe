"""A leaky integration less an estimate of what past spikes took from it: the PSU family.

U[t] = decay U[t-1] + (1 - decay) X[t], or X[t] where the integration is done already
R[t] = decay R[t-1] + (1 - decay) E[t],    E = sigmoid(Z) or Z itself; Z is U where not given
V[t] = U[t] - drop R[t-1],    S[t] = Theta(V[t] - threshold)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import NATIVE_DTYPES, dense, fresh, like, ordered, pointer, rows_like, steps_of
from spikeloom.ops.leaky_integrator import last_state, leaky_filter_reference
from spikeloom.ops.scan import fire
from spikeloom.surrogates import SLOPE, Surrogate


def psu(
    x: Tensor,
    z: Tensor | None,
    decay: float,
    drop: float,
    threshold: float,
    surrogate: Surrogate,
    integrate: bool = True,
    raw: bool = False,
    strict: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Spikes by the equations at the top of this file.

    Args:
        x: currents [T, N, ...], or their integration without `integrate`.
        z: what the estimate is made from [T, N, ...]; None for U.
        decay, drop, threshold: constants.
        surrogate: its derivative replaces that of Theta.
        integrate, raw: whether U integrates, and whether E is Z itself.
        strict: fire on `>` instead of `>=`.
        state: {U, R} before the first step, [2, N, ...]; None for zero.
        return_state: whether the caller wants the last state.

    Returns:
        Spikes [T, N, ...] of x's dtype, and the last state [2, N, ...] or None.
    """
    if _dispatch.choose("psu", x, NATIVE_DTYPES) != "native":
        v, last = psu_reference(x, z, decay, drop, integrate, raw, state)
        return fire(v, surrogate, strict, threshold).to(x.dtype), last if return_state else None
    z = None if z is None else z.to(x.dtype)
    settings = [decay, drop, threshold, integrate, raw, strict]
    slope = None
    if surrogate.formula is None and torch.is_grad_enabled():
        with torch.no_grad():
            slope = surrogate.derivative(_potentials(x, z, state, settings) - threshold)
    kind, p, q = surrogate.formula or (SLOPE, 0.0, 0.0)
    spikes, last = _psu(x, z, state, slope, [*settings, kind, p, q], return_state)
    return spikes, last if return_state else None


def psu_reference(
    x: Tensor, z: Tensor | None, decay: float, drop: float, integrate: bool, raw: bool, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """V [T, N, ...] and the last state [2, N, ...] in plain PyTorch: the definition, differentiated by autograd."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    zero = x.new_zeros(x.shape[1:], dtype=dtype)
    u0, r0 = (zero, zero) if state is None else state.to(dtype)
    # The leaky filter without its synapse is this integration.
    u = leaky_filter_reference(x.to(dtype), 0.0, decay, torch.stack([zero, u0]))[0] if integrate else x.to(dtype)
    z = u if z is None else z.to(dtype)
    e = z if raw else torch.sigmoid(z)
    r = leaky_filter_reference(e, 0.0, decay, torch.stack([zero, r0]))[0]
    late = torch.cat([r0.unsqueeze(0), r[:-1]])
    return u - drop * late, torch.stack([u[-1], r[-1]])


def psu_potentials(
    x: Tensor, z: Tensor | None, decay: float, drop: float, integrate: bool, raw: bool, state: Tensor | None = None
) -> Tensor:
    """V [T, N, ...], without gradients."""
    with torch.no_grad():
        return psu_reference(x, z, decay, drop, integrate, raw, state)[0].to(x.dtype)


# --- the native path --------------------------------------------------------------------------------------------------


def _prepare(
    x: Tensor, z: Tensor | None, state: Tensor | None, settings: list[float]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, dict[str, Any]]:
    """x dense, a template of one step, the others in its order, and the kernel's fields."""
    x = dense(x)
    step = like(x, torch.float32)[0]
    z = None if z is None else ordered(z, like(x, x.dtype))
    state = None if state is None else ordered(state, rows_like(2, step, torch.float32), torch.float32)
    decay, drop, threshold, integrate, raw, strict = settings[:6]
    fields = {
        **steps_of(x),
        "z": pointer(z),
        "decay": decay,
        "drop": drop,
        "threshold": threshold,
        "integrate": bool(integrate),
        "raw": bool(raw),
        "strict": bool(strict),
        "state": pointer(state),
    }
    return x, step, z, state, fields


def _forward(
    x: Tensor, z: Tensor | None, state: Tensor | None, slope: Tensor | None, settings: list[float], return_state: bool
) -> tuple[Tensor, Tensor]:
    x, step, z, state, fields = _prepare(x, z, state, settings)
    spikes, last = fresh(x, x.dtype), last_state(step, return_state)
    _dispatch.native.estimate_forward(
        **fields, spikes=spikes.data_ptr(), potentials=0, state_out=last.data_ptr() if return_state else 0
    )
    return spikes, last


def _fake(x: Tensor, z: Any, state: Any, slope: Any, settings: Any, return_state: bool) -> tuple[Tensor, Tensor]:
    x = dense(x)
    return like(x, x.dtype), last_state(like(x, torch.float32)[0], return_state)


def _potential_values(x: Tensor, z: Tensor | None, state: Tensor | None, settings: list[float]) -> Tensor:
    x, _, z, state, fields = _prepare(x, z, state, settings)
    v = fresh(x, torch.float32)
    _dispatch.native.estimate_forward(**fields, spikes=0, potentials=v.data_ptr(), state_out=0)
    return v


def _fake_potentials(x: Tensor, z: Any, state: Any, settings: Any) -> Tensor:
    return like(dense(x), torch.float32)


def _backward(
    grad_spikes: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    state: Tensor | None,
    slope: Tensor | None,
    settings: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    x, step, z, state, fields = _prepare(x, z, state, settings)
    grad_x = fresh(x, x.dtype)
    grad_spikes = ordered(grad_spikes, grad_x, x.dtype)
    grad_last = None if grad_last is None else ordered(grad_last, rows_like(2, step, torch.float32), torch.float32)
    slope = None if slope is None else ordered(slope, like(x, torch.float32), torch.float32)
    grad_z = x.new_empty(0) if z is None else fresh(x, x.dtype)
    grad_state = last_state(step, state is not None)
    kind, p, q = settings[6:]
    _dispatch.native.estimate_backward(
        **fields,
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=pointer(grad_last),
        slope=pointer(slope),
        surrogate=int(kind),
        p=p,
        q=q,
        grad_x=grad_x.data_ptr(),
        grad_z=0 if z is None else grad_z.data_ptr(),
        grad_state=0 if state is None else grad_state.data_ptr(),
    )
    return grad_x, grad_z, grad_state


def _fake_backward(
    grad_spikes: Any, grad_last: Any, x: Tensor, z: Any, state: Any, slope: Any, settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    grad_z = x.new_empty(0) if z is None else like(x, x.dtype)
    return like(x, x.dtype), grad_z, last_state(like(x, torch.float32)[0], state is not None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.settings, return_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if not return_state:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, z, state, slope = ctx.saved_tensors
    grad_spikes = torch.zeros_like(x) if grad_spikes is None else grad_spikes
    grad_x, grad_z, grad_state = _psu_backward(grad_spikes, grad_last, x, z, state, slope, ctx.settings)
    return grad_x, None if z is None else grad_z, None if state is None else grad_state, None, None, None


_psu = NativeOp("psu", _forward, _fake, _save, _differentiate)
_potentials = NativeOp("psu_potentials", _potential_values, _fake_potentials)
_psu_backward = NativeOp("psu_backward", _backward, _fake_backward)
