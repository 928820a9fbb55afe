"""Leaky integration and a firing function as one op (ParaLIF, SPSN): `ops.leaky_integrator`, then `ops.paralif_firing`.

The native kernel keeps the input alone, and a seed: the membrane, its map and the random numbers are made again in
the backward pass. Its random numbers are functions of (seed, element), the seed a draw from PyTorch's generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import NATIVE_DTYPES, dense, fresh, like, ordered, pointer, rows_like
from spikeloom.ops.leaky_integrator import (
    Constant,
    aligned,
    as_constants,
    constant_gradients,
    integrator_fields,
    last_state,
    leaky_filter,
)
from spikeloom.ops.paralif_firing import FIRING, fire_by
from spikeloom.surrogates import Surrogate

_MAPS = ("", "s", "t", "tr")
_RULES = ("threshold", "difference", "bernoulli", "gumbel")
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
    numbers = [float(_MAPS.index(kind)), float(_RULES.index(rule)), *(formula or (0, 0.0, 0.0))]
    seed = torch.randint(2**31, (), device=x.device) if random else None
    threshold = torch.as_tensor(0.0 if random else threshold, dtype=torch.float32, device=x.device)
    before = None if before is None else before.float()
    spikes, filters, last = _paralif(
        x,
        *as_constants(alpha, beta, x),
        threshold,
        None if filters is None else filters.float(),
        before,
        seed,
        numbers,
        return_state,
    )
    if not return_state:
        return spikes, (None, None)
    return spikes, (filters, last if rule == "difference" else None)


def _fields(numbers: list[float], threshold: Tensor, before: Tensor | None, seed: Tensor | None) -> dict[str, Any]:
    return {
        "map": int(numbers[0]),
        "rule": int(numbers[1]),
        "threshold": threshold.item(),
        "seed": 0 if seed is None else int(seed),
        "before": pointer(before),
    }


def _differences(numbers: list[float]) -> bool:
    return _RULES[int(numbers[1])] == "difference"


def _forward(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    threshold: Tensor,
    state: Tensor | None,
    before: Tensor | None,
    seed: Tensor | None,
    numbers: list[float],
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, step, alpha, beta, state = aligned(x, alpha, beta, state)
    before = None if before is None else ordered(before, step)
    spikes = fresh(x, x.dtype)
    last = last_state(step, return_state)
    mapped = torch.empty_like(step) if return_state and _differences(numbers) else step.new_empty(0)
    _dispatch.native.filter_fire_forward(
        **integrator_fields(x, alpha, beta, state),
        **_fields(numbers, threshold, before, seed),
        spikes=spikes.data_ptr(),
        state_out=last.data_ptr() if return_state else 0,
        mapped_out=mapped.data_ptr() if mapped.numel() else 0,
    )
    return spikes, last, mapped


def _fake(
    x: Tensor,
    alpha: Any,
    beta: Any,
    threshold: Any,
    state: Any,
    before: Any,
    seed: Any,
    numbers: Any,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    step = like(x, torch.float32)[0]
    mapped = torch.empty_like(step) if return_state and _differences(numbers) else step.new_empty(0)
    return like(x, x.dtype), last_state(step, return_state), mapped


def _backward(
    grad_spikes: Tensor,
    grad_last: Tensor | None,
    grad_mapped: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    threshold: Tensor,
    state: Tensor | None,
    before: Tensor | None,
    seed: Tensor | None,
    numbers: list[float],
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, step, alpha, beta, state = aligned(x, alpha, beta, state)
    before = None if before is None else ordered(before, step)
    grad_x = fresh(x, x.dtype)
    grad_spikes = ordered(grad_spikes, grad_x, x.dtype)
    grad_last = None if grad_last is None else ordered(grad_last, rows_like(2, step, torch.float32), torch.float32)
    grad_mapped = None if grad_mapped is None else ordered(grad_mapped, step, torch.float32)
    grad_state = last_state(step, state is not None)
    grad_before = torch.empty_like(step) if before is not None else step.new_empty(0)
    constants = rows_like(2, step, torch.float32) if learn else step.new_zeros(2)
    grad_threshold = x.new_zeros((), dtype=torch.float64)
    _, _, kind, p, q = numbers
    _dispatch.native.filter_fire_backward(
        **integrator_fields(x, alpha, beta, state),
        **_fields(numbers, threshold, before, seed),
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=pointer(grad_last),
        grad_mapped_out=pointer(grad_mapped),
        surrogate=int(kind),
        p=p,
        q=q,
        grad_x=grad_x.data_ptr(),
        grad_state=0 if state is None else grad_state.data_ptr(),
        grad_before=0 if before is None else grad_before.data_ptr(),
        grad_alpha=constants[0].data_ptr() if learn else 0,
        grad_beta=constants[1].data_ptr() if learn else 0,
        grad_threshold=grad_threshold.data_ptr(),
    )
    return grad_x, grad_state, grad_before, grad_threshold, *constant_gradients(constants, learn and alpha.dim() == 0)


def _fake_backward(
    grad_spikes: Any,
    grad_last: Any,
    grad_mapped: Any,
    x: Tensor,
    alpha: Tensor,
    beta: Any,
    threshold: Any,
    state: Any,
    before: Any,
    seed: Any,
    numbers: Any,
    learn: bool,
) -> Any:
    x = dense(x)
    step = like(x, torch.float32)[0]
    constant = torch.empty_like(step) if learn and alpha.dim() else step.new_empty(())
    return (
        like(x, x.dtype),
        last_state(step, state is not None),
        torch.empty_like(step) if before is not None else step.new_empty(0),
        step.new_empty((), dtype=torch.float64),
        constant,
        constant.clone(),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.numbers, return_state = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    unwanted = output[1:] if not return_state else [] if _differences(ctx.numbers) else output[2:]
    ctx.mark_non_differentiable(*unwanted)


def _differentiate(
    ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None, grad_mapped: Tensor | None
) -> tuple[Any, ...]:
    x, alpha, beta, threshold, state, before, seed = ctx.saved_tensors
    _, *needed, _, _, _, _, _ = ctx.needs_input_grad
    grad_spikes = torch.zeros_like(x) if grad_spikes is None else grad_spikes
    grad_x, grad_state, grad_before, grad_threshold, grad_alpha, grad_beta = _paralif_backward(
        grad_spikes,
        grad_last,
        grad_mapped,
        x,
        alpha,
        beta,
        threshold,
        state,
        before,
        seed,
        ctx.numbers,
        needed[0] or needed[1],
    )
    return (
        grad_x,
        grad_alpha if needed[0] else None,
        grad_beta if needed[1] else None,
        grad_threshold.float() if needed[2] else None,
        None if state is None else grad_state,
        None if before is None else grad_before,
        None,
        None,
        None,
    )


_paralif = NativeOp("paralif", _forward, _fake, _save, _differentiate)
_paralif_backward = NativeOp("paralif_backward", _backward, _fake_backward)
