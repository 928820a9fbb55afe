"""Every registered neuron in every form, with what tests run them on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.neurons import NEURONS, Neuron
from spikeloom.stream import Stream

T, N, C = 6, 3, 4

# Constructor arguments for sequences [T, N, C]. The thresholds of the default settings are out of reach of a few steps
# where the time constants are 20 steps long.
QUICK: dict[str, Any] = {"tau_mem": 0.002, "tau_syn": 0.001}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "IF": {},
    "LIF": {},
    "PLIF": {},
    "MLF": {},
    "PSN": {"T": T},
    "MaskedPSN": {"T": T, "order": 3},
    "SlidingPSN": {"order": 3},
    "PSU": {},
    "IPSU": {"T": T},
    "RPSU": {"T": T},
    "SPSN": {},
    "KLIF": {},
    "GLIF": {"channels": C, "T": T},
    "ParaLIF": QUICK,
    "SynapticLIF": QUICK,
    "RecurrentLIF": {"features": C} | QUICK,
    "RecurrentParaLIF": {"features": C} | QUICK,
    "LeakyIntegrator": QUICK,
    "DelayedResetLIF": {},
}
# More forms of the same classes, under names of their own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, arguments) for name, arguments in ARGUMENTS.items()} | {
    "MaskedPSN-half": ("MaskedPSN", {"T": T, "order": 3, "lam": 0.5}),
    "SlidingPSN-long": ("SlidingPSN", {"order": T + 2}),
    "IPSU-released": ("IPSU", {"T": T, "form": "released", "bias": False}),
    "GLIF-soft": ("GLIF", {"channels": C, "T": T, "hard_gates": False}),
    "ParaLIF-d": ("ParaLIF", {"firing": "d", "learn_tau": True, "learn_threshold": True} | QUICK),
    "ParaLIF-t": ("ParaLIF", {"firing": "t", "v_threshold": 0.4, "tau_mem": [0.002, 0.003, 0.01, 0.02]}),
    "ParaLIF-trb": ("ParaLIF", {"firing": "trb", "tau_mem": 0.002, "tau_syn": None}),
    "SynapticLIF-none": ("SynapticLIF", {"tau_mem": 0.002, "tau_syn": None, "learn_tau": True}),
    "DelayedResetLIF-half": ("DelayedResetLIF", {"beta": 0.5, "v_threshold": 0.5}),
    "RecurrentLIF-relu": ("RecurrentLIF", {"features": C, "feedback": "relu"} | QUICK),
    "RecurrentParaLIF-relu": ("RecurrentParaLIF", {"features": C, "firing": "t", "feedback": "relu"} | QUICK),
}
LENGTH_FIXED = {"PSN", "MaskedPSN", "IPSU", "RPSU"}
LENGTH_LIMITED = {"GLIF"}
STEPLESS = {"PSN": "MaskedPSN", "IPSU": "PSU", "RPSU": "PSU", "RecurrentParaLIF": "RecurrentLIF"}
RECURRENT = {"RecurrentLIF", "RecurrentParaLIF"}
STOCHASTIC = {"SPSN", "ParaLIF", "ParaLIF-trb", "RecurrentParaLIF"}
STEPPERS = [name for name, (kind, _) in VARIANTS.items() if kind not in STEPLESS and name != "MaskedPSN-half"]


def make(variant: str, **other: Any) -> Neuron:
    torch.manual_seed(1)
    kind, arguments = VARIANTS[variant]
    return NEURONS[kind](**{**arguments, **other})


def length(variant: str, steps: int) -> Neuron:
    """The neuron for sequences of another length."""
    return make(variant, **({"T": steps} if "T" in VARIANTS[variant][1] else {}))


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(2)
    return (torch.randn(shape) * 1.5 + 0.5).to(dtype)


def seeded(function: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(3)
    return function()


def run(neuron: nn.Module, x: Tensor, cuts: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """The output and every gradient: of one call, or of a Stream called on chunks that end at `cuts`."""
    x = x.detach().clone().requires_grad_()
    neuron.zero_grad()
    torch.manual_seed(3)
    if cuts is None:
        out = neuron(x)
    else:
        stream = Stream(neuron)
        out = torch.cat([stream(x[a:b]) for a, b in pairwise((0, *cuts, x.shape[0]))])
    torch.manual_seed(4)
    out.backward(torch.randn(out.shape).to(out.dtype))
    assert x.grad is not None
    results = {"out": out.detach(), "x": x.grad}
    for name, parameter in neuron.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        results[name] = parameter.grad.clone()
    return results
