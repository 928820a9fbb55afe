"""Constants of snnTorch's neurons, which its state dicts hold, compared with those of a model."""

from __future__ import annotations

import math

from torch import nn

from spikeloom.errors import UsageError
from spikeloom.models.weight_source import Layer
from spikeloom.neurons import IF, LIF, DelayedResetLIF, Neuron

_RESETS = ("subtract", "zero", "none")
_OTHERS = {"subtract": "DelayedResetLIF(beta={beta:g}, v_threshold={threshold:g})"}
_OTHERS["zero"] = "LIF(tau={tau:g}, decay_input=False, v_threshold={threshold:g}, strict=True)"
_OTHERS["none"] = "a readout without spikes, LeakyIntegrator"


def is_neuron(layer: Layer) -> bool:
    """Whether a layer is a neuron of snnTorch."""
    return "reset_mechanism_val" in layer.tensors


def check_neurons(layers: list[Layer], model: nn.Module) -> None:
    """Compares decay, threshold and reset of snnTorch's neurons with those of a model's, in their order.

    Raises:
        UsageError: another number of neurons, another neuron, or constants that differ within a layer.
    """
    ours = [(name, module) for name, module in model.named_modules() if isinstance(module, Neuron)]
    if len(ours) != len(layers):
        raise UsageError(f"the source has {len(layers)} layers of snnTorch's neurons, the model {len(ours)}")
    for layer, (name, neuron) in zip(layers, ours, strict=True):
        reset = _RESETS[int(layer.tensors["reset_mechanism_val"])]
        betas, thresholds = layer.tensors.get("beta"), layer.tensors.get("threshold")
        if (
            betas is None
            or thresholds is None
            or betas.numel() != 1
            or thresholds.numel() != 1
            or len(layer.tensors) != 4
        ):
            raise UsageError(f"{layer.name} of the source is no Leaky with one beta and one threshold")
        beta, threshold = min(max(float(betas), 0.0), 1.0), float(thresholds)
        if float(layer.tensors["graded_spikes_factor"]) != 1.0:
            raise UsageError(f"{layer.name} of the source has graded spikes, which have no equal here")
        if not _equal((reset, beta, threshold), _described(neuron)):
            tau = math.inf if beta == 1 else 1 / (1 - beta)
            wanted = _OTHERS[reset].format(beta=beta, threshold=threshold, tau=tau)
            raise UsageError(
                f"{layer.name} of the source is Leaky(beta={beta:g}, threshold={threshold:g}, "
                f"reset_mechanism={reset!r}), and {name} of the model is {neuron}: make it {wanted}"
            )


def _described(neuron: Neuron) -> tuple[str, float, float] | None:
    """Reset, decay and threshold in snnTorch's words; None of a neuron that it does not have."""
    if isinstance(neuron, DelayedResetLIF):
        return "subtract", neuron.beta, neuron.v_threshold
    if type(neuron) not in (IF, LIF) or not isinstance(neuron, IF | LIF) or neuron.v_reset != 0 or not neuron.strict:
        return None
    decay, gain = neuron.charge()
    threshold = neuron.v_threshold
    return ("zero", decay, threshold) if gain == 1 and isinstance(threshold, float) else None


def _equal(a: tuple[str, float, float], b: tuple[str, float, float] | None) -> bool:
    return (
        b is not None
        and a[0] == b[0]
        and all(math.isclose(p, q, rel_tol=1e-6) for p, q in zip(a[1:], b[1:], strict=True))
    )
