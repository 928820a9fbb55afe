"""A penalty on the firing rates of any network (ParaLIF, accuracy against firing rate)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.neurons import Neuron
from spikeloom.stream import recomputing
from spikeloom.train.hooked_loss import HookedLoss
from spikeloom.train.losses import Loss


class RatePenalty(HookedLoss):
    """A loss with a penalty on firing rates added; `take` gives the mean firing rate over the layers.

        L + weight mean_l r_l,   or with a target   L + weight mean_l (r_l - target)^2

    r_l is the mean output of neuron layer l over steps, images and neurons; its gradient is that of the spikes, by
    the surrogates. Norm and neuron are computed one after the other here, because their spikes are looked at.

    Args:
        model: the bare model; the rates of its neurons are held from each forward pass in training.
        loss: of a batch.
        weight: of the penalty.
        target: rate that every layer is drawn to, in spikes per neuron and step; None draws to silence.

    Raises:
        UsageError: no layer of the model fires.
    """

    def __init__(self, model: nn.Module, loss: Loss, weight: float, target: float | None):
        super().__init__(loss)
        self._weight, self._target = weight, target
        self._layers = [m for m in model.modules() if isinstance(m, Neuron) and m.fires]
        self._rates: list[Tensor] = []
        if not self._layers:
            raise UsageError(f"train.rate_penalty needs neurons that fire, and {type(model).__name__} has none")

    def _hooks(self) -> list[Any]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled() and not recomputing():
                self._rates.append(output.mean(dtype=torch.float32))

        self._rates.clear()  # of a step that was broken off
        return [layer.register_forward_hook(keep) for layer in self._layers]

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        rates = torch.stack(self._rates)
        self._rates.clear()
        self._note(rates.mean())
        penalty = rates.mean() if self._target is None else (rates - self._target).square().mean()
        return self._loss(logits, y) + self._weight * penalty
