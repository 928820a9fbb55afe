"""The network with learned delays in which ParaLIF reaches its highest accuracy on spoken digits (Hammouamri et al.
2024, "Learning Delays in Spiking Neural Networks using Dilated Convolutions with Learnable Spacings")."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.encode import Frames, as_sequence
from spikeloom.layers import DelayedLinear, Dropout, NormSpike
from spikeloom.models.registry import MODELS
from spikeloom.neurons import LeakyIntegrator, ParaLIF
from spikeloom.surrogates import ATan

TAU = 0.32e-3  # seconds: with steps of 10 ms a potential does not outlive its step


class DelayNet(nn.Module):
    """Delayed linear layers with norms, neurons and dropout, and a leaky readout behind the last.

    Shapes: [T, N, ...] (or [N, features], one step repeated) -> T softmax of the readout's potential at every step,
    [T, N, num_classes]: the mean over time, by which loss and class are found, is the sum of the softmax over time.
    """

    dims = 2  # axes of a batch; more are a sequence

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        neuron: Callable[[], nn.Module],
        T: int,
        width: int,
        delays: int,
        dropout: float,
        readout: Callable[[], nn.Module],
    ):
        super().__init__()
        self.T = count("T", T)
        self.layers = nn.Sequential()
        for _ in range(2):
            self.layers.append(DelayedLinear(in_channels, width, delays))
            self.layers.append(NormSpike(width, neuron))
            self.layers.append(Dropout(dropout))
            in_channels = width
        self.layers.append(DelayedLinear(width, num_classes, delays))
        self.layers.append(readout())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2) if x.dim() > self.dims + 1 else x
        return self.T * self.layers(as_sequence(x, self.T, self.dims)).softmax(2)


@MODELS.register
def delay_net(
    in_channels: int = 140,
    num_classes: int = 20,
    neuron: Callable[[], nn.Module] | None = None,
    T: int = Frames(100),
    width: int = 256,
    delays: int = 25,
    dropout: float = 0.4,
    time_step: float = 0.01,
) -> DelayNet:
    """Two hidden layers of 256 with delays of up to 25 steps of 10 ms; ParaLIF-T with an ATan of slope 5."""
    neuron = neuron or functools.partial(
        ParaLIF, firing="t", tau_mem=TAU, tau_syn=None, time_step=time_step, surrogate=ATan(5.0)
    )
    readout = functools.partial(LeakyIntegrator, tau_mem=TAU, tau_syn=None, time_step=time_step)
    return DelayNet(in_channels, num_classes, neuron, T, width, delays, dropout, readout)
