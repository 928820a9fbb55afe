"""GLIF: a leaky neuron with gates and constants of its own for every channel (Yao et al. 2022, GLIF).

    U[t] = decay U[t-1] (1 - gate S[t-1]) - drop S[t-1] - leak + X[t]
    S[t] = Theta(U[t] - threshold)

The input is already weighed by its own gates (`neurons.GLIF`); decay, drop, leak, gate and threshold are tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import dispatch
from spikeloom.ops.layout import dense, fresh, like, ordered, pointer, rows_like, steps_of
from spikeloom.ops.native_op import NativeOp
from spikeloom.surrogates import Surrogate


def gated_scan(
    x: Tensor,
    constants: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    surrogate: Surrogate,
    strict: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence at the top of this file.

    Args:
        x: gated currents [T, N, ...].
        constants: decay, drop, leak, gate, threshold; each broadcasts to a step [N, ...].
        surrogate: its derivative replaces that of Theta.
        strict: fire on `>` instead of `>=`.
        state: {U, S} of the step before the first, [2, N, ...]; None for zero.

    Returns:
        Spikes [T, N, ...] of x's dtype, and the last state [2, N, ...].
    """
    if state is not None and state.shape != (2, *x.shape[1:]):
        raise ValueError(f"state must be [2, N, ...] of a step {tuple(x.shape[1:])}, got {tuple(state.shape)}")
    if dispatch.choose("gated_scan", x, (torch.float32,)) == "reference" or surrogate.formula is None:
        return gated_scan_reference(x, constants, surrogate, strict, state)
    expanded = [c.to(torch.float32).expand(x.shape[1:]) for c in constants]
    return _gated(x, *expanded, state, strict, *surrogate.formula)


def gated_scan_reference(
    x: Tensor, constants: tuple[Tensor, ...], surrogate: Surrogate, strict: bool, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_scan` in plain PyTorch: the definition, differentiated by autograd."""
    decay, drop, leak, gate, threshold = constants
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, s = x.new_zeros((2, *x.shape[1:]), dtype=dtype) if state is None else state
    spikes: list[Tensor] = []
    for x_t in x.to(dtype):
        u = decay * (u * (1 - gate * s)) - drop * s - leak + x_t
        s = surrogate(u - threshold, strict)
        spikes.append(s)
    return torch.stack(spikes).to(x.dtype), torch.stack([u, s])


class _Arguments:
    def __init__(self, x: Tensor, constants: tuple[Tensor, ...], state: Tensor | None, strict: bool):
        self.x = dense(x)
        self.step = like(self.x, torch.float32)[0]
        names = ("decay", "drop", "leak", "gate", "threshold")
        self.constants = {name: ordered(c, self.step) for name, c in zip(names, constants, strict=True)}
        self.state = None if state is None else ordered(state, rows_like(2, self.step, torch.float32))
        fields = steps_of(self.x)
        if fields["x_stride"] != fields["size"]:
            self.x = ordered(self.x, like(self.x, torch.float32))
            fields = steps_of(self.x)
        del fields["dtype"], fields["x_stride"]
        self.fields: dict[str, Any] = {
            **fields, **{name: c.data_ptr() for name, c in self.constants.items()},
            "strict": strict, "state": pointer(self.state),
        }  # fmt: skip


def _forward(
    x: Tensor,
    decay: Tensor,
    drop: Tensor,
    leak: Tensor,
    gate: Tensor,
    threshold: Tensor,
    state: Tensor | None,
    strict: bool,
    kind: int,
    p: float,
    q: float,
) -> tuple[Tensor, Tensor]:
    a = _Arguments(x, (decay, drop, leak, gate, threshold), state, strict)
    spikes, last = fresh(a.x, torch.float32), rows_like(2, a.step, torch.float32)
    dispatch.native.gated_forward(**a.fields, spikes=spikes.data_ptr(), state_out=last.data_ptr())
    return spikes, last


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    spikes = like(dense(x), torch.float32)
    return spikes, rows_like(2, spikes[0], torch.float32)


def _backward(
    grad_spikes: Tensor,
    grad_last: Tensor,
    x: Tensor,
    decay: Tensor,
    drop: Tensor,
    leak: Tensor,
    gate: Tensor,
    threshold: Tensor,
    state: Tensor | None,
    strict: bool,
    kind: int,
    p: float,
    q: float,
) -> tuple[Tensor, Tensor, Tensor]:
    a = _Arguments(x, (decay, drop, leak, gate, threshold), state, strict)
    grad_x = fresh(a.x, torch.float32)
    grad_spikes = ordered(grad_spikes, grad_x)
    grad_last = ordered(grad_last, rows_like(2, a.step, torch.float32))
    grad_state = rows_like(2, a.step, torch.float32) if state is not None else x.new_empty(0)
    constants = rows_like(5, a.step, torch.float32)
    dispatch.native.gated_backward(
        **a.fields, grad_spikes=grad_spikes.data_ptr(), grad_state_out=grad_last.data_ptr(), slope=0, surrogate=kind,
        p=p, q=q, grad_x=grad_x.data_ptr(), grad_state=0 if state is None else grad_state.data_ptr(),
        grad_constants=constants.data_ptr(),
    )  # fmt: skip
    return grad_x, grad_state, constants


def _fake_backward(grad_spikes: Any, grad_last: Any, x: Tensor, decay: Any, drop: Any, leak: Any, gate: Any,
                   threshold: Any, state: Any, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = like(dense(x), torch.float32)
    grad_state = rows_like(2, grad_x[0], torch.float32) if state is not None else x.new_empty(0)
    return grad_x, grad_state, rows_like(5, grad_x[0], torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _differentiate(ctx: Any, grad_spikes: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    *tensors, state = ctx.saved_tensors
    grad_x, grad_state, constants = _gated_backward(grad_spikes, grad_last, *tensors, state, *ctx.rest)
    return grad_x, *constants, grad_state if state is not None else None, *(None,) * 4


_gated = NativeOp("gated_scan", _forward, _fake, _save, _differentiate)
_gated_backward = NativeOp("gated_scan_backward", _backward, _fake_backward)
