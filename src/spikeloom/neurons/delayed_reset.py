"""The LIF of snnTorch, whose spike is taken from the potential one step later (Eshraghian et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from spikeloom.checks import number
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops.scan import potentials, scan
from spikeloom.ops.scan.reference import state_dtype
from spikeloom.surrogates import ATan, Surrogate, as_surrogate


class DelayedResetLIF(Neuron):
    """LIF neurons whose soft reset comes a step after the spike: `snntorch.Leaky` with its default "subtract".

        U[t] = beta U[t-1] + X[t] - V_th S[t-1]
        S[t] = 1 where U[t] > V_th

    An immediate soft reset by V_th / beta is the same, since `beta U - V_th S = beta (U - V_th / beta S)`; `LIF` with
    `v_reset=None` subtracts V_th at once instead, of which beta V_th is left a step later. `ops.scan` subtracts the
    threshold itself, so it is given H = U + r with r = V_th (1 / beta - 1): H fires above V_th / beta, loses as much,
    rests at r and receives (1 - beta) r beside X. No gradient passes the reset, as in snnTorch.

    Args:
        beta: decay factor of a step, above 0 and at most 1; `tau = 1 / (1 - beta)`.
        v_threshold: potential above which a neuron fires, in the unit of its input.
        surrogate: its derivative replaces that of the step.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, H less its reset [N, ...].
    """

    def __init__(self, beta: float = 0.9, v_threshold: float = 1.0, surrogate: Surrogate | str = ATan()):  # noqa: B008
        super().__init__()
        self.beta, self.v_threshold = number("beta", beta, above=0), number("v_threshold", v_threshold, above=0)
        if self.beta > 1:
            raise ValueError(f"beta must be at most 1, got {beta}: the potential would grow by itself")
        self.surrogate = as_surrogate(surrogate)
        self.shift = self.v_threshold * (1 / self.beta - 1)

    def _shifted(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The currents and the first potentials of H."""
        check_state(self, state, x)
        # In the precision of potentials: in bfloat16 a small current would be lost beside the shift.
        currents = x.to(state_dtype(x)) + (1 - self.beta) * self.shift
        return currents, torch.full_like(currents[0], self.shift) if state is None else state

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        currents, v = self._shifted(x, state)
        threshold = self.v_threshold + self.shift
        spikes, v = scan(currents, v, self.beta, 1.0, threshold, None, self.surrogate, True, keep, strict=True)
        return spikes.to(x.dtype), v

    def _potentials(self, x: Tensor, state: Tensor | None) -> Tensor:
        currents, v = self._shifted(x, state)
        threshold = self.v_threshold + self.shift
        return potentials(currents, v, self.beta, 1.0, threshold, None, strict=True) - self.shift

    def extra_repr(self) -> str:
        return describe(beta=self.beta, v_threshold=self.v_threshold, surrogate=self.surrogate)
