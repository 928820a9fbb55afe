"""LIF with recurrent weights: the one neuron whose step needs the spikes of all others at the step before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spikeloom.ops import _dispatch
from spikeloom.ops._custom_op import eager, first_order
from spikeloom.surrogates import Surrogate

State = tuple[Tensor, Tensor, Tensor]
"""Synaptic current, membrane after the reset, and what is fed back, each [N, features]."""


def recurrent_scan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    v_threshold: float,
    surrogate: Surrogate,
    relu: bool,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Runs `neurons.RecurrentLIF`'s equations.

    Args:
        x: currents [T, N, features].
        weight, bias: W_r [features, features] and b_r [features].
        alpha, beta: decay factors of synapse and membrane.
        v_threshold: neurons above it fire, and are reset to 0; the reset has no gradient.
        surrogate: its derivative replaces that of the step.
        relu: feed back `relu(M)` after the reset instead of the spikes.
        state: before the first step; None for rest.

    Returns:
        Spikes [T, N, features], and the last state.
    """
    if _dispatch.choose("recurrent_scan", x, (torch.float32,)) == "reference" or not eager(x):
        return recurrent_scan_reference(x, weight, bias, alpha, beta, v_threshold, surrogate, relu, state)
    start = (x.new_zeros(x.shape[1:]),) * 3 if state is None else state
    spikes, *last = _Recurrent.apply(x, weight, bias, *start, (float(alpha), float(beta), v_threshold, surrogate, relu))
    return spikes, (last[0], last[1], last[2])


def recurrent_scan_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    v_threshold: float,
    surrogate: Surrogate,
    relu: bool,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """`recurrent_scan` in plain PyTorch: the definition, differentiated by autograd."""
    # From rest nothing comes back at the first step, but the bias does.
    synapse, membrane, fed = (x.new_zeros(x.shape[1:]),) * 3 if state is None else state
    spikes: list[Tensor] = []
    for x_t in x:
        synapse = alpha * synapse + x_t + fed @ weight.T + bias
        m = beta * membrane + (1 - beta) * synapse
        s = surrogate(m - v_threshold, strict=True)
        spikes.append(s)
        membrane = m * (1 - s.detach())
        fed = torch.relu(membrane) if relu else s
    return torch.stack(spikes), (synapse, membrane, fed)


def recurrent_potentials(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alpha: float | Tensor,
    beta: float | Tensor,
    v_threshold: float,
    relu: bool,
    state: State | None = None,
) -> Tensor:
    """The membranes M [T, N, features] at which `recurrent_scan` decides to fire, without gradients."""
    zero = x.new_zeros(x.shape[1:])
    start = (zero, zero, zero) if state is None else state
    ms = torch.empty_like(x)
    with torch.no_grad():
        _run(x, weight, bias, start, (float(alpha), float(beta), v_threshold, None, relu), ms)
    return ms


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, state: State, settings: tuple[Any, ...], ms: Tensor
) -> tuple[Tensor, State]:
    """The loop without gradients; writes the membranes before the reset into ms."""
    alpha, beta, v_threshold, _, relu = settings
    synapse, membrane, fed = state
    spikes = torch.empty_like(x)
    transposed = weight.T
    for t in range(x.shape[0]):
        synapse = torch.addmm(x[t] + bias, fed, transposed).add_(synapse, alpha=alpha)
        m = torch.mul(membrane, beta, out=ms[t]).add_(synapse, alpha=1 - beta)
        s = m > v_threshold
        spikes[t] = s
        membrane = m.masked_fill(s, 0)
        fed = membrane.relu() if relu else spikes[t]
    return spikes, (synapse, membrane, fed.clone())


class _Recurrent(torch.autograd.Function):
    """The loop with its backward written out. The input alone is kept: the membranes are computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, synapse: Tensor, membrane: Tensor, fed: Tensor, settings: Any
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, bias, synapse, membrane, fed)
        ctx.settings = settings
        spikes, last = _run(x, weight, bias, (synapse, membrane, fed), settings, torch.empty_like(x))
        return spikes, *last

    @staticmethod
    @first_order("recurrent_scan")
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_spikes, grad_synapse, grad_membrane, grad_fed = grads
        x, weight, bias, *state = ctx.saved_tensors
        alpha, beta, v_threshold, surrogate, relu = ctx.settings
        ms, grad_x = torch.empty_like(x), torch.empty_like(x)
        _run(x, weight, bias, (state[0], state[1], state[2]), ctx.settings, ms)
        for t in reversed(range(ms.shape[0])):
            m = ms[t]
            keep = m <= v_threshold
            grad_s = grad_spikes[t] if relu else grad_spikes[t] + grad_fed
            after = grad_membrane + grad_fed * (m > 0) if relu else grad_membrane
            grad_m = grad_s * surrogate.checked_derivative(m - v_threshold) + after * keep
            grad_synapse = torch.add(grad_synapse, grad_m, alpha=1 - beta, out=grad_x[t])
            grad_membrane = beta * grad_m
            grad_fed = grad_synapse @ weight
            grad_synapse = alpha * grad_synapse
        after_reset = ms * (ms <= v_threshold)
        fed = after_reset.relu() if relu else (ms > v_threshold).to(ms.dtype)
        fed = torch.cat([state[2].unsqueeze(0), fed[:-1]])
        grad_weight = grad_x.flatten(0, 1).T @ fed.flatten(0, 1)
        return grad_x, grad_weight, grad_x.sum((0, 1)), grad_synapse, grad_membrane, grad_fed, None
