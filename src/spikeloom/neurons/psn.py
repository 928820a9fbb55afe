"""Neurons parallel in time by a learned matrix (Fang et al. 2023, PSN). Equations: `ops.psn`.

One matrix mixes the steps of all neurons of a layer; there is no reset. Thresholds are kept as biases, b = -B.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from spikeloom.checks import count, number
from spikeloom.modes import transformed, without_autocast
from spikeloom.neurons.base import Neuron, check_state, describe
from spikeloom.ops.psn import band_mask, over_time, psn, sliding_matrix, sliding_psn
from spikeloom.ops.scan import fire
from spikeloom.surrogates import ATan, Surrogate, as_surrogate


def check_length(module: nn.Module, steps: int, x: Tensor) -> None:
    """Refuses a sequence of another length than the module's matrix."""
    if x.shape[0] != steps:
        raise ValueError(f"this {type(module).__name__} is made for T = {steps} steps, got {x.shape[0]}")


class PSN(Neuron):
    """Parallel spiking neuron (Fang et al. 2023, PSN): `S = Theta(W X + b)`, every step sees every other.

    Args:
        T: steps, fixed.
        surrogate: its derivative replaces that of Theta.

    Parameters: `weight` [T, T], Kaiming-uniform; `bias` [T], -1.
    Under a Stream it raises: it needs the whole sequence.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def __init__(self, T: int, surrogate: Surrogate | str = ATan()):  # noqa: B008
        super().__init__()
        self.T, self.surrogate = count("T", T), as_surrogate(surrogate)
        self.weight = nn.Parameter(torch.empty(T, T))
        self.bias = nn.Parameter(torch.full((T,), -1.0))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def run(self, x: Tensor, state: None, keep: bool) -> tuple[Tensor, None]:
        if keep:
            raise RuntimeError(
                "PSN needs the whole sequence at once and cannot run under a Stream; MaskedPSN and SlidingPSN can step"
            )
        check_length(self, self.T, x)
        return psn(x, self.weight, self.bias, self.surrogate), None

    def _potentials(self, x: Tensor, state: None) -> Tensor:
        return over_time(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return describe(T=self.T, surrogate=self.surrogate)


class MaskedPSN(Neuron):
    """Masked PSN (Fang et al. 2023), which sees the last `order` steps alone and is causal once lam is 1.

        S = Theta((W . M(lam)) X + b)

    Args:
        T: steps, at most.
        order: k, how many steps up to the present one a step sees.
        lam: how far the mask is on, from 0 (PSN) to 1; `start_epoch` moves it, as the paper's runs do.
        surrogate: its derivative replaces that of Theta.

    Parameters: `weight` [T, T], Kaiming-uniform; `bias` [T], -1. The buffer `lam` is saved with them.
    Under a Stream it steps from a queue of the last k - 1 inputs, once lam is 1.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    lam: Tensor

    def __init__(self, T: int, order: int, lam: float = 1.0, surrogate: Surrogate | str = ATan()):  # noqa: B008
        super().__init__()
        self.T, self.order = count("T", T), count("order", order)
        if not 0 <= number("lam", lam) <= 1:
            raise ValueError(f"lam must lie from 0 to 1, got {lam}")
        self.surrogate = as_surrogate(surrogate)
        self.weight = nn.Parameter(torch.empty(T, T))
        self.bias = nn.Parameter(torch.full((T,), -1.0))
        self.register_buffer("lam", torch.tensor(float(lam)))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Progressive masking: lam rises to 1 over the first eighth of training (released code, "pmd8")."""
        self.lam.fill_(1.0 if epochs == 1 else min(1.0, 8 * epoch / (epochs - 1)))

    def _masked(self) -> Tensor:
        mask = band_mask(self.T, self.order, self.weight)
        return self.weight * (self.lam * mask + (1 - self.lam))

    def run(self, x: Tensor, state: tuple[Tensor, int] | None, keep: bool) -> tuple[Tensor, tuple[Tensor, int] | None]:
        if not keep:
            check_length(self, self.T, x)
            if torch.compiler.is_compiling() or transformed() or self.lam.is_meta or float(self.lam) < 1:
                return fire(over_time(x, self._masked(), self.bias), self.surrogate).to(x.dtype), None
            return psn(x, self.weight, self.bias, self.surrogate, self.order), None
        if float(self.lam) < 1:
            raise RuntimeError(f"MaskedPSN cannot step while its mask is partly off: lam is {float(self.lam):.3g}")
        h, seen, last = self._continue(x, state)
        queue = seen[max(0, seen.shape[0] - self.order + 1) :]
        return fire(h, self.surrogate).to(x.dtype), (queue, last)

    def _continue(self, x: Tensor, state: tuple[Tensor, int] | None) -> tuple[Tensor, Tensor, int]:
        """Potentials of the steps that follow a state, the inputs they see, and the number of steps so far."""
        seen, first = x, 0
        if state is not None:
            queue, first = state
            if queue.shape[0]:
                check_state(self, queue[0], x)
            seen = torch.cat([queue.to(x.dtype), x])
        last = first + x.shape[0]
        if last > self.T:
            raise ValueError(f"this MaskedPSN is made for T = {self.T} steps, and the Stream has come to step {last}")
        weight = self._masked()[first:last, last - seen.shape[0] : last]
        return over_time_of(seen, weight, self.bias[first:last]), seen, last

    def _potentials(self, x: Tensor, state: tuple[Tensor, int] | None) -> Tensor:
        return self._continue(x, state)[0]

    def extra_repr(self) -> str:
        return describe(T=self.T, order=self.order, surrogate=self.surrogate)


def over_time_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`ops.psn.over_time` for a weight with fewer rows than x has steps: [S, N, ...] -> [rows, N, ...]."""
    with without_autocast(x):
        h = weight @ x.flatten(1).to(weight.dtype) + bias.unsqueeze(1)
    return h.view(weight.shape[0], *x.shape[1:])


class SlidingPSN(Neuron):
    """Sliding PSN (Fang et al. 2023): one row of k weights for every step, and any T.

        H[t] = sum_i w_i X[t - k + 1 + i] + b

    Args:
        order: k.
        init: "kaiming", uniform over a 1 x k matrix; or "exponential", 1 for the present step and half of the next for
            each older one.
        surrogate: its derivative replaces that of Theta.

    Parameters: `weight` [k]; `bias`, a scalar, -1.
    Under a Stream it steps from a queue of k - 1 inputs.

    Shapes: input [T, N, ...] -> spikes {0, 1} [T, N, ...].
    """

    def __init__(
        self,
        order: int,
        init: Literal["kaiming", "exponential"] = "kaiming",
        surrogate: Surrogate | str = ATan(),  # noqa: B008
    ):
        super().__init__()
        if init not in ("kaiming", "exponential"):
            raise ValueError(f"init must be 'kaiming' or 'exponential', got {init!r}")
        self.order, self.surrogate = count("order", order), as_surrogate(surrogate)
        self.bias = nn.Parameter(torch.tensor(-1.0))
        if init == "exponential":
            self.weight = nn.Parameter(0.5 ** torch.arange(order - 1, -1, -1, dtype=torch.float32))
        else:
            self.weight = nn.Parameter(torch.empty(order).uniform_(-1 / math.sqrt(order), 1 / math.sqrt(order)))

    def run(self, x: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        if not keep:
            return sliding_psn(x, self.weight, self.bias, self.surrogate), None
        if state is not None and state.shape[0]:
            check_state(self, state[0], x)
        seen = x if state is None else torch.cat([state, x])
        spikes = sliding_psn(seen, self.weight, self.bias, self.surrogate)
        return spikes[seen.shape[0] - x.shape[0] :], seen[max(0, seen.shape[0] - self.order + 1) :]

    def _potentials(self, x: Tensor, state: Tensor | None) -> Tensor:
        seen = x if state is None else torch.cat([state, x])
        steps = seen.shape[0]
        h = over_time(seen, sliding_matrix(self.weight, steps), self.bias.expand(steps))
        return h[steps - x.shape[0] :]

    def extra_repr(self) -> str:
        return describe(order=self.order, surrogate=self.surrogate)
