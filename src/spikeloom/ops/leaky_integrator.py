"""Leaky integration without reset: linear recurrences over time (Yarga and Wood 2024, ParaLIF, Eqs. 8-14).

    I[t] = alpha I[t-1] + X[t]
    M[t] = beta M[t-1] + (1 - beta) I[t]

The paper computes them as convolutions with exponentials, through an FFT; `leaky_filter_fft` keeps that form. A scan
in both directions costs O(T) and is what runs on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import NativeOp
from spikeloom.ops._layout import NATIVE_DTYPES, dense, fresh, like, ordered, pointer, rows_like, steps_of

Constant = float | Tensor


def leaky_filter(
    x: Tensor, alpha: Constant, beta: Constant, state: Tensor | None = None, return_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The membrane M of two leaky filters in a row.

    Args:
        x: currents [T, N, ...].
        alpha, beta: decay factors per step, in [0, 1]; scalars, or tensors that broadcast to a step [N, ...] (one
            value a feature, for instance); may need gradients. alpha = 0 leaves the synaptic filter out.
        state: {I, M} before the first step, [2, N, ...]; None for zero.
        return_state: whether the caller wants the last state.

    Returns:
        M [T, N, ...] of x's dtype, and the state [2, N, ...] after the last step, or None.
    """
    if state is not None and state.shape != (2, *x.shape[1:]):
        raise ValueError(f"state must be [2, N, ...] of a step {tuple(x.shape[1:])}, got {tuple(state.shape)}")
    chosen = _dispatch.choose("leaky_filter", x, NATIVE_DTYPES)
    if chosen == "reference":
        if x.device.type == "cpu" or state is not None or return_state:
            return leaky_filter_reference(x, alpha, beta, state)
        return leaky_filter_fft(x, alpha, beta), None
    m, last = _filter(x, *as_constants(alpha, beta, x), None if state is None else state.float(), return_state)
    return m, last if return_state else None


def as_constants(alpha: Constant, beta: Constant, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32, scalars or both of the shape of a step."""
    a, b = (torch.as_tensor(c, dtype=torch.float32, device=x.device) for c in (alpha, beta))
    if a.dim() == 0 and b.dim() == 0:
        return a, b
    return a.expand(x.shape[1:]), b.expand(x.shape[1:])


def leaky_filter_reference(
    x: Tensor, alpha: Constant, beta: Constant, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`leaky_filter` in plain PyTorch: the definition, differentiated by autograd."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    synapse, membrane = x.new_zeros((2, *x.shape[1:]), dtype=dtype) if state is None else state.to(dtype)
    alpha, beta = (c.to(x.device, dtype) if isinstance(c, Tensor) else c for c in (alpha, beta))
    trace: list[Tensor] = []
    for x_t in x.to(dtype):
        synapse = alpha * synapse + x_t
        membrane = beta * membrane + (1 - beta) * synapse
        trace.append(membrane)
    return torch.stack(trace).to(x.dtype), torch.stack([synapse, membrane])


def leaky_filter_fft(x: Tensor, alpha: Constant, beta: Constant, padding: int | None = None) -> Tensor:
    """`leaky_filter` from rest as the paper computes it: one product in the frequency domain.

    Args:
        x: currents [T, N, ...].
        alpha, beta: as `leaky_filter`.
        padding: length of the transforms. Two kernels and an input of length T convolve to 3 T - 2, the default.
            The released code takes 2 T, which wraps the kernels' tail into the first outputs.
    """
    steps = x.shape[0]
    length = 3 * steps - 2 if padding is None else padding
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = torch.arange(steps, dtype=dtype, device=x.device).view(-1, *(1,) * (x.dim() - 1))
    a, b = (torch.as_tensor(c, dtype=dtype, device=x.device) for c in (alpha, beta))
    kernels = torch.fft.rfft(a**t, length, 0) * torch.fft.rfft((1 - b) * b**t, length, 0)
    m = torch.fft.irfft(torch.fft.rfft(x.to(dtype), length, 0) * kernels, length, 0)[:steps]
    return m.to(x.dtype)


def combined_kernel(alpha: float, beta: float, steps: int) -> Tensor:
    """Both filters' kernel in closed form, float64 [T]: `(1 - beta) (alpha^(t+1) - beta^(t+1)) / (alpha - beta)`."""
    t = torch.arange(steps, dtype=torch.float64)
    if alpha == beta:
        return (1 - beta) * (t + 1) * beta**t
    return (1 - beta) * (alpha ** (t + 1) - beta ** (t + 1)) / (alpha - beta)


# --- the native path --------------------------------------------------------------------------------------------------


def integrator_fields(x: Tensor, alpha: Tensor, beta: Tensor, state: Tensor | None) -> dict[str, Any]:
    return {
        **steps_of(x),
        "alpha": alpha.data_ptr(),
        "beta": beta.data_ptr(),
        "constant_stride": 0 if alpha.dim() == 0 else 1,
        "state": pointer(state),
    }


def aligned(
    x: Tensor, alpha: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x dense, a template of one step, and the others in its order."""
    x = dense(x)
    step = like(x, torch.float32)[0]
    alpha, beta = (c if c.dim() == 0 else ordered(c, step) for c in (alpha, beta))
    return x, step, alpha, beta, None if state is None else ordered(state, rows_like(2, step, torch.float32))


def _forward(x: Tensor, alpha: Tensor, beta: Tensor, state: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor]:
    x, step, alpha, beta, state = aligned(x, alpha, beta, state)
    m = fresh(x, x.dtype)
    last = last_state(step, return_state)
    _dispatch.native.filter_forward(
        **integrator_fields(x, alpha, beta, state), m=m.data_ptr(), state_out=last.data_ptr() if return_state else 0
    )
    return m, last


def last_state(step: Tensor, wanted: bool) -> Tensor:
    return rows_like(2, step, torch.float32) if wanted else step.new_empty(0)


def _fake(x: Tensor, alpha: Any, beta: Any, state: Any, return_state: bool) -> tuple[Tensor, Tensor]:
    m = like(dense(x), x.dtype)
    return m, last_state(like(dense(x), torch.float32)[0], return_state)


def _backward(
    grad_m: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: Tensor | None,
    learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, step, alpha, beta, state = aligned(x, alpha, beta, state)
    grad_x = fresh(x, x.dtype)
    grad_m = ordered(grad_m, grad_x, x.dtype)
    grad_last = None if grad_last is None else ordered(grad_last, rows_like(2, step, torch.float32), torch.float32)
    grad_state = last_state(step, state is not None)
    constants = rows_like(2, step, torch.float32) if learn else step.new_zeros(2)
    _dispatch.native.filter_backward(
        **integrator_fields(x, alpha, beta, state),
        grad_m=grad_m.data_ptr(),
        grad_state_out=pointer(grad_last),
        grad_x=grad_x.data_ptr(),
        grad_state=0 if state is None else grad_state.data_ptr(),
        grad_alpha=constants[0].data_ptr() if learn else 0,
        grad_beta=constants[1].data_ptr() if learn else 0,
    )
    return grad_x, grad_state, *constant_gradients(constants, learn and alpha.dim() == 0)


def constant_gradients(constants: Tensor, scalars: bool) -> tuple[Tensor, Tensor]:
    """The gradients of alpha and beta from their sums over time for every element."""
    if scalars:
        constants = constants.flatten(1).sum(1, dtype=torch.float64).float()
    return constants[0].clone(), constants[1].clone()


def _fake_backward(grad_m: Any, grad_last: Any, x: Tensor, alpha: Tensor, beta: Tensor, state: Any, learn: bool) -> Any:
    grad_x = like(dense(x), x.dtype)
    step = like(dense(x), torch.float32)[0]
    constant = torch.empty_like(step) if learn and alpha.dim() else step.new_empty(())
    return grad_x, last_state(step, state is not None), constant, constant.clone()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, alpha, beta, state, ctx.return_state = inputs
    ctx.save_for_backward(x, alpha, beta, state)
    ctx.set_materialize_grads(False)
    if not ctx.return_state:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_m: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, alpha, beta, state = ctx.saved_tensors
    learn = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_m = torch.zeros_like(x) if grad_m is None else grad_m
    grad_x, grad_state, grad_alpha, grad_beta = _filter_backward(grad_m, grad_last, x, alpha, beta, state, learn)
    return (
        grad_x,
        grad_alpha if ctx.needs_input_grad[1] else None,
        grad_beta if ctx.needs_input_grad[2] else None,
        grad_state if state is not None else None,
        None,
    )


_filter = NativeOp("leaky_filter", _forward, _fake, _save, _differentiate)
_filter_backward = NativeOp("leaky_filter_backward", _backward, _fake_backward)
