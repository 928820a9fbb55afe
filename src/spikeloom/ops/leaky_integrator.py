"""Leaky integration without reset: linear recurrences over time (Yarga and Wood 2024, ParaLIF, Eqs. 8-14).

    I[t] = alpha I[t-1] + X[t]
    M[t] = beta M[t-1] + (1 - beta) I[t]

The paper computes them as convolutions with exponentials, through an FFT; `leaky_filter_fft` keeps that form. A scan
in both directions costs O(T) and is what runs on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import native_op
from spikeloom.ops._layout import NATIVE_DTYPES, like, ordered, pointer, rows_like, states_like, steps_of

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
    """`leaky_filter` in plain PyTorch: the definition, differentiated by autograd.

    Shapes: as `leaky_filter`.
    """
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


class _Inputs(NamedTuple):
    x: Tensor
    alpha: Tensor
    beta: Tensor
    state: Tensor | None
    return_state: bool


class _BackwardInputs(NamedTuple):
    grad_m: Tensor
    grad_last: Tensor | None
    x: Tensor
    alpha: Tensor
    beta: Tensor
    state: Tensor | None
    learn: bool


class _Filtered(NamedTuple):
    m: Tensor
    last: Tensor | None


class _Gradients(NamedTuple):
    x: Tensor
    state: Tensor | None
    alpha: Tensor
    beta: Tensor


def integrator_fields(
    x: Tensor, alpha: Tensor, beta: Tensor, state: Tensor | None, template: Tensor
) -> tuple[dict[str, Any], Any]:
    """The kernels' arguments of both filters, for steps as in a template, and the tensors to which they point."""
    x = ordered(x, template, repeated=True)
    if alpha.dim() or state is not None:
        states = states_like(template)
        alpha, beta = (c if c.dim() == 0 else ordered(c, states[0]) for c in (alpha, beta))
        state = None if state is None else ordered(state, states)
    fields = {
        **steps_of(x),
        "alpha": alpha.data_ptr(),
        "beta": beta.data_ptr(),
        "constant_stride": 0 if alpha.dim() == 0 else 1,
        "state": pointer(state),
    }
    return fields, (x, alpha, beta, state)


def constant_gradients(alpha: Tensor, template: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
    """Gradients of alpha and beta to fill: scalars, or of a step's elements in the order of a template's steps."""
    if not learn or alpha.dim() == 0:
        return template.new_zeros((), dtype=torch.float32), template.new_zeros((), dtype=torch.float32)
    alphas, betas = (rows_like(1, template[0], torch.float32)[0] for _ in range(2))
    return alphas, betas


def fill_constant_gradients(constants: Tensor | None, alpha: Tensor, beta: Tensor) -> None:
    """The gradients of alpha and beta from their sums over time for every element, [2, N, ...]; None leaves zero."""
    if constants is not None:
        for gradient, sums in zip((alpha, beta), constants, strict=True):
            gradient.copy_(sums if gradient.dim() else sums.sum(dtype=torch.float64))


def _allocate(i: _Inputs) -> _Filtered:
    m = like(i.x, i.x.dtype)
    return _Filtered(m, states_like(m) if i.return_state else None)


def _fill(i: _Inputs, out: _Filtered) -> None:
    fields, _kept = integrator_fields(i.x, i.alpha, i.beta, i.state, out.m)
    _dispatch.native.leaky_forward(**fields, m=out.m.data_ptr(), state_out=pointer(out.last))


def _allocate_gradients(i: _BackwardInputs) -> _Gradients:
    grad_x = like(i.x, i.x.dtype)
    grad_state = None if i.state is None else states_like(grad_x)
    return _Gradients(grad_x, grad_state, *constant_gradients(i.alpha, grad_x, i.learn))


def _fill_gradients(i: _BackwardInputs, out: _Gradients) -> None:
    fields, _kept = integrator_fields(i.x, i.alpha, i.beta, i.state, out.x)
    grad_m = ordered(i.grad_m, out.x, i.x.dtype)
    grad_last = None if i.grad_last is None else ordered(i.grad_last, states_like(out.x), torch.float32)
    constants = states_like(out.x) if i.learn else None
    _dispatch.native.leaky_backward(
        **fields,
        grad_m=grad_m.data_ptr(),
        grad_state_out=pointer(grad_last),
        grad_x=out.x.data_ptr(),
        grad_state=pointer(out.state),
        grad_alpha=0 if constants is None else constants[0].data_ptr(),
        grad_beta=0 if constants is None else constants[1].data_ptr(),
    )
    fill_constant_gradients(constants, out.alpha, out.beta)


def _save(ctx: Any, i: _Inputs, out: _Filtered) -> None:
    ctx.save_for_backward(i.x, i.alpha, i.beta, i.state)
    ctx.set_materialize_grads(False)
    if not i.return_state and out.last is not None:
        ctx.mark_non_differentiable(out.last)


def _differentiate(ctx: Any, grad_m: Tensor | None, grad_last: Tensor | None) -> tuple[Any, ...]:
    x, alpha, beta, state = ctx.saved_tensors
    _, *needed, _, _ = ctx.needs_input_grad
    grad_m = torch.zeros_like(x) if grad_m is None else grad_m
    found = _filter_backward(grad_m, grad_last, x, alpha, beta, state, any(needed))
    constants = (grad if wanted else None for grad, wanted in zip((found.alpha, found.beta), needed, strict=True))
    return found.x, *constants, None if state is None else found.state, None


_filter = native_op("leaky_filter", _Inputs, _allocate, _fill, _save, _differentiate)
_filter_backward = native_op("leaky_filter_backward", _BackwardInputs, _allocate_gradients, _fill_gradients)
