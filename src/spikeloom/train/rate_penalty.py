"""A penalty on the firing rates of any network (ParaLIF, accuracy against firing rate)."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.neurons import Neuron
from spikeloom.stream import recomputing
from spikeloom.train.losses import Loss


class RatePenalty:
    """A loss with a penalty on firing rates added, of a model that is called between; used as a context.

        L + weight mean_l r_l,   or with a target   L + weight mean_l (r_l - target)^2

    r_l is the mean output of neuron layer l over steps, images and neurons; its gradient is that of the spikes, by
    the surrogates. Norm and neuron are computed one after the other here, because their spikes are looked at.

    Args:
        model: the bare model; the outputs of its neurons are held from each forward pass in training.
        loss: of a batch.
        weight: of the penalty.
        target: rate that every layer is drawn to, in spikes per neuron and step; None draws to silence.
    """

    def __init__(self, model: nn.Module, loss: Loss, weight: float, target: float | None):
        self._loss, self._weight, self._target = loss, weight, target
        self._layers = [m for m in model.modules() if isinstance(m, Neuron) and m.fires]
        self._rates: list[Tensor] = []
        self._handles: list[Any] = []
        self._sum, self._count = 0.0, 0

    def __enter__(self) -> RatePenalty:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and not recomputing():
                self._rates.append(output.mean(dtype=torch.float32))

        self._handles = [layer.register_forward_hook(keep) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._rates.clear()

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        rates = torch.stack(self._rates)
        self._rates.clear()
        self._sum, self._count = self._sum + float(rates.detach().mean()), self._count + 1
        penalty = rates.mean() if self._target is None else (rates - self._target).square().mean()
        return self._loss(logits, y) + self._weight * penalty

    def take(self) -> float:
        """The mean firing rate over the layers, since it was last asked for."""
        mean, self._sum, self._count = self._sum / max(self._count, 1), 0.0, 0
        return mean
