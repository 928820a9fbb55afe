"""Sequential neurons: linear charge, threshold, reset. They differ in their charge alone; equations: `ops.scan`."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from spikeloom.checks import flag, number
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops import scan as scan_op
from spikeloom.ops.scan import potentials
from spikeloom.ops.scan.params import ScanParams
from spikeloom.surrogates import ATan, Rectangular, Surrogate, as_surrogate


class LIFBase(Neuron):
    """Base of the neurons of `ops.scan`: they differ in `charge` alone.

    Args:
        v_threshold: potential at which a neuron fires, in the unit of its input.
        v_reset: potential after a spike (hard reset); None subtracts `v_threshold` instead (soft reset).
        surrogate: spike function, or its name in `SURROGATES`; frozen, hence safe as a default.
        detach_reset: no gradient through the reset.
        strict: fire on `>` instead of `>=`, as several released codes do.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        detach_reset: bool = True,
        strict: bool = False,
    ):
        super().__init__()
        # A soft reset subtracts the threshold; a hard one may have both below 0, as membranes in millivolts do.
        v_threshold = number("v_threshold", v_threshold, above=0 if v_reset is None else None)
        if v_reset is not None:
            v_reset = number("v_reset", v_reset)
            if v_reset >= v_threshold:
                raise ValueError(
                    f"v_reset must be below v_threshold, got {v_reset} and {v_threshold}: the neuron would never be "
                    "silent"
                )
        self.v_threshold: float | tuple[float, ...] = v_threshold
        self.v_reset, self.surrogate = v_reset, as_surrogate(surrogate)
        self.detach_reset, self.strict = flag("detach_reset", detach_reset), flag("strict", strict)

    def charge(self) -> tuple[float | Tensor, float | Tensor]:
        """The constants (decay, gain) of `ops.scan`."""
        raise NotImplementedError

    def scale(self) -> float | Tensor | None:
        """The scale of a rectified charge, or None."""
        return None

    def scan_params(self) -> ScanParams:
        """Thresholds, reset and surrogate as `ops.norm_scan` takes them; for surrogates with a formula."""
        formula = self.surrogate.formula
        assert formula is not None
        thresholds = self.v_threshold if isinstance(self.v_threshold, tuple) else (self.v_threshold,)
        return ScanParams(thresholds, self.v_reset, self.strict, self.detach_reset, formula)

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        levels = (len(self.v_threshold),) if isinstance(self.v_threshold, tuple) else ()
        check_state(self, state, x, levels)
        return scan_op(
            x,
            state,
            *self.charge(),
            self.v_threshold,
            self.v_reset,
            self.surrogate,
            self.detach_reset,
            return_v=keep,
            scale=self.scale(),
            strict=self.strict,
        )

    def _potentials(self, x: Tensor, state: Tensor | None) -> Tensor:
        return potentials(x, state, *self.charge(), self.v_threshold, self.v_reset, self.scale(), self.strict)

    def extra_repr(self) -> str:
        return describe(
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            surrogate=self.surrogate,
            detach_reset=self.detach_reset,
            strict=self.strict,
        )


class IF(LIFBase):
    """Integrate-and-fire neurons: `H[t] = V[t-1] + X[t]` (SEW ResNet, Eq. 1). Arguments as `LIFBase`.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def charge(self) -> tuple[float, float]:
        return 1.0, 1.0


def leak(tau: float, instead: str) -> float:
    """The decay factor `1 - 1 / tau`; refuses tau <= 1 with a hint at what to do instead."""
    return 1 - 1 / number("tau", tau, above=1, hint=instead)


class LIF(LIFBase):
    """Leaky integrate-and-fire neurons.

    `decay_input=True`:  `H[t] = V[t-1] + (X[t] - (V[t-1] - V_reset)) / tau` (SEW ResNet, Eq. 5).
    `decay_input=False`: `H[t] = V[t-1] - (V[t-1] - V_reset) / tau + X[t]`; with V_reset = 0 the form of
    tdBN, MS-ResNet, TET, SLTT and the course report, whose decay factor is `1 - 1 / tau`.

    Args:
        tau: membrane time constant in steps, greater than 1.
        decay_input: divide the input by tau as well.
        v_threshold, v_reset, surrogate, detach_reset, strict: as `LIFBase`.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        detach_reset: bool = True,
        strict: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate, detach_reset, strict)
        self.decay = leak(tau, "for no leak use IF")
        self.tau, self.decay_input = tau, flag("decay_input", decay_input)

    def charge(self) -> tuple[float, float]:
        return self.decay, 1 / self.tau if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"{describe(tau=self.tau, decay_input=self.decay_input)}, {super().extra_repr()}"


class PLIF(LIFBase):
    """LIF with one learnable time constant a layer, `1 / tau = sigmoid(w)` (Fang et al. 2021, PLIF, Eq. 9).

    Args:
        tau: where the time constant starts, greater than 1.
        decay_input, v_threshold, v_reset, surrogate, detach_reset, strict: as `LIF`.

    Parameters: `w`, a scalar, at first `-ln(tau - 1)`.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        detach_reset: bool = True,
        strict: bool = False,
    ):
        super().__init__(v_threshold, v_reset, surrogate, detach_reset, strict)
        leak(tau, "it is where the learnable time constant starts")
        self.decay_input = flag("decay_input", decay_input)
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)))

    def charge(self) -> tuple[Tensor, float | Tensor]:
        rate = torch.sigmoid(self.w)
        return 1 - rate, rate if self.decay_input else 1.0

    def extra_repr(self) -> str:
        return f"{describe(decay_input=self.decay_input)}, {super().extra_repr()}"


class MLF(LIFBase):
    """Multi-level firing (Feng et al. 2022, MLF, Eqs. 6-9): LIF neurons with several thresholds on one input.

    The output is the number of levels that fire, an integer from 0 to K. Every level has its own potential and reset;
    the windows of the surrogate (width 1) tile the thresholds' range, so fewer inputs get no gradient.

    Args:
        tau: `1 - 1 / tau` is the decay factor k_tau; 4/3 for 0.25.
        v_threshold: of each level, ascending.
        surrogate, detach_reset, strict: as `LIFBase`; the released code differentiates through the reset, and fires
            on `>`.

    Shapes: input [T, N, ...] -> {0, ..., K} [T, N, ...]; state [K, N, ...].
    """

    def __init__(
        self,
        tau: float = 4 / 3,
        v_threshold: tuple[float, ...] | float = (0.6, 1.6, 2.6),
        surrogate: Surrogate | str = Rectangular(),  # noqa: B008
        detach_reset: bool = False,
        strict: bool = False,
    ):
        levels = v_threshold if isinstance(v_threshold, tuple | list) else (v_threshold,)
        thresholds = tuple(number("v_threshold", level, above=0) for level in levels)
        if not thresholds or any(a >= b for a, b in itertools.pairwise(thresholds)):
            raise ValueError(f"v_threshold must be positive and ascending, got {thresholds}")
        super().__init__(thresholds[0], 0.0, surrogate, detach_reset, strict)
        self.v_threshold = thresholds
        self.decay = leak(tau, "for no memory use a smaller one just above 1")
        self.tau = tau

    def charge(self) -> tuple[float, float]:
        return self.decay, 1.0


class KLIF(LIF):
    """LIF whose potential passes `relu(k H)` before it fires (Jiang and Zhang 2023, KLIF); k is learned.

    Args: as `LIF`.

    Parameters: `k`, a scalar, at first 1.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...]; state, the potentials [N, ...].
    """

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: Surrogate | str = ATan(),  # noqa: B008
        detach_reset: bool = True,
        strict: bool = False,
    ):
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate, detach_reset, strict)
        self.k = nn.Parameter(torch.tensor(1.0))

    def scale(self) -> Tensor:
        return self.k
