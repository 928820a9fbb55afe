"""Neuron layers: modules that hold parameters; their equations are in `spikeloom.ops`."""

from spikeloom.neurons.base import Neuron
from spikeloom.neurons.if_lif import IF, LIF, PLIF
from spikeloom.registry import Registry

NEURONS: Registry[type[Neuron]] = Registry("neuron")
for _neuron in (IF, LIF, PLIF):
    NEURONS.register(_neuron)

__all__ = ["IF", "LIF", "NEURONS", "PLIF", "Neuron"]
