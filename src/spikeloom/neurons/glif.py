"""GLIF: gated leaky integrate-and-fire, constants learned for every channel (Yao et al. 2022).

Equations: `ops.glif`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spikeloom.checks import count, flag
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops.glif import gated_scan
from spikeloom.surrogates import Rectangular, Surrogate, as_surrogate

# sigmoid^-1 of where each constant starts (released code).
_STARTS = {"alpha": 0.55, "beta": 0.65, "gamma": 0.55, "tau": 0.25, "v_threshold": 0.5, "leak": 0.0625, "v_drop": 0.5}


class GLIF(Neuron):
    """Gated LIF, channel-wise: gates a, b, g choose between two forms of leak, input and reset.

        U[t] = (1 - a (1 - tau)) U[t-1] (1 - g S[t-1]) - (1 - a) leak + X[t] (1 - b (1 - cond[t])) - (1 - g) drop S[t-1]
        S[t] = 1 where U[t] > V_th

    Args:
        channels: C, the axis after the batch.
        T: steps, at most; the input gate has one value a step.
        surrogate: its derivative replaces that of the step.
        hard_gates: gates are 0 or 1 with a straight-through gradient, as in the PSN experiments; else sigmoids.
        strict: fire on `>`, as the released code.

    Parameters: raw values behind sigmoids, `alpha`, `beta`, `gamma`, `tau`, `v_threshold`, `leak`, `v_drop` [C] and
    `conduct` [T, C]: 7 C + T C in all.
    Shapes: input [T, N, C, ...] -> spikes [T, N, C, ...]; state ({U, S} [2, N, C, ...], the number of steps).
    """

    alpha: nn.Parameter
    beta: nn.Parameter
    gamma: nn.Parameter
    tau: nn.Parameter
    v_threshold: nn.Parameter
    leak: nn.Parameter
    v_drop: nn.Parameter

    def __init__(
        self,
        channels: int,
        T: int,
        surrogate: Surrogate | str = Rectangular(),  # noqa: B008
        hard_gates: bool = True,
        strict: bool = True,
    ):
        super().__init__()
        self.channels, self.T = count("channels", channels), count("T", T)
        self.surrogate = as_surrogate(surrogate)
        self.hard_gates, self.strict = flag("hard_gates", hard_gates), flag("strict", strict)
        for name, start in _STARTS.items():
            setattr(self, name, nn.Parameter(torch.full((channels,), math.log(start / (1 - start)))))
        self.conduct = nn.Parameter(torch.zeros(T, channels))

    def _gate(self, raw: Tensor) -> Tensor:
        soft = torch.sigmoid(raw)
        if not self.hard_gates:
            return soft
        return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()

    def _gates(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The input's gate [T, C] from step `first` on, and decay, drop, leak, gate and threshold [5, C]."""
        if x.dim() < 3 or x.shape[2] != self.channels:
            raise ValueError(f"this GLIF is made for [T, N, {self.channels}, ...], got {tuple(x.shape)}")
        if first + x.shape[0] > self.T:
            raise ValueError(f"this GLIF is made for T = {self.T} steps, got {first + x.shape[0]}")
        a, b, g = (self._gate(raw) for raw in (self.alpha, self.beta, self.gamma))
        tau, threshold, leak, drop = (
            torch.sigmoid(raw) for raw in (self.tau, self.v_threshold, self.leak, self.v_drop)
        )
        open = 1 - b * (1 - torch.sigmoid(self.conduct[first : first + x.shape[0]]))
        return open, torch.stack([1 - a * (1 - tau), (1 - g) * drop, (1 - a) * leak, g, threshold])

    def run(self, x: Tensor, state: tuple[Tensor, int] | None, keep: bool) -> tuple[Tensor, tuple[Tensor, int] | None]:
        before, first = (None, 0) if state is None else state
        check_state(self, before, x, (2,))
        open, constants = self._gates(x, first)
        spikes, last = gated_scan(x, open, constants, self.surrogate, self.strict, before)
        return spikes, (last, first + x.shape[0]) if keep else None

    def extra_repr(self) -> str:
        return describe(channels=self.channels, T=self.T, hard_gates=self.hard_gates)
