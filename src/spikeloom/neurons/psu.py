"""Parallel spiking units (PSU, IPSU, RPSU) and SPSN: LIF with soft reset, its spikes estimated instead of awaited.

With A the leaky integration and B the effect of past spikes,

    A[t, i] = (1/tau) (1 - 1/tau)^(t-i),  i <= t        B[t, i] = V_th (1 - 1/tau)^(t-i),  i < t
    LIF     V = A I - B S                                exactly, with S the true spikes
    PSU     V = A I - B sigmoid(A I)
    IPSU    V = J - B sigmoid(J),   J = A_I I + b        A_I learned, causal
    RPSU    V = A I - B sigmoid(A_R I + b)               A_R learned, causal
    SPSN    S ~ Bernoulli(sigmoid(A I))

The fixed products are linear recurrences (`ops.filter`), O(T). The released code has powers of 1/tau in A and B, the
same at tau = 2, the one value that is used; here they are those of the derivation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.neurons.if_lif import leak
from spikeloom.neurons.psn import check_length
from spikeloom.ops.band import over_time
from spikeloom.ops.filter import leaky_filter
from spikeloom.ops.firing import bernoulli
from spikeloom.ops.scan import fire
from spikeloom.surrogates import ATan, Surrogate


class PSU(Neuron):
    """Parallel spiking unit: `V = A I - B sigmoid(A I)`, `S = Theta(V - V_th)`. No parameters.

    Args:
        tau: membrane time constant in steps, greater than 1.
        v_threshold: potential at which a neuron fires, and what B subtracts.
        surrogate: its derivative replaces that of Theta.
        strict: fire on `>` instead of `>=`, as the released code.

    It is causal and steps under a Stream; state {A I, A sigmoid(A I)} [2, N, ...].
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        strict: bool = False,
    ):
        super().__init__()
        self.decay = leak(tau, "it is the decay of the leaky integration")
        self.tau, self.v_threshold, self.surrogate, self.strict = tau, v_threshold, surrogate, strict

    def integrate(self, x: Tensor) -> Tensor:
        """`A x`."""
        return leaky_filter(x, 0.0, self.decay)[0]

    def reset(self, estimate: Tensor, v_threshold: float) -> Tensor:
        """`B estimate` with a threshold in B: the integration of the step before, times `V_th tau (1 - 1/tau)`."""
        integrated = self.integrate(estimate)
        return _late(integrated) * (v_threshold * self.tau * self.decay)

    def membrane(self, x: Tensor) -> Tensor:
        """V [T, N, ...] for currents x."""
        u = self.integrate(x)
        return u - self.reset(torch.sigmoid(u), self.v_threshold)

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        if not keep:
            return fire(self.membrane(x), self.surrogate, self.strict, self.v_threshold), None
        v, state = self._step(x, state)
        return fire(v, self.surrogate, self.strict, self.v_threshold), state

    def _step(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        check_state(self, state, x, (2,))
        zero = torch.zeros_like(x[0], dtype=torch.float32)
        before = torch.stack([zero, zero]) if state is None else state
        u, after_u = leaky_filter(x, 0.0, self.decay, torch.stack([zero, before[0]]), True)
        r, after_r = leaky_filter(torch.sigmoid(u), 0.0, self.decay, torch.stack([zero, before[1]]), True)
        assert after_u is not None
        assert after_r is not None
        late = torch.cat([before[1:2].to(r.dtype), r[:-1]])
        v = u - late * (self.v_threshold * self.tau * self.decay)
        return v, torch.stack([after_u[1], after_r[1]])

    def potentials(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._step(x, state)[0]

    def extra_repr(self) -> str:
        return describe(tau=self.tau, v_threshold=self.v_threshold, surrogate=self.surrogate)


def _late(x: Tensor) -> Tensor:
    """Every step's value one step later, zero at first."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


class _Learned(PSU):
    """What IPSU and RPSU share: a learned causal matrix over time with a bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        T: int,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        strict: bool = False,
        bias: bool = True,
        scaled_reset: bool = True,
    ):
        super().__init__(tau, v_threshold, surrogate, strict)
        if T < 1:
            raise ValueError(f"T must be at least 1, got {T}")
        self.T = T
        self.reset_threshold = v_threshold if scaled_reset else 1.0
        self.weight = nn.Parameter(torch.randn(T, T) * math.sqrt(2 / T))
        self.bias = nn.Parameter(torch.zeros(T)) if bias else None

    def learned(self, x: Tensor) -> Tensor:
        """`tril(weight) x + bias`."""
        check_length(self, self.T, x)
        return over_time(x, self.weight.tril(), self.bias).to(x.dtype)

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        if keep:
            raise RuntimeError(
                f"{type(self).__name__} needs the whole sequence at once and cannot run under a Stream; PSU can step"
            )
        return super().run(x, state, keep)

    def potentials(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.membrane(x)


class IPSU(_Learned):
    """Input-aware PSU: the leaky integration is learned, `V = J - B sigmoid(J)` with `J = A_I I + b`.

    Args: as `RPSU`, and

        form: "paper"; or "released", `V = J - B I`, whose reset acts on the raw input.
    """

    def __init__(
        self,
        T: int,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        strict: bool = False,
        bias: bool = True,
        scaled_reset: bool = True,
        form: Literal["paper", "released"] = "paper",
    ):
        super().__init__(T, tau, v_threshold, surrogate, strict, bias, scaled_reset)
        if form not in ("paper", "released"):
            raise ValueError(f"form must be 'paper' or 'released', got {form!r}")
        self.form = form

    def membrane(self, x: Tensor) -> Tensor:
        j = self.learned(x)
        return j - self.reset(torch.sigmoid(j) if self.form == "paper" else x, self.reset_threshold)


class RPSU(_Learned):
    """Reset-aware PSU: the estimate of the spikes is learned, `V = A I - B sigmoid(A_R I + b)`.

    Args:
        T: steps, fixed.
        tau, v_threshold, surrogate, strict: as `PSU`.
        bias: one learned value a step, added to the product.
        scaled_reset: B carries `v_threshold`, as the derivation has it; without it, as in the released code.

    Parameters: `weight` [T, T], normal with std sqrt(2 / T), masked to its lower triangle; `bias` [T], 0.
    Under a Stream it raises: its matrix is made for whole sequences.
    """

    def membrane(self, x: Tensor) -> Tensor:
        return self.integrate(x) - self.reset(torch.sigmoid(self.learned(x)), self.reset_threshold)


class SPSN(Neuron):
    """Stochastic parallel spiking neuron: spikes drawn with probability `sigmoid(A I)`. No parameters.

    The released code gives the draw no gradient, so no layer below it learns. Here the probability stands in for the
    draw's derivative, the rule of ParaLIF's SB (a choice of ours).

    Args:
        tau: membrane time constant in steps, greater than 1.

    It steps under a Stream; state [2, N, ...].
    """

    def __init__(self, tau: float = 2.0):
        super().__init__()
        self.decay = leak(tau, "it is the decay of the leaky integration")
        self.tau = tau

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        check_state(self, state, x, (2,))
        u, state = leaky_filter(x, 0.0, self.decay, state, keep)
        return bernoulli(torch.sigmoid(u)), state

    def potentials(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return leaky_filter(x, 0.0, self.decay, state)[0]

    def extra_repr(self) -> str:
        return describe(tau=self.tau)
