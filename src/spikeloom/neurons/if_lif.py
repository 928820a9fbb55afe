"""Sequential neurons: linear charge, threshold, reset (Fang et al. 2021, SEW ResNet, Eqs. 1-5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops import scan as scan_op
from spikeloom.ops.scan import potentials
from spikeloom.surrogates import ATan, Surrogate


class Threshold(Neuron):
    """Base of the neurons of `ops.scan`: they differ in `charge` alone.

    Args:
        v_threshold: potential at which a neuron fires, in the unit of its input.
        v_reset: potential after a spike (hard reset); None subtracts `v_threshold` instead (soft reset).
        surrogate: spike function; frozen, hence safe as a default.
        detach_reset: no gradient through the reset.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        detach_reset: bool = True,
    ):
        super().__init__()
        if v_reset is not None and v_reset >= v_threshold:
            raise ValueError(
                f"v_reset must be below v_threshold, got {v_reset} and {v_threshold}: the neuron would never be silent"
            )
        self.v_threshold, self.v_reset = v_threshold, v_reset
        self.surrogate, self.detach_reset = surrogate, detach_reset

    def charge(self) -> tuple[float | Tensor, float | Tensor]:
        """The constants (decay, gain) of `ops.scan`."""
        raise NotImplementedError

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        check_state(self, state, x)
        decay, gain = self.charge()
        return scan_op(
            x, state, decay, gain, self.v_threshold, self.v_reset, self.surrogate, self.detach_reset, return_v=keep
        )

    def potentials(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return potentials(x, state, *self.charge(), self.v_threshold, self.v_reset)

    def extra_repr(self) -> str:
        return describe(
            v_threshold=self.v_threshold, v_reset=self.v_reset, surrogate=self.surrogate, detach_reset=self.detach_reset
        )


class IF(Threshold):
    """Integrate-and-fire neurons: `H[t] = V[t-1] + X[t]` (SEW ResNet, Eq. 1). Arguments as `Threshold`."""

    def charge(self) -> tuple[float, float]:
        return 1.0, 1.0


def _leak(tau: float, instead: str) -> float:
    if not tau > 1 or not math.isfinite(tau):
        raise ValueError(f"tau must be greater than 1, got {tau}; {instead}")
    return 1 - 1 / tau


class LIF(Threshold):
    """Leaky integrate-and-fire neurons.

    `decay_input=True`:  `H[t] = V[t-1] + (X[t] - (V[t-1] - V_reset)) / tau` (SEW ResNet, Eq. 5).
    `decay_input=False`: `H[t] = V[t-1] - (V[t-1] - V_reset) / tau + X[t]`; with V_reset = 0 the form of the
    documents 000 and 003, of tdBN, MS-ResNet, TET and SLTT, whose decay factor is `1 - 1 / tau`.

    Args:
        tau: membrane time constant in steps, greater than 1.
        decay_input: divide the input by tau as well.
        v_threshold, v_reset, surrogate, detach_reset: as `Threshold`.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        detach_reset: bool = True,
    ):
        super().__init__(v_threshold, v_reset, surrogate, detach_reset)
        self.decay = _leak(tau, "for no leak use IF")
        self.tau, self.decay_input = tau, decay_input

    def charge(self) -> tuple[float, float]:
        return self.decay, 1 / self.tau if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"{describe(tau=self.tau, decay_input=self.decay_input)}, {super().extra_repr()}"


class PLIF(Threshold):
    """LIF with one learnable time constant a layer, `1 / tau = sigmoid(w)` (Fang et al. 2021, PLIF, Eq. 9).

    Args:
        tau: where the time constant starts, greater than 1.
        decay_input, v_threshold, v_reset, surrogate, detach_reset: as `LIF`.

    Parameters: `w`, a scalar, at first `-ln(tau - 1)`.
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate = ATan(),  # noqa: B008
        detach_reset: bool = True,
    ):
        super().__init__(v_threshold, v_reset, surrogate, detach_reset)
        _leak(tau, "it is where the learnable time constant starts")
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)))

    def charge(self) -> tuple[Tensor, float | Tensor]:
        rate = torch.sigmoid(self.w)
        return 1 - rate, rate if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"{describe(decay_input=self.decay_input)}, {super().extra_repr()}"
