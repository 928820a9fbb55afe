"""Losses on logits per step [T, N, classes] and labels [N], or weights of classes [N, classes]; each is a scalar."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss")


@LOSSES.register
def sdt(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Standard direct training: cross-entropy of the time-mean of the logits (Deng et al. 2022, TET, Eq. 5).

    Args:
        logits: [T, N, classes].
        y: labels [N].
        label_smoothing: eps of `(1 - eps) onehot + eps / classes`.
    """
    return F.cross_entropy(logits.mean(0), y, label_smoothing=label_smoothing)


@LOSSES.register
def tet(logits: Tensor, y: Tensor, lam: float = 0.0, target: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """Temporal efficient training: the mean of every step's cross-entropy (Deng et al. 2022, TET, Eqs. 9-13).

    Args:
        logits: [T, N, classes].
        y: labels [N].
        lam: weight of the regulariser, the mean square of `logits - target`; the loss has weight `1 - lam`.
        target: the regulariser's constant, the same for every class.
        label_smoothing: as `sdt`.
    """
    steps = logits.shape[0]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), torch.cat([y] * steps), label_smoothing=label_smoothing)
    if lam == 0:
        return cross_entropy
    return (1 - lam) * cross_entropy + lam * (logits - target).square().mean()


@LOSSES.register
def reconstruction(logits: Tensor, y: Tensor) -> Tensor:
    """The mean square of what a masked autoencoder gives: its error at the hidden patches (Spikformer V2, Sec. 4.2).

    Args:
        logits: prediction minus target, of any shape.
        y: labels, which play no part.
    """
    return logits.square().mean()
