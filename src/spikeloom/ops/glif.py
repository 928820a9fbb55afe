"""GLIF: a leaky neuron with gates and constants of its own for every channel (Yao et al. 2022, GLIF).

    U[t] = decay U[t-1] (1 - gate S[t-1]) - drop S[t-1] - leak + open[t] X[t]
    S[t] = Theta(U[t] - threshold)

decay, drop, leak, gate and threshold are constants [C] of the channels, open the input's gate [T, C].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import like_by_channels, ordered, pointer, states_like, steps_by_channels, sums_like
from spikeloom.ops.scan.params import surrogate_number
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
    return tuple(_glif(x, open.float(), constants.float(), state, strict, *surrogate.formula))


def gated_scan_reference(
    x: Tensor, open: Tensor, constants: Tensor, surrogate: Surrogate, strict: bool, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_scan` in plain PyTorch: the definition, differentiated by autograd.

    Shapes: as `gated_scan`.
    """
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


class _Inputs(NamedTuple):
    x: Tensor
    open: Tensor
    constants: Tensor
    state: Tensor | None
    strict: bool
    kind: str
    p: float
    q: float


class _BackwardInputs(NamedTuple):
    grad_spikes: Tensor
    grad_last: Tensor
    x: Tensor
    open: Tensor
    constants: Tensor
    state: Tensor | None
    strict: bool
    kind: str
    p: float
    q: float


class _Spiked(NamedTuple):
    spikes: Tensor
    last: Tensor


class _Gradients(NamedTuple):
    """Of x and the state, and in float64 of the others."""

    x: Tensor
    open: Tensor
    constants: Tensor
    state: Tensor | None


def _fields(i: _Inputs | _BackwardInputs, template: Tensor) -> tuple[dict[str, Any], Any]:
    """The kernels' arguments, and the tensors to which they point."""
    x, open, constants = ordered(i.x, template, repeated=True), i.open.contiguous(), i.constants.contiguous()
    state = None if i.state is None else ordered(i.state, states_like(template))
    fields = {
        **steps_by_channels(x, template),
        "open": open.data_ptr(),
        "constants": constants.data_ptr(),
        "strict": i.strict,
        "state": pointer(state),
    }
    del fields["dtype"]
    return fields, (x, open, constants, state)


def _allocate(i: _Inputs) -> _Spiked:
    spikes = like_by_channels(i.x, torch.float32)
    return _Spiked(spikes, states_like(spikes))


def _fill(i: _Inputs, out: _Spiked) -> None:
    fields, _kept = _fields(i, out.spikes)
    _dispatch.native.glif_forward(**fields, spikes=out.spikes.data_ptr(), state_out=out.last.data_ptr())


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    grad_x = like_by_channels(i.x, torch.float32)
    grad_state = None if i.state is None else states_like(grad_x)
    return _Gradients(grad_x, sums_like(i.open), sums_like(i.constants), grad_state)


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    fields, _kept = _fields(i, out.x)
    grad_spikes, grad_last = ordered(i.grad_spikes, out.x), ordered(i.grad_last, states_like(out.x))
    _dispatch.native.glif_backward(
        **fields,
        grad_spikes=grad_spikes.data_ptr(),
        grad_state_out=grad_last.data_ptr(),
        surrogate=surrogate_number(i.kind),
        p=i.p,
        q=i.q,
        grad_x=out.x.data_ptr(),
        grad_state=pointer(out.state),
        grad_open=out.open.data_ptr(),
        grad_constants=out.constants.data_ptr(),
    )


def _save(ctx: Any, i: _Inputs, out: _Spiked) -> None:
    ctx.save_for_backward(*i[:4])
    ctx.settings = i[4:]


def _differentiate(ctx: Any, grad_spikes: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    x, open, constants, state = ctx.saved_tensors
    found = _glif_backward(grad_spikes, grad_last, x, open, constants, state, *ctx.settings)
    return found.x, found.open, found.constants, None if state is None else found.state, *(None,) * 4


_glif = native_op("gated_scan", _Inputs, _allocate, _fill, _save, _differentiate)
_glif_backward = native_op("gated_scan_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
