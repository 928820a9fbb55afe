"""A small spiking network for CIFAR-10 that learns in an hour on two cores; the parts are the documents'.

    stem     Conv3x3 - BN - SN                                  the encoder: it alone receives real numbers
    stage    Conv3x3 - MaxPool - BN - SN,  U the membrane input
             Conv3x3 - BN, + U, SN                              a membrane shortcut (Hu et al. 2024, MS-ResNet)
    head     mean over positions - Linear

Every convolution behind the stem receives spikes. The neuron is the course report's, LIF without input decay, with a
triangular surrogate.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.encode import as_sequence
from spikeloom.layers import Conv2d, GlobalAvgPool, Linear, MaxPool2d, NormSpike
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LIF
from spikeloom.surrogates import Triangle


def cifar10_lif() -> LIF:
    """`U = U / 2 + X`, threshold 1, hard reset, a triangular surrogate."""
    return LIF(tau=2.0, decay_input=False, surrogate=Triangle())
