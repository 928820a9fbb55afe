"""Neuron layers: modules that hold parameters; their equations are in `spikeloom.ops`."""

from spikeloom.neurons.base import Neuron, make_neuron
from spikeloom.neurons.delayed_reset import DelayedResetLIF
from spikeloom.neurons.glif import GLIF
from spikeloom.neurons.lif import IF, KLIF, LIF, MLF, PLIF
from spikeloom.neurons.paralif import LeakyIntegrator, ParaLIF, SynapticLIF
from spikeloom.neurons.psn import PSN, MaskedPSN, SlidingPSN
from spikeloom.neurons.psu import IPSU, PSU, RPSU, SPSN
from spikeloom.neurons.recurrent import RecurrentLIF, RecurrentParaLIF
from spikeloom.neurons.registry import NEURONS, make_factory

__all__ = [
    "GLIF",
    "IF",
    "IPSU",
    "KLIF",
    "LIF",
    "MLF",
    "NEURONS",
    "PLIF",
    "PSN",
    "PSU",
    "RPSU",
    "SPSN",
    "DelayedResetLIF",
    "LeakyIntegrator",
    "MaskedPSN",
    "Neuron",
    "ParaLIF",
    "RecurrentLIF",
    "RecurrentParaLIF",
    "SlidingPSN",
    "SynapticLIF",
    "make_factory",
    "make_neuron",
]
