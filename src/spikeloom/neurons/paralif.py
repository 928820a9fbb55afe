"""ParaLIF: leaky integration without reset, parallel in time, and an instantaneous firing function (Yarga and Wood
2024). Its serial baseline, the LIF with a synaptic current, and the readout are here too. Times are in seconds."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from spikeloom.checks import flag, number
from spikeloom.errors import UsageError
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops.leaky_integrator import leaky_filter
from spikeloom.ops.paralif import paralif
from spikeloom.ops.paralif_firing import FIRING
from spikeloom.ops.scan import potentials, scan
from spikeloom.registry import nearest
from spikeloom.stream import State
from spikeloom.surrogates import FastSigmoid, Surrogate, as_surrogate


class LeakyIntegrator(Neuron):
    """Two leaky filters and no spikes: a readout (ParaLIF, Sec. 3.5). Equations: `ops.leaky_integrator`.

        I[t] = alpha I[t-1] + X[t],   M[t] = beta M[t-1] + (1 - beta) I[t],   alpha = exp(-dt/tau_syn), beta likewise

    Args:
        tau_mem, tau_syn: time constants in seconds, or one for each feature (the last axis); tau_syn None leaves the
            synaptic filter out.
        time_step: dt in seconds.
        learn_tau: train the time constants, through a sigmoid of the raw parameters `alpha` and `beta`. These start
            where tau says; the released code starts at sigmoid(alpha) instead.

    Shapes: input [T, N, ...] -> membrane [T, N, ...]; state {I, M} [2, N, ...].
    """

    fires: ClassVar[bool] = False
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        tau_mem: float | list[float] = 0.02,
        tau_syn: float | list[float] | None = 0.02,
        time_step: float = 0.001,
        learn_tau: bool = False,
    ):
        super().__init__()
        self.learn_tau, self.time_step = learn_tau, number("time_step", time_step, above=0)
        self.has_synapse = tau_syn is not None
        for name, tau in (("beta", tau_mem), ("alpha", tau_syn)):
            value = _decay(tau, time_step)
            if learn_tau and tau is not None:
                setattr(self, name, nn.Parameter(torch.tensor(torch.logit(value).tolist())))
            else:
                # Not a buffer: it would lose digits in `module.bfloat16()` and its value on the meta device, and
                # saved weights would not bring them back.
                setattr(self, name, value)

    def decays(self) -> tuple[Tensor, Tensor]:
        """alpha and beta as they act."""
        if not self.learn_tau:
            return self.alpha, self.beta
        return torch.sigmoid(self.alpha) if self.has_synapse else self.alpha, torch.sigmoid(self.beta)

    def membrane(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """M [T, N, ...] and the state after it."""
        check_state(self, state, x, (2,))
        return leaky_filter(x, *self.decays(), state, keep)

    def run(self, x: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        return self.membrane(x, state, keep)

    def _potentials(self, x: Tensor, state: State) -> Tensor:
        return self.membrane(x, state, False)[0]

    def extra_repr(self) -> str:
        return describe(time_step=self.time_step, learn_tau=self.learn_tau)


def _decay(tau: float | list[float] | None, time_step: float) -> Tensor:
    """The decay factors of a step, float64; 0 for None."""
    if tau is None:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    values = tau if isinstance(tau, list) else [tau]
    factors = [1.0 if v == math.inf else math.exp(-time_step / number("a time constant", v, above=0)) for v in values]
    decays = torch.tensor(factors, dtype=torch.float64, device="cpu")
    return decays if isinstance(tau, list) else decays[0]


def _threshold(value: float | list[float], learned: bool) -> float | Tensor:
    values = [number("v_threshold", v, above=0) for v in (value if isinstance(value, list) else [value])]
    found = values if isinstance(value, list) else values[0]
    if learned:
        return nn.Parameter(torch.tensor(found))
    return torch.tensor(found, dtype=torch.float64, device="cpu") if isinstance(found, list) else found


class ParaLIF(LeakyIntegrator):
    """`S = Phi(M)`: leaky integration, then a firing function of `ops.paralif_firing`.

    Args:
        firing: gs, sb, trb, d, sd, td, t, st or tt (or trd, trt).
        tau_mem, tau_syn, time_step, learn_tau: as `LeakyIntegrator`.
        v_threshold: of the functions that end in t, 1 by default; of those in d, the rise in one step, 0.1 by default.
            Or one for each feature.
        learn_threshold: train it, through a ReLU.
        surrogate: of the threshold and difference rules.

    Shapes: input [T, N, ...] -> spikes [T, N, ...]; state {I, M}, and the mapped potential for differences.
    """

    fires: ClassVar[bool] = True

    def __init__(
        self,
        firing: str = "gs",
        tau_mem: float | list[float] = 0.02,
        tau_syn: float | list[float] | None = 0.02,
        time_step: float = 0.001,
        v_threshold: float | list[float] | None = None,
        learn_threshold: bool = False,
        learn_tau: bool = False,
        surrogate: Surrogate | str = FastSigmoid(),  # noqa: B008
    ):
        super().__init__(tau_mem, tau_syn, time_step, learn_tau)
        if firing not in FIRING:
            raise UsageError(f"unknown firing function {firing!r}; {nearest(firing, FIRING)}")
        if v_threshold is None:
            v_threshold = 0.1 if FIRING[firing][1] == "difference" else 1.0
        self.firing, self.surrogate = firing, as_surrogate(surrogate)
        self.v_threshold = _threshold(v_threshold, learn_threshold)

    def threshold(self) -> float | Tensor:
        """The threshold as it acts."""
        return torch.relu(self.v_threshold) if isinstance(self.v_threshold, Tensor) else self.v_threshold

    def run(self, x: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        filters, before = (None, None) if state is None else state
        check_state(self, filters, x, (2,))
        spikes, after = paralif(
            x, *self.decays(), self.firing, self.threshold(), self.surrogate, (filters, before), keep
        )
        return spikes, after if keep else None

    def _potentials(self, x: Tensor, state: State) -> Tensor:
        return self.membrane(x, None if state is None else state[0], False)[0]

    def extra_repr(self) -> str:
        return f"{describe(firing=self.firing, surrogate=self.surrogate)}, {super().extra_repr()}"


class SynapticLIF(LeakyIntegrator):
    """LIF with a synaptic current, ParaLIF's serial baseline (Sec. 3.1): hard reset of M to 0, detached.

    Args:
        tau_mem, tau_syn, time_step, learn_tau: as `LeakyIntegrator`.
        v_threshold: potential at which a neuron fires.
        surrogate: its derivative replaces that of Theta.
        strict: fire on `>`, as the released code; `>=` without.

    Shapes: input [T, N, ...] -> spikes [T, N, ...]; state {I, M} as a pair.
    """

    fires: ClassVar[bool] = True

    def __init__(
        self,
        tau_mem: float = 0.02,
        tau_syn: float | None = 0.02,
        time_step: float = 0.001,
        v_threshold: float = 1.0,
        learn_tau: bool = False,
        surrogate: Surrogate | str = FastSigmoid(),  # noqa: B008
        strict: bool = True,
    ):
        super().__init__(tau_mem, tau_syn, time_step, learn_tau)
        self.v_threshold = number("v_threshold", v_threshold, above=0)
        self.surrogate, self.strict = as_surrogate(surrogate), flag("strict", strict)

    def current(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """I [T, N, ...]: it does not know of spikes, so it is a filter of its own."""
        if not self.has_synapse:
            return x, None
        before = None if state is None else torch.stack([state, state])
        current, after = leaky_filter(x, self.decays()[0], 0.0, before, keep)
        return current, None if after is None else after[0]

    def run(self, x: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        synapse, v = (None, None) if state is None else state
        check_state(self, v, x)
        current, synapse = self.current(x, synapse, keep)
        beta = self.decays()[1]
        spikes, v = scan(
            current, v, beta, 1 - beta, self.v_threshold, 0.0, self.surrogate, True, keep, strict=self.strict
        )
        return spikes, (synapse, v) if keep else None

    def _potentials(self, x: Tensor, state: State) -> Tensor:
        synapse, v = (None, None) if state is None else state
        beta = self.decays()[1]
        current = self.current(x, synapse, False)[0]
        return potentials(current, v, beta, 1 - beta, self.v_threshold, 0.0, strict=self.strict)
