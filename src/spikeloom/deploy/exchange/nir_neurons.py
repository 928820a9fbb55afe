"""NIR's neurons in steps of forward Euler, whatever their constants (equations: `exchange.nir_write`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.neurons import LeakyIntegrator, Neuron, SynapticLIF
from spikeloom.neurons.base import check_state, describe
from spikeloom.neurons.lif import LIFBase
from spikeloom.ops.scan.reference import state_dtype
from spikeloom.surrogates import ATan, Surrogate

Reset = Literal["set", "subtract", "subtract_later"]
"""What a spike does to the potential: it becomes v_reset; v_threshold is taken off; or off after the next leak."""

FIELDS = {
    "IF": ("r", "v_threshold", "v_reset"),
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "LI": ("tau", "r", "v_leak"),
    "CubaLI": ("tau_mem", "tau_syn", "r", "v_leak", "w_in"),
    "CubaLIF": ("tau_mem", "tau_syn", "r", "v_leak", "w_in", "v_threshold", "v_reset"),
}
"""Constants of the nodes that are neurons."""


class Charged(LIFBase):
    """Neurons of any linear charge, `H = V_rest + decay (V - V_rest) + gain X`: what NIR's IF and LIF are in steps.

    Args:
        decay, gain: of the charge.
        v_threshold, v_reset, strict: as `LIFBase`.
    """

    def __init__(self, decay: float, gain: float, v_threshold: float, v_reset: float | None, strict: bool):
        super().__init__(v_threshold, v_reset, strict=strict)
        self.decay, self.gain = decay, gain

    def charge(self) -> tuple[float, float]:
        return self.decay, self.gain

    def extra_repr(self) -> str:
        return f"decay={self.decay}, gain={self.gain}, {super().extra_repr()}"


class NIRNeurons(Neuron):
    """The neurons of a NIR node, each with its own constants, step by step in plain PyTorch.

        I[t] = alpha I[t-1] + X[t] + W S[t-1]                     I = X + W S without a synapse
        H[t] = decay V[t-1] + gain I[t] + drive                   the output of LI and CubaLI
        S[t] = Theta(H[t] - v_threshold)
        V[t] = v_reset where it fires, or H[t] - drop S[t]

    Before the first step V is v_leak, or v_reset of IF.

    Args:
        kind: of the node, a key of `FIELDS`.
        constants: of the node by their names, each a scalar or of the shape of a step.
        dt: seconds of a step.
        strict: fire on `>` instead of `>=`.
        reset: what a spike does.
        feedback: W, from the spikes of the step before to currents; None for none.
        surrogate: of the spikes.

    Shapes: input [T, N, ...] -> spikes, or potentials of LI and CubaLI, [T, N, ...]; state (I, V, S), each [N, ...].

    Raises:
        ValueError: constants that no neuron has.
    """

    def __init__(
        self,
        kind: str,
        constants: Mapping[str, np.ndarray],
        dt: float,
        strict: bool = True,
        reset: Reset = "set",
        feedback: nn.Module | None = None,
        surrogate: Surrogate = ATan(),  # noqa: B008
    ):
        super().__init__()
        self.kind, self.constants, self.dt = kind, dict(constants), dt
        self.strict, self.feedback, self.surrogate = strict, feedback, surrogate
        self.reset: Reset = reset
        self.steps = in_steps(kind, constants, dt)
        if "v_threshold" in constants:
            decay, threshold = self.steps["decay"], constants["v_threshold"]
            if reset == "set" and np.any(constants["v_reset"] >= threshold):
                raise ValueError("v_reset must be below v_threshold: the neuron would never be silent")
            if reset == "subtract_later" and not np.all(decay > 0):
                raise ValueError("v_threshold cannot be taken off after a leak to 0: tau must be more than a step")
            self.steps["drop"] = threshold / decay if reset == "subtract_later" else threshold

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a step, as far as the constants tell: () where all are scalars."""
        return np.broadcast_shapes(*(value.shape for value in self.constants.values()))

    def run(self, x: Tensor, state: Any, keep: bool) -> tuple[Tensor, Any]:
        if self.shape not in ((), (1,), x.shape[2:]):
            raise ValueError(f"these {self.kind} neurons take [T, N, {', '.join(map(str, self.shape))}], got {x.shape}")
        check_state(self, None if state is None else state[1], x)
        own = {
            name: torch.as_tensor(value).to(x.device, state_dtype(x))
            for name, value in (self.steps | self.constants).items()
        }
        start = own["v_leak"] if "v_leak" in own else own["v_reset"]
        current, v, spikes = state or (0.0, start.expand(x.shape[1:]), torch.zeros_like(x[0]))
        outputs: list[Tensor] = []
        for x_t in x.to(state_dtype(x)):
            fed = x_t if self.feedback is None else x_t + self.feedback(spikes[None])[0]
            current = own["alpha"] * current + fed if "alpha" in own else fed
            v = own["decay"] * v + own["gain"] * current + own["drive"]
            if "v_threshold" not in own:
                outputs.append(v)
                continue
            spikes = self.surrogate(v - own["v_threshold"], self.strict)
            fired = spikes.detach()
            v = v * (1 - fired) + own["v_reset"] * fired if self.reset == "set" else v - own["drop"] * fired
            outputs.append(spikes)
            spikes = spikes.to(x.dtype)
        return torch.stack(outputs).to(x.dtype), (current, v, spikes) if keep else None

    def node(self, nir: Any, dt: float, shape: tuple[int, ...]) -> Any:
        """The NIR node of these neurons, for steps of dt seconds."""
        longer = dt / self.dt
        scales = {"tau": longer, "tau_mem": longer, "tau_syn": longer, "r": 1 / longer if self.kind == "IF" else 1.0}
        values: Any = {
            name: np.broadcast_to(value * scales.get(name, 1.0), shape).copy() for name, value in self.constants.items()
        }
        firing: Any = {"metadata": fire_metadata(self.strict, self.reset)} if "v_threshold" in values else {}
        return getattr(nir, self.kind)(**values, **firing)

    def extra_repr(self) -> str:
        return describe(kind=self.kind, dt=self.dt, strict=self.strict, reset=self.reset)


def fire_metadata(strict: bool, reset: Reset = "set") -> dict[str, Any]:
    """What NIR has no field for, as a node's metadata keep it."""
    return {"strict": strict} | ({} if reset == "set" else {"reset": reset})


def in_steps(kind: str, constants: Mapping[str, np.ndarray], dt: float) -> dict[str, np.ndarray]:
    """alpha (of a synapse), decay, gain and drive of forward Euler steps.

    Computed in the precision of the constants: an exporter in float32 divided by its own dt in float32.

    Raises:
        ValueError: a time constant shorter than a step, or a constant that is not finite.
    """
    for name, value in constants.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {_some(value)}")
    if kind == "IF":
        gain = constants["r"] * constants["r"].dtype.type(dt)
        return {"decay": np.ones_like(gain), "gain": gain, "drive": np.zeros_like(gain)}
    leaking = "tau_mem" if kind.startswith("Cuba") else "tau"
    share = _share(leaking, constants[leaking], dt)
    steps = {"decay": 1 - share, "gain": share * constants["r"], "drive": share * constants["v_leak"]}
    if "tau_syn" in constants:
        filling = _share("tau_syn", constants["tau_syn"], dt)
        steps |= {"alpha": 1 - filling, "gain": steps["gain"] * (filling * constants["w_in"])}
    return steps


def _share(name: str, tau: np.ndarray, dt: float) -> np.ndarray:
    """dt / tau, the part of a potential that leaks away in a step."""
    share = tau.dtype.type(dt) / tau
    if not np.all((share > 0) & (share < 1 + 1e-6)):
        raise ValueError(f"{name} must be at least a step of {dt:g} s, got {_some(tau)} s")
    return np.minimum(share, 1)


def _some(value: np.ndarray) -> str:
    values = np.unique(value)
    return f"{values[0]:g}" if values.size == 1 else f"{values[0]:g} to {values[-1]:g}"


def neurons_of(name: str, node: Any, dt: float, strict: bool, reset: Reset, feedback: nn.Module | None) -> nn.Module:
    """A layer that computes a NIR node: one of the fast ones, where the node's neurons share constants that it has.

    Raises:
        UsageError: constants that no neuron has.
    """
    kind = type(node).__name__
    constants = {field: np.asarray(getattr(node, field)) for field in FIELDS[kind]}
    constants = {
        field: value if value.dtype == np.float32 else value.astype(np.float64) for field, value in constants.items()
    }
    try:
        made = NIRNeurons(kind, constants, dt, strict, reset, feedback)
    except ValueError as error:
        raise UsageError(f"node {name} ({kind}): {error}") from None
    return made if feedback is not None else shared(made) or made


def shared(made: NIRNeurons) -> nn.Module | None:
    """The same neurons by a scan for all of them, or None where their constants differ or no scan has them."""
    if any(np.unique(value).size > 1 for value in made.constants.values()) or made.reset == "subtract_later":
        return None
    own = {name: float(value.ravel()[0]) for name, value in (made.steps | made.constants).items()}
    decay, gain, leak = own["decay"], own["gain"], own.get("v_leak", own.get("v_reset", 0.0))
    rest = own.get("v_reset", 0.0) if made.reset == "set" else 0.0
    if not math.isclose(leak, rest, abs_tol=1e-9):
        return None
    if made.kind in ("IF", "LIF"):
        return Charged(decay, gain, own["v_threshold"], rest if made.reset == "set" else None, made.strict)
    # Filters here have decays exp(-dt / tau), and the membrane's gain is 1 - decay.
    if not (0 < decay < 1 and 0 < own.get("alpha", 0.5) < 1) or made.reset != "set":
        return None
    scale = gain / (1 - decay)
    taus: Any = {"tau_mem": -made.dt / math.log(decay), "tau_syn": None, "time_step": made.dt}
    if "alpha" in own:
        taus["tau_syn"] = -made.dt / math.log(own["alpha"])
    if made.kind == "CubaLIF":
        # What multiplies all currents may as well divide the threshold.
        threshold = (own["v_threshold"] - leak) / scale if scale > 0 else None
        return None if threshold is None else SynapticLIF(**taus, v_threshold=threshold, strict=made.strict)
    return LeakyIntegrator(**taus) if leak == 0 and math.isclose(scale, 1, rel_tol=1e-6) else None
