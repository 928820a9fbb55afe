"""Networks of the ParaLIF paper (Yarga and Wood 2024, Sec. 3.5): fully connected, with a leaky readout.

Feed-forward ones have two or three hidden layers of 128, recurrent ones a single layer. Weights are Kaiming-uniform,
fan-in, biases 0. The loss is cross-entropy on the time-mean of the readout's potential.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from spikeloom.encode import Frames
from spikeloom.models.psu import FullyConnected
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LeakyIntegrator, ParaLIF, RecurrentParaLIF


def _network(
    widths: tuple[int, ...],
    recurrent_width: int,
    in_channels: int,
    num_classes: int,
    neuron: Callable[[], nn.Module] | None,
    T: int,
    recurrent: bool,
    time_step: float,
) -> FullyConnected:
    if neuron is None:
        kind = RecurrentParaLIF if recurrent else ParaLIF
        neuron = functools.partial(kind, firing="gs", time_step=time_step)
    readout = functools.partial(LeakyIntegrator, time_step=time_step)
    model = FullyConnected((recurrent_width,) if recurrent else widths, in_channels, num_classes, neuron, T, readout)
    for module in model.layers:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return model


@MODELS.register
def paralif_shd(
    in_channels: int = 700,
    num_classes: int = 20,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = Frames(1000),
    recurrent: bool = False,
    time_step: float = 1e-3,
) -> FullyConnected:
    """SHD, 1 ms steps: 3 x 128, or recurrent 1 x 256."""
    return _network((128, 128, 128), 256, in_channels, num_classes, neuron, T, recurrent, time_step)


@MODELS.register
def paralif_ntidigits(
    in_channels: int = 64,
    num_classes: int = 11,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = Frames(1000),
    recurrent: bool = False,
    time_step: float = 1e-3,
) -> FullyConnected:
    """N-TIDIGITS, 1 ms steps: 3 x 128, or recurrent 1 x 256 (the paper's choice)."""
    return _network((128, 128, 128), 256, in_channels, num_classes, neuron, T, recurrent, time_step)


@MODELS.register
def paralif_nmnist(
    in_channels: int = 1 * 34 * 34,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = Frames(60),
    recurrent: bool = False,
    time_step: float = 5e-3,
) -> FullyConnected:
    """N-MNIST, one polarity, 5 ms steps: 2 x 128, or recurrent 1 x 128."""
    return _network((128, 128), 128, in_channels, num_classes, neuron, T, recurrent, time_step)


@MODELS.register
def paralif_gesture(
    in_channels: int = 2 * 64 * 64,
    num_classes: int = 10,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = Frames(300),
    recurrent: bool = False,
    time_step: float = 5e-3,
) -> FullyConnected:
    """DVS Gesture at 64x64, without the class "other", 5 ms steps: 2 x 128, or recurrent 1 x 128."""
    return _network((128, 128), 128, in_channels, num_classes, neuron, T, recurrent, time_step)
