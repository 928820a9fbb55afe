"""Recurrent layers: LIF, whose spikes come back one step later, and ParaLIF in two passes without a loop over time."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spikeloom.checks import count, number
from spikeloom.neurons.base import check_state, describe
from spikeloom.neurons.paralif import LeakyIntegrator, ParaLIF
from spikeloom.ops.paralif import paralif
from spikeloom.ops.recurrent import recurrent_potentials, recurrent_scan
from spikeloom.stream import State
from spikeloom.surrogates import FastSigmoid, Surrogate, as_surrogate


def _recurrent(features: int) -> nn.Linear:
    # Kaiming uniform, fan-in, linear gain: bound sqrt(3 / fan_in).
    layer = nn.Linear(count("features", features), features)
    nn.init.uniform_(layer.weight, -math.sqrt(3 / features), math.sqrt(3 / features))
    nn.init.zeros_(layer.bias)
    return layer


class RecurrentLIF(LeakyIntegrator):
    """LIF with a synaptic current and recurrent weights (ParaLIF, Eq. 20); hard reset to 0, detached.

        I[t] = alpha I[t-1] + X[t] + W_r S[t-1] + b_r,   M[t] = beta M[t-1] + (1 - beta) I[t],   S[t] = 1 where M > V_th

    Args:
        features: the last axis of the input, [T, N, features].
        tau_mem, tau_syn, time_step: as `LeakyIntegrator`.
        v_threshold, surrogate: of the spikes.
        feedback: "spikes"; or "relu", which feeds back the rectified potential after the reset.

    Parameters: `recurrent.weight` [features, features], `recurrent.bias`.

    Shapes: input [T, N, features] -> spikes {0, 1} [T, N, features].
    """

    fires: ClassVar[bool] = True

    def __init__(
        self,
        features: int,
        tau_mem: float = 0.02,
        tau_syn: float | None = 0.02,
        time_step: float = 0.001,
        v_threshold: float = 1.0,
        surrogate: Surrogate | str = FastSigmoid(),  # noqa: B008
        feedback: str = "spikes",
    ):
        super().__init__(tau_mem, tau_syn, time_step)
        if feedback not in ("spikes", "relu"):
            raise ValueError(f"feedback must be 'spikes' or 'relu', got {feedback!r}")
        self.v_threshold = number("v_threshold", v_threshold, above=0)
        self.surrogate, self.feedback = as_surrogate(surrogate), feedback
        self.recurrent = _recurrent(features)

    def run(self, x: Tensor, state: Any, keep: bool) -> tuple[Tensor, Any]:
        check_state(self, None if state is None else state[0], x)
        spikes, last = recurrent_scan(
            x,
            self.recurrent.weight,
            self.recurrent.bias,
            self.alpha,
            self.beta,
            self.v_threshold,
            self.surrogate,
            self.feedback == "relu",
            state,
        )
        return spikes, last if keep else None

    def _potentials(self, x: Tensor, state: Any) -> Tensor:
        return recurrent_potentials(
            x,
            self.recurrent.weight,
            self.recurrent.bias,
            self.alpha,
            self.beta,
            self.v_threshold,
            self.feedback == "relu",
            state,
        )

    def extra_repr(self) -> str:
        return f"{describe(v_threshold=self.v_threshold, feedback=self.feedback)}, {super().extra_repr()}"


class RecurrentParaLIF(ParaLIF):
    """ParaLIF with recurrent weights, in two passes (ParaLIF, Sec. 3.4).

        M_h = LI(X),   H[t] = Phi(M_h[t-1]), H[0] = 0,   M = M_h + LI(X + W_r H + b_r),   S = Phi(M)

    Args:
        features: the last axis of the input, [T, N, features].
        firing, tau_mem, tau_syn, time_step, v_threshold, learn_threshold, learn_tau, surrogate: as `ParaLIF`.
        feedback: "spikes", `H = Phi(M_h)`; or "relu", `H = relu(M_h)`.
        add_hidden: add M_h to the second pass, as the released code does, which counts X twice; without it the
            single `LI(X + W_r H + b_r)`.

    Parameters: `recurrent.weight` [features, features], `recurrent.bias`.
    Under a Stream it raises: its two passes need the whole sequence.

    Shapes: input [T, N, features] -> spikes {0, 1} [T, N, features].
    """

    def __init__(
        self,
        features: int,
        firing: str = "gs",
        tau_mem: float = 0.02,
        tau_syn: float | None = 0.02,
        time_step: float = 0.001,
        v_threshold: float | list[float] | None = None,
        learn_threshold: bool = False,
        learn_tau: bool = False,
        surrogate: Surrogate | str = FastSigmoid(),  # noqa: B008
        feedback: str = "spikes",
        add_hidden: bool = True,
    ):
        super().__init__(firing, tau_mem, tau_syn, time_step, v_threshold, learn_threshold, learn_tau, surrogate)
        if feedback not in ("spikes", "relu"):
            raise ValueError(f"feedback must be 'spikes' or 'relu', got {feedback!r}")
        self.feedback, self.add_hidden = feedback, add_hidden
        self.recurrent = _recurrent(features)

    def current(self, x: Tensor) -> Tensor:
        """What the second pass integrates, the first pass included: `LI` is linear, so M_h is the integral of X."""
        if self.feedback == "relu":
            h = torch.relu(super().membrane(x, None, False)[0])
        else:
            h, _ = paralif(x, *self.decays(), self.firing, self.threshold(), self.surrogate)
        late = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        fed = x + self.recurrent(late)
        return fed + x if self.add_hidden else fed

    def membrane(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        return super().membrane(self.current(x), None, False)

    def run(self, x: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        if keep:
            raise RuntimeError("RecurrentParaLIF needs the whole sequence at once; RecurrentLIF can step")
        return super().run(self.current(x), None, False)
