"""GLIF: a leaky neuron with gates and constants of its own for every channel (Yao et al. 2022, GLIF).

    U[t] = decay U[t-1] (1 - gate S[t-1]) - drop S[t-1] - leak + open[t] X[t]
    S[t] = Theta(U[t] - threshold)

decay, drop, leak, gate and threshold are constants [C] of the channels, open the input's gate [T, C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import by_channels, fresh, like, ordered, pointer, rows_like, steps_by_channels
from spikeloom.surrogates import Surrogate


def gated_scan(
    x: Tensor,
    open: Tensor,
    constants: Tensor,
    surrogate: Surrogate,
    strict: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence at the top of this file.

    Args:
        x: currents [T, N, C, ...].
        open: the gate of every step's input [T, C].
        constants: decay, drop, leak, gate, threshold [5, C].
        surrogate: its derivative replaces that of Theta.
        strict: fire on `>` instead of `>=`.
        state: {U, S} of the step before the first, [2, N, C, ...]; None for zero.

    Returns:
        Spikes [T, N, C, ...] of x's dtype, and the last state [2, N, C, ...].
    """
    if x.dim() < 3 or open.shape != (x.shape[0], x.shape[2]) or constants.shape != (5, x.shape[2]):
        raise ValueError(
            f"x [T, N, C, ...], open [T, C] and constants [5, C] do not agree: "
            f"{tuple(x.shape)}, {tuple(open.shape)}, {tuple(constants.shape)}"
        )
    if state is not None and state.shape != (2, *x.shape[1:]):
        raise ValueError(f"state must be [2, N, C, ...] of a step {tuple(x.shape[1:])}, got {tuple(state.shape)}")
    if _dispatch.choose("gated_scan", x, (torch.float32,)) == "reference" or surrogate.formula is None:
        return gated_scan_reference(x, open, constants, surrogate, strict, state)
    return _glif(x, open.float(), constants.float(), state, strict, *surrogate.formula)


def gated_scan_reference(
    x: Tensor, open: Tensor, constants: Tensor, surrogate: Surrogate, strict: bool, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_scan` in plain PyTorch: the definition, differentiated by autograd."""
    space = (1,) * (x.dim() - 3)
    decay, drop, leak, gate, threshold = constants.view(*constants.shape, *space)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, s = x.new_zeros((2, *x.shape[1:]), dtype=dtype) if state is None else state
    spikes: list[Tensor] = []
    for x_t, open_t in zip(x.to(dtype), open.view(*open.shape, *space), strict=True):
        u = decay * (u * (1 - gate * s)) - drop * s - leak + open_t * x_t
        s = surrogate(u - threshold, strict)
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype), torch.stack([u, s])


def _fields(
    x: Tensor, layout: dict[str, int], open: Tensor, constants: Tensor, state: Tensor | None, strict: bool
) -> dict[str, Any]:
    fields: dict[str, Any] = steps_by_channels(x, layout)
    del fields["dtype"]
    return {
        **fields,
        "open": open.data_ptr(),
        "constants": constants.data_ptr(),
        "strict": strict,
        "state": pointer(state),
    }


def _states(x: Tensor) -> Tensor:
    """An empty {U, S} in the order of x's steps."""
    return rows_like(2, like(x, torch.float32)[0], torch.float32)


def _forward(
    x: Tensor, open: Tensor, constants: Tensor, state: Tensor | None, strict: bool, kind: int, p: float, q: float
) -> tuple[Tensor, Tensor]:
    (x, layout), open, constants = by_channels(x), open.contiguous(), constants.contiguous()
    spikes, last = fresh(x, torch.float32), _states(x)
    state = None if state is None else ordered(state, last)
    _dispatch.native.gated_forward(
        **_fields(x, layout, open, constants, state, strict), spikes=spikes.data_ptr(), state_out=last.data_ptr()
    )
    return spikes, last


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    x, _layout = by_channels(x)
    return like(x, torch.float32), _states(x)


def _backward(
    grad_spikes: Tensor,
    grad_last: Tensor,
    x: Tensor,
    open: Tensor,
    constants: Tensor,
    state: Tensor | None,
    strict: bool,
    kind: int,
    p: float,
    q: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (x, layout), open, constants = by_channels(x), open.contiguous(), constants.contiguous()
    grad_x, states = fresh(x, torch.float32), _states(x)
    grad_spikes, grad_last = ordered(grad_spikes, grad_x), ordered(grad_last, states)
    state = None if state is None else ordered(state, states)
    grad_state = torch.empty_like(states) if state is not None else x.new_empty(0)
    grad_open = torch.empty_like(open, dtype=torch.float64)
    grad_constants = torch.empty_like(constants, dtype=torch.float64)
    _dispatch.native.gated_backward(
        **_fields(x, layout, open, constants, state, strict),
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=grad_last.data_ptr(),
        surrogate=kind,
        p=p,
        q=q,
        grad_x=grad_x.data_ptr(),
        grad_state=0 if state is None else grad_state.data_ptr(),
        grad_open=grad_open.data_ptr(),
        grad_constants=grad_constants.data_ptr(),
    )
    return grad_x, grad_open.float(), grad_constants.float(), grad_state


def _fake_backward(
    grad_spikes: Any, grad_last: Any, x: Tensor, open: Tensor, constants: Tensor, state: Any, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _layout = by_channels(x)
    grad_state = _states(x) if state is not None else x.new_empty(0)
    return like(x, torch.float32), open.new_empty(open.shape), constants.new_empty(constants.shape), grad_state


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _differentiate(ctx: Any, grad_spikes: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    x, open, constants, state = ctx.saved_tensors
    found = _glif_backward(grad_spikes, grad_last, x, open, constants, state, *ctx.rest)
    return *found[:3], found[3] if state is not None else None, *(None,) * 4


_glif = NativeOp("gated_scan", _forward, _fake, _save, _differentiate)
_glif_backward = NativeOp("gated_scan_backward", _backward, _fake_backward)
