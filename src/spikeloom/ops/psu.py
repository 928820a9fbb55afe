"""A leaky integration less an estimate of what past spikes took from it: the PSU family.

U[t] = decay U[t-1] + (1 - decay) X[t], or X[t] where the integration is done already
R[t] = decay R[t-1] + (1 - decay) E[t],    E = sigmoid(Z) or Z itself; Z is U where not given
V[t] = U[t] - drop R[t-1],    S[t] = Theta(V[t] - threshold)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import NATIVE_DTYPES, like, ordered, pointer, states_like, steps_of
from spikeloom.ops.leaky_integrator import leaky_filter_reference
from spikeloom.ops.scan import fire
from spikeloom.ops.scan.params import surrogate_number
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
    settings = (decay, drop, threshold, integrate, raw, strict)
    slope, formula = None, surrogate.formula
    if formula is None and torch.is_grad_enabled():
        with torch.no_grad():
            slope = surrogate.checked_derivative(_potentials(x, z, state, *settings) - threshold)
    out = _psu(x, z, state, slope, *settings, *(formula or SLOPE), return_state)
    return out.spikes, out.last if return_state else None


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


class _Inputs(NamedTuple):
    x: Tensor
    z: Tensor | None
    state: Tensor | None
    slope: Tensor | None
    decay: float
    drop: float
    threshold: float
    integrate: bool
    raw: bool
    strict: bool
    kind: str
    p: float
    q: float
    return_state: bool


class _PotentialInputs(NamedTuple):
    x: Tensor
    z: Tensor | None
    state: Tensor | None
    decay: float
    drop: float
    threshold: float
    integrate: bool
    raw: bool
    strict: bool


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    grad_last: Tensor | None
    x: Tensor
    z: Tensor | None
    state: Tensor | None
    slope: Tensor | None
    decay: float
    drop: float
    threshold: float
    integrate: bool
    raw: bool
    strict: bool
    kind: str
    p: float
    q: float


class _Spiked(NamedTuple):
    spikes: Tensor
    last: Tensor | None


class _Gradients(NamedTuple):
    x: Tensor
    z: Tensor | None
    state: Tensor | None


def _fields(i: _Inputs | _PotentialInputs | _BackwardInputs, template: Tensor) -> tuple[dict[str, Any], Any]:
    """The kernels' arguments, and the tensors to which they point."""
    x = ordered(i.x, template, repeated=True)
    z = None if i.z is None else ordered(i.z, template)
    state = None if i.state is None else ordered(i.state, states_like(template), torch.float32)
    fields = {
        **steps_of(x),
        "z": pointer(z),
        "decay": i.decay,
        "drop": i.drop,
        "threshold": i.threshold,
        "integrate": i.integrate,
        "raw": i.raw,
        "strict": i.strict,
        "state": pointer(state),
    }
    return fields, (x, z, state)


def _allocate(i: _Inputs) -> _Spiked:
    spikes = like(i.x, i.x.dtype)
    return _Spiked(spikes, states_like(spikes) if i.return_state else None)


def _fill(i: _Inputs, out: _Spiked) -> None:
    fields, _kept = _fields(i, out.spikes)
    results = {"spikes": out.spikes.data_ptr(), "potentials": 0, "state_out": pointer(out.last)}
    _dispatch.native.psu_forward(**fields, **results)


def _allocate_potentials(i: _PotentialInputs) -> Tensor:
    return like(i.x, torch.float32)


def _fill_potentials(i: _PotentialInputs, v: Tensor) -> None:
    fields, _kept = _fields(i, v)
    _dispatch.native.psu_forward(**fields, spikes=0, potentials=v.data_ptr(), state_out=0)


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    grad_x = like(i.x, i.x.dtype)
    grad_z = None if i.z is None else like(i.x, i.x.dtype)
    return _Gradients(grad_x, grad_z, None if i.state is None else states_like(grad_x))


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    fields, _kept = _fields(i, out.x)
    grad_spikes = ordered(i.grad_spikes, out.x, i.x.dtype)
    grad_last = None if i.grad_last is None else ordered(i.grad_last, states_like(out.x), torch.float32)
    slope = None if i.slope is None else ordered(i.slope, out.x, torch.float32)
    _dispatch.native.psu_backward(
        **fields,
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=pointer(grad_last),
        slope=pointer(slope),
        surrogate=surrogate_number(i.kind),
        p=i.p,
        q=i.q,
        grad_x=out.x.data_ptr(),
        grad_z=pointer(out.z),
        grad_state=pointer(out.state),
    )


def _save(ctx: Any, i: _Inputs, out: _Spiked) -> None:
    *tensors, ctx.settings = i.x, i.z, i.state, i.slope, i[4:-1]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    if not i.return_state and out.last is not None:
        ctx.mark_non_differentiable(out.last)


def _differentiate(ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, z, state, slope = ctx.saved_tensors
    grad_spikes = torch.zeros_like(x) if grad_spikes is None else grad_spikes
    found = _psu_backward(grad_spikes, grad_last, x, z, state, slope, *ctx.settings)
    return found.x, None if z is None else found.z, None if state is None else found.state, *(None,) * 11


_psu = native_op("psu", _Inputs, _allocate, _fill, _save, _differentiate)
_potentials = native_op("psu_potentials", _PotentialInputs, _allocate_potentials, _fill_potentials)
_psu_backward = native_op("psu_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
