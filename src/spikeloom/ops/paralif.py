"""Leaky integration and a firing function as one op (ParaLIF, SPSN): `ops.leaky_integrator`, then `ops.paralif_firing`.

The native kernel keeps the input alone, and a seed: the membrane, its map and the random numbers are made again in
the backward pass. Its random numbers are functions of (seed, element), the seed a draw from PyTorch's generator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import NATIVE_DTYPES, like, ordered, pointer, rows_like, states_like
from spikeloom.ops.leaky_integrator import (
    Constant,
    as_constants,
    constant_gradients,
    fill_constant_gradients,
    integrator_fields,
    leaky_filter,
)
from spikeloom.ops.paralif_firing import FIRING, fire_by
from spikeloom.ops.scan.params import surrogate_number
from spikeloom.surrogates import SLOPE, Surrogate

# `paralif_firing.MAPS` to `Map` in native/kernels.hpp; rules have the kernels' names.
_MAPS = {"": "identity", "s": "sigmoid", "t": "tanh", "tr": "relu_tanh"}
State = tuple[Tensor | None, Tensor | None]


def paralif(
    x: Tensor,
    alpha: Constant,
    beta: Constant,
    firing: str,
    threshold: float | Tensor,
    surrogate: Surrogate,
    state: State = (None, None),
    return_state: bool = False,
) -> tuple[Tensor, State]:
    """Spikes of a firing function of the membrane of two leaky filters.

    Args:
        x: currents [T, N, ...].
        alpha, beta: of `leaky_filter`.
        firing, threshold, surrogate: of `fire_by`.
        state: that of the filters [2, N, ...], and for differences the mapped potential [N, ...] before the first
            step; None for rest.
        return_state: whether the caller wants the last state.

    Returns:
        Spikes [T, N, ...] of x's dtype, and the state after the last step.
    """
    filters, before = state
    kind, rule = FIRING[firing]
    random = rule in ("bernoulli", "gumbel")
    formula = surrogate.formula
    chosen = _dispatch.choose("paralif", x, NATIVE_DTYPES)
    # One threshold a feature, or a surrogate that the kernel does not know, take the two ops one after the other.
    known = random or (formula is not None and not (isinstance(threshold, Tensor) and threshold.dim() > 0))
    if chosen != "native" or not known:
        m, filters = leaky_filter(x, alpha, beta, filters, return_state)
        spikes, last = fire_by(firing, m, threshold, surrogate, before)
        return spikes, (filters, last)
    seed = torch.randint(2**31, (), device=x.device) if random else None
    threshold = torch.as_tensor(0.0 if random else threshold, dtype=torch.float32, device=x.device)
    filters, before = (None if state is None else state.float() for state in (filters, before))
    constants, derivative = as_constants(alpha, beta, x), formula or SLOPE
    out = _paralif(x, *constants, threshold, filters, before, seed, _MAPS[kind], rule, *derivative, return_state)
    if not return_state:
        return out.spikes, (None, None)
    return out.spikes, (out.last, out.mapped if rule == "difference" else None)


# --- the native path --------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    x: Tensor
    alpha: Tensor
    beta: Tensor
    threshold: Tensor
    state: Tensor | None
    before: Tensor | None
    seed: Tensor | None
    map: str
    rule: str
    kind: str
    p: float
    q: float
    return_state: bool


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    grad_last: Tensor | None
    grad_mapped: Tensor | None
    x: Tensor
    alpha: Tensor
    beta: Tensor
    threshold: Tensor
    state: Tensor | None
    before: Tensor | None
    seed: Tensor | None
    map: str
    rule: str
    kind: str
    p: float
    q: float
    learn: bool


class _Spiked(NamedTuple):
    spikes: Tensor
    last: Tensor | None
    mapped: Tensor | None


class _Gradients(NamedTuple):
    x: Tensor
    state: Tensor | None
    before: Tensor | None
    threshold: Tensor
    alpha: Tensor
    beta: Tensor


def _fields(i: _Inputs | _BackwardInputs, template: Tensor) -> tuple[dict[str, Any], Any]:
    """The kernels' arguments, and the tensors to which they point."""
    fields, kept = integrator_fields(i.x, i.alpha, i.beta, i.state, template)
    before = None if i.before is None else ordered(i.before, template[0])
    firing = {
        "map": _dispatch.enum_number("Map", i.map),
        "rule": _dispatch.enum_number("Rule", i.rule),
        "threshold": i.threshold.item(),
        "seed": 0 if i.seed is None else int(i.seed),
        "before": pointer(before),
    }
    return fields | firing, (kept, before)


def _allocate(i: _Inputs) -> _Spiked:
    spikes = like(i.x, i.x.dtype)
    differences = i.return_state and i.rule == "difference"
    return _Spiked(
        spikes,
        last=states_like(spikes) if i.return_state else None,
        mapped=rows_like(1, spikes[0], torch.float32)[0] if differences else None,
    )


def _fill(i: _Inputs, out: _Spiked) -> None:
    fields, _kept = _fields(i, out.spikes)
    _dispatch.native.paralif_forward(
        **fields,
        spikes=out.spikes.data_ptr(),
        state_out=pointer(out.last),
        mapped_out=pointer(out.mapped),
    )


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    grad_x = like(i.x, i.x.dtype)
    return _Gradients(
        grad_x,
        None if i.state is None else states_like(grad_x),
        None if i.before is None else rows_like(1, grad_x[0], torch.float32)[0],
        i.x.new_zeros((), dtype=torch.float64),
        *constant_gradients(i.alpha, grad_x, i.learn),
    )


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    fields, _kept = _fields(i, out.x)
    grad_spikes = ordered(i.grad_spikes, out.x, i.x.dtype)
    grad_last = None if i.grad_last is None else ordered(i.grad_last, states_like(out.x), torch.float32)
    grad_mapped = None if i.grad_mapped is None else ordered(i.grad_mapped, out.x[0], torch.float32)
    constants = states_like(out.x) if i.learn else None
    _dispatch.native.paralif_backward(
        **fields,
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=pointer(grad_last),
        grad_mapped_out=pointer(grad_mapped),
        surrogate=surrogate_number(i.kind),
        p=i.p,
        q=i.q,
        grad_x=out.x.data_ptr(),
        grad_state=pointer(out.state),
        grad_before=pointer(out.before),
        grad_alpha=0 if constants is None else constants[0].data_ptr(),
        grad_beta=0 if constants is None else constants[1].data_ptr(),
        grad_threshold=out.threshold.data_ptr(),
    )
    fill_constant_gradients(constants, out.alpha, out.beta)


def _save(ctx: Any, i: _Inputs, out: _Spiked) -> None:
    ctx.settings = i[7:-1]
    ctx.save_for_backward(*i[:7])
    ctx.set_materialize_grads(False)
    wanted = (i.return_state, i.return_state and i.rule == "difference")
    results = zip((out.last, out.mapped), wanted, strict=True)
    ctx.mark_non_differentiable(*(t for t, needed in results if t is not None and not needed))


def _differentiate(
    ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None, grad_mapped: Tensor | None
) -> tuple[Any, ...]:
    x, alpha, beta, threshold, state, before, seed = ctx.saved_tensors
    needed = ctx.needs_input_grad[1:4]
    grads = (torch.zeros_like(x) if grad_spikes is None else grad_spikes, grad_last, grad_mapped)
    tensors = (x, alpha, beta, threshold, state, before, seed)
    found = _paralif_backward(*grads, *tensors, *ctx.settings, needed[0] or needed[1])
    return (
        found.x,
        found.alpha if needed[0] else None,
        found.beta if needed[1] else None,
        found.threshold if needed[2] else None,
        None if state is None else found.state,
        None if before is None else found.before,
        *(None,) * 7,
    )


_paralif = native_op("paralif", _Inputs, _allocate, _fill, _save, _differentiate)
_paralif_backward = native_op("paralif_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
