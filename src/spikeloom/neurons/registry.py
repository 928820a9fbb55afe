"""Neurons by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from spikeloom.errors import UsageError
from spikeloom.neurons.base import Neuron, make_neuron
from spikeloom.neurons.delayed_reset import DelayedResetLIF
from spikeloom.neurons.glif import GLIF
from spikeloom.neurons.lif import IF, KLIF, LIF, MLF, PLIF
from spikeloom.neurons.paralif import LeakyIntegrator, ParaLIF, SynapticLIF
from spikeloom.neurons.psn import PSN, MaskedPSN, SlidingPSN
from spikeloom.neurons.psu import IPSU, PSU, RPSU, SPSN
from spikeloom.neurons.recurrent import RecurrentLIF, RecurrentParaLIF
from spikeloom.registry import Registry
from spikeloom.surrogates import SURROGATES

NEURONS: Registry[type[Neuron]] = Registry("neuron")
"""Classes of neurons, by the names of `neuron.name`."""
for _neuron in (
    IF,
    LIF,
    PLIF,
    MLF,
    PSN,
    MaskedPSN,
    SlidingPSN,
    PSU,
    IPSU,
    RPSU,
    SPSN,
    KLIF,
    GLIF,
    ParaLIF,
    SynapticLIF,
    RecurrentLIF,
    RecurrentParaLIF,
    LeakyIntegrator,
    DelayedResetLIF,
):
    NEURONS.register(_neuron)


def make_factory(name: str, options: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Makes the neurons of a name; a wrong constant is an error now, not in the middle of a model.

    Args:
        name: in `NEURONS`.
        options: of its constructor; a surrogate is a name, or `{"name": ..., ...}` with its options.

    Raises:
        UsageError: unknown names, or constants that a neuron or a surrogate cannot have.
    """
    options = dict(options)
    if isinstance(given := options.get("surrogate"), dict | str):
        surrogate: dict[str, Any] = {"name": given} if isinstance(given, str) else dict(given)
        kind = str(surrogate.pop("name", ""))
        try:
            options["surrogate"] = SURROGATES[kind](**surrogate)
        except (TypeError, ValueError) as error:
            raise UsageError(f"neuron {name}: surrogate {kind}: {error}") from None
    factory = functools.partial(NEURONS[name], **options)
    try:
        make_neuron(factory, 1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"neuron {name}: {error}") from None
    return factory
