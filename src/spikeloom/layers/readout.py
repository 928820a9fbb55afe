"""What stands behind the last layer: sums of populations, the maximum over time."""

from __future__ import annotations

from torch import Tensor, nn

from spikeloom.checks import count
from spikeloom.layers.stateless import check_axes


class PopulationSum(nn.Module):
    """A population code: the outputs of a class, which lie side by side, are added up.

    Args:
        classes: how many; the outputs are a multiple.

    Shapes: [T, N, outputs] -> [T, N, classes].

    Raises:
        ValueError: the outputs do not divide among the classes.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.classes = count("classes", classes)

    def forward(self, x: Tensor) -> Tensor:
        x = check_axes(self, x, 3)
        if x.shape[2] % self.classes:
            raise ValueError(f"{x.shape[2]} outputs do not divide among {self.classes} classes: make them a multiple")
        return x.unflatten(2, (self.classes, -1)).sum(3)

    def extra_repr(self) -> str:
        return f"classes={self.classes}"


class MaxOverSteps(nn.Module):
    """The maximum over time as the only step: the readout of membranes by their highest potential (SpyTorch).

    Losses and accuracies of the mean over time are then of the maximum. It needs whole sequences: under a `Stream` it
    is the maximum of one call.

    Shapes: [T, N, ...] -> [1, N, ...].
    """

    def forward(self, x: Tensor) -> Tensor:
        return check_axes(self, x, 3, more=True).amax(0, keepdim=True)
