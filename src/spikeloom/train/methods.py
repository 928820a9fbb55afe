"""How gradients are taken: functions from a model and a batch to logits, with gradients left in `.grad`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from spikeloom.registry import Registry
from spikeloom.train.losses import Loss

METHODS: Registry[Callable[..., Tensor]] = Registry("training method")


@METHODS.register
def bptt(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Backpropagation through time: the whole sequence forward, then backward.

    Args:
        model: [N, ...] or [T, N, ...] to logits [T, N, classes].
        x, y: a batch and its labels [N].
        loss: (logits, y) to a scalar.

    Returns:
        The logits [T, N, classes], detached; gradients are added to the parameters' `.grad`.
    """
    logits = model(x)
    loss(logits, y).backward()
    return logits.detach()
