"""Parallel spiking units (PSU, IPSU, RPSU) and SPSN: LIF with soft reset, its spikes estimated instead of awaited.

With A the leaky integration and B the effect of past spikes,

    A[t, i] = (1/tau) (1 - 1/tau)^(t-i),  i <= t        B[t, i] = V_th (1 - 1/tau)^(t-i),  i < t
    LIF     V = A I - B S                                exactly, with S the true spikes
    PSU     V = A I - B sigmoid(A I)
    IPSU    V = J - B sigmoid(J),   J = A_I I + b        A_I learned, causal
    RPSU    V = A I - B sigmoid(A_R I + b)               A_R learned, causal
    SPSN    S ~ Bernoulli(sigmoid(A I))

The fixed products are linear recurrences (`ops.leaky_integrator`), O(T). The released code has powers of 1/tau in A and
B, the same at tau = 2, the one value that is used; here they are those of the derivation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from spikeloom.checks import count, flag, number
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.neurons.lif import leak
from spikeloom.neurons.psn import check_length
from spikeloom.ops.leaky_integrator import leaky_filter
from spikeloom.ops.paralif import paralif
from spikeloom.ops.psn import over_time
from spikeloom.ops.psu import psu, psu_potentials
from spikeloom.surrogates import ATan, Surrogate, as_surrogate


class PSU(Neuron):
    """Parallel spiking unit (Li et al. 2024, PSU): `V = A I - B sigmoid(A I)`, `S = Theta(V - V_th)`. No parameters.

    Args:
        tau: membrane time constant in steps, greater than 1.
        v_threshold: potential at which a neuron fires, and what B subtracts.
        surrogate: its derivative replaces that of Theta.
        strict: fire on `>` instead of `>=`, as the released code.

    It is causal and steps under a Stream; state {A I, A sigmoid(A I)} [2, N, ...].

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        strict: bool = False,
    ):
        super().__init__()
        self.decay = leak(tau, "it is the decay of the leaky integration")
        self.v_threshold = number("v_threshold", v_threshold, above=0)
        self.tau, self.surrogate, self.strict = tau, as_surrogate(surrogate), flag("strict", strict)

    def currents(self, x: Tensor) -> tuple[Tensor, Tensor | None, bool, bool]:
        """X, Z, and whether to integrate X and to take Z as it is, of `ops.psu`."""
        return x, None, True, False

    def drop(self) -> float:
        """What B takes for every unit of the integrated estimate: `V_th tau (1 - 1/tau)`."""
        return self.v_threshold * self.tau * self.decay

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        check_state(self, state, x, (2,))
        u, z, integrate, raw = self.currents(x)
        return psu(
            u, z, self.decay, self.drop(), self.v_threshold, self.surrogate, integrate, raw, self.strict, state, keep
        )

    def _potentials(self, x: Tensor, state: Tensor | None) -> Tensor:
        u, z, integrate, raw = self.currents(x)
        return psu_potentials(u, z, self.decay, self.drop(), integrate, raw, state)

    def extra_repr(self) -> str:
        return describe(tau=self.tau, v_threshold=self.v_threshold, surrogate=self.surrogate)


class _Learned(PSU):
    """What IPSU and RPSU share: a learned causal matrix over time with a bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        T: int,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        strict: bool = False,
        bias: bool = True,
        scaled_reset: bool = True,
    ):
        super().__init__(tau, v_threshold, surrogate, strict)
        self.T = count("T", T)
        self.reset_threshold = self.v_threshold if scaled_reset else 1.0
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

    def drop(self) -> float:
        return self.reset_threshold * self.tau * self.decay


class IPSU(_Learned):
    """Input-aware PSU (Li et al. 2024): the leaky integration is learned, `V = J - B sigmoid(J)` with `J = A_I I + b`.

    Args: as `RPSU`, and

        form: "paper"; or "released", `V = J - B I`, whose reset acts on the raw input.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def __init__(
        self,
        T: int,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        strict: bool = False,
        bias: bool = True,
        scaled_reset: bool = True,
        form: Literal["paper", "released"] = "paper",
    ):
        super().__init__(T, tau, v_threshold, surrogate, strict, bias, scaled_reset)
        if form not in ("paper", "released"):
            raise ValueError(f"form must be 'paper' or 'released', got {form!r}")
        self.form = form

    def currents(self, x: Tensor) -> tuple[Tensor, Tensor | None, bool, bool]:
        released = self.form == "released"
        return self.learned(x), x if released else None, False, released


class RPSU(_Learned):
    """Reset-aware PSU (Li et al. 2024): the estimate of the spikes is learned, `V = A I - B sigmoid(A_R I + b)`.

    Args:
        T: steps, fixed.
        tau, v_threshold, surrogate, strict: as `PSU`.
        bias: one learned value a step, added to the product.
        scaled_reset: B carries `v_threshold`, as the derivation has it; without it, as in the released code.

    Parameters: `weight` [T, T], normal with std sqrt(2 / T), masked to its lower triangle; `bias` [T], 0.
    Under a Stream it raises: its matrix is made for whole sequences.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def currents(self, x: Tensor) -> tuple[Tensor, Tensor | None, bool, bool]:
        return x, self.learned(x), True, False


class SPSN(Neuron):
    """Stochastic parallel spiking neuron (Li et al. 2024): spikes drawn with probability `sigmoid(A I)`. No parameters.

    The released code gives the draw no gradient, so no layer below it learns. Here the probability stands in for the
    draw's derivative, the rule of ParaLIF's SB (a choice of ours).

    Args:
        tau: membrane time constant in steps, greater than 1.

    It steps under a Stream; state [2, N, ...].

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def __init__(self, tau: float = 2.0):
        super().__init__()
        self.decay = leak(tau, "it is the decay of the leaky integration")
        self.tau = tau

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        check_state(self, state, x, (2,))
        spikes, (state, _) = paralif(x, 0.0, self.decay, "sb", 0.0, ATan(), (state, None), keep)
        return spikes, state

    def _potentials(self, x: Tensor, state: Tensor | None) -> Tensor:
        return leaky_filter(x, 0.0, self.decay, state)[0]

    def extra_repr(self) -> str:
        return describe(tau=self.tau)
