"""Training over several environments: their shares of a batch, penalties on their differences, and what is reported.

A data set with `environments` > 1 holds them one after another. Each micro-batch then has an equal share of each, one
after another too, so that a penalty finds its environments by position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.registry import Registry
from spikeloom.train.hooked_loss import HookedLoss
from spikeloom.train.losses import Loss, irm, spike_similarity

Json = dict[str, Any]


class Share(NamedTuple):
    """One environment's part of a batch.

    Attributes:
        logits: [T, n, classes].
        y: labels [n].
        taps: inputs [T, n, features] of the model's linear layers, from first to last.
    """

    logits: Tensor
    y: Tensor
    taps: list[Tensor]


PENALTIES: Registry[Callable[..., Tensor]] = Registry("penalty")


@PENALTIES.named("irm")
def irm_penalty(shares: list[Share], estimator: Literal["square", "halves"] = "halves") -> Tensor:
    """The mean over environments of `losses.irm`: the loss being their mean as well, half of the report's Eq. 10."""
    return torch.stack([irm(share.logits, share.y, estimator) for share in shares]).mean()


@PENALTIES.named("spike_similarity")
def similarity_penalty(
    shares: list[Share],
    tap: Literal["before_last_linear", "before_linears"] = "before_last_linear",
    axis: Literal["sample", "batch"] = "sample",
    pair: Literal["order", "label"] = "order",
) -> Tensor:
    """`1 - losses.spike_similarity` of the spikes of two environments (course report, Eqs. 7 and 11, figure 4).

    Args:
        shares: two, of one size.
        tap: the spikes that enter the last linear layer (Similarity1), or the first (Similarity2).
        axis: as `losses.spike_similarity`.
        pair: sample n of one environment with sample n of the other, in the order of the batch; or both sorted by
            label first.
    """
    index = -1 if tap == "before_last_linear" else 0
    spikes = [share.taps[index] for share in shares]
    if pair == "label":
        spikes = [s[:, share.y.argsort(stable=True)] for s, share in zip(spikes, shares, strict=True)]
    return 1 - spike_similarity(spikes[0], spikes[1], axis)


class Penalised(HookedLoss):
    """A loss with a penalty on environments added; `take` gives the mean penalty, without its weight.

    Args:
        model: the bare model; the inputs of its linear layers are held from each forward pass in training.
        loss: of a batch; the environments' shares being equal, it is their mean.
        penalty: an entry of `PENALTIES` with its options.
        environments: their number.

    Attributes:
        weight: lambda.
    """

    def __init__(self, model: nn.Module, loss: Loss, penalty: Callable[[list[Share]], Tensor], environments: int):
        super().__init__(loss)
        self.weight = 0.0
        self._penalty, self._environments = penalty, environments
        self._layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._inputs: dict[nn.Module, Tensor] = {}

    def _hooks(self) -> list[Any]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self._inputs[module] = inputs[0]

        return [layer.register_forward_pre_hook(keep) for layer in self._layers]

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        taps = [self._inputs.pop(layer) for layer in self._layers]
        shares = [
            Share(z, labels, list(inputs))
            for z, labels, *inputs in zip(
                logits.chunk(self._environments, 1),
                y.chunk(self._environments),
                *(tap.chunk(self._environments, 1) for tap in taps),
                strict=True,
            )
        ]
        penalty = self._penalty(shares)
        self._note(penalty)
        return self._loss(logits, y) + self.weight * penalty


def environment_order(length: int, environments: int, batch: int, shuffle: Callable[[int], Tensor]) -> Tensor:
    """The order of an epoch's images: every `batch` in a row has an equal share of each environment, one by one.

    Args:
        length: images in all; those of an environment that fill no share are left out.
        environments: their number.
        batch: images of a micro-batch.
        shuffle: gives a permutation of so many images; asked once for each environment.

    Raises:
        UsageError: a batch that has no equal shares.
    """
    if batch % environments:
        raise UsageError(
            f"train.batch_size must be a multiple of {environments}, the number of environments, got {batch}"
        )
    per, share = length // environments, batch // environments
    whole = per // share * share
    orders = [shuffle(per)[:whole] + index * per for index in range(environments)]
    return torch.stack([order.view(-1, share) for order in orders], 1).flatten()


def select_epoch(records: list[Json], above: float = 70.0) -> Json | None:
    """The record of the epoch in the course report's table 3, which its authors chose with a look at the test.

    Among the epochs in which the mean of the environments' training accuracies exceeds `above` percent, that of the
    highest test accuracy, the first of equals; None if there is none.
    """
    kept = [record for record in records if sum(train_accuracies(record)) > above * len(train_accuracies(record))]
    return max(kept, key=lambda record: record["test_accuracy"], default=None)


def train_accuracies(record: Json) -> list[float]:
    """The accuracies of an epoch's record on each training environment, none for other data."""
    return [record[f"train{n}_accuracy"] for n in range(1, len(record)) if f"train{n}_accuracy" in record]
