"""Losses on logits per step [T, N, classes] and labels [N], or weights of classes [N, classes]; each is a scalar.

Penalties, which compare environments, are here as equations; `train.environments` adds them to a loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from spikeloom.errors import UsageError
from spikeloom.registry import Registry

if TYPE_CHECKING:
    from spikeloom.train.settings import TrainSettings

Loss = Callable[[Tensor, Tensor], Tensor]
# Limits of options, which settings are checked against.
Smoothing = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

LOSSES: Registry[Callable[..., Tensor]] = Registry("loss")
# Means over steps of a loss of each step: those that can be taken one step at a time.
PER_STEP = {"tet", "reconstruction"}


@LOSSES.register
def sdt(logits: Tensor, y: Tensor, label_smoothing: Smoothing = 0.0, class_weights: Tensor | None = None) -> Tensor:
    """Standard direct training: cross-entropy of the time-mean of the logits (Deng et al. 2022, TET, Eq. 5).

    Args:
        logits: [T, N, classes].
        y: labels [N].
        label_smoothing: eps of `(1 - eps) onehot + eps / classes`, from 0 and below 1.
        class_weights: [classes], of each sample by its class; the mean is divided by their sum.
    """
    return F.cross_entropy(logits.mean(0), y, class_weights, label_smoothing=label_smoothing)


@LOSSES.register
def tet(
    logits: Tensor,
    y: Tensor,
    lam: Share = 0.0,
    target: float | Literal["onehot"] = 1.0,
    label_smoothing: Smoothing = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Temporal efficient training: the mean of every step's cross-entropy (Deng et al. 2022, TET, Eqs. 9-13).

    Args:
        logits: [T, N, classes].
        y: labels [N].
        lam: weight, from 0 to 1, of the regulariser, the mean square of `logits - target`; the loss has weight
            `1 - lam`.
        target: the regulariser's constant, the same for every class; or "onehot" for the labels (SLTT on DVS-CIFAR10).
        label_smoothing, class_weights: as `sdt`; these are of the cross-entropy.
    """
    labels = torch.cat([y] * logits.shape[0])
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels, class_weights, label_smoothing=label_smoothing)
    if lam == 0:
        return cross_entropy
    aim = _onehot(logits, y) if target == "onehot" else target
    return (1 - lam) * cross_entropy + lam * (logits - aim).square().mean()


@LOSSES.register
def reconstruction(logits: Tensor, y: Tensor) -> Tensor:
    """The mean square of what a masked autoencoder gives: its error at the hidden patches (Spikformer V2, Sec. 4.2).

    Args:
        logits: prediction minus target, of any shape.
        y: labels, which play no part.
    """
    return logits.square().mean()


@LOSSES.register
def mse_onehot(
    logits: Tensor, y: Tensor, label_smoothing: Smoothing = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """The mean square of the time-mean of the logits minus the one-hot label (SynA).

    Args:
        logits: [T, N, classes].
        y: labels [N].
        label_smoothing, class_weights: as `sdt`.
    """
    onehot = _onehot(logits, y)
    aim = (1 - label_smoothing) * onehot + label_smoothing / logits.shape[-1]
    errors = (logits.mean(0) - aim).square()
    if class_weights is None:
        return errors.mean()
    weights = onehot @ class_weights.to(onehot)
    return (errors.mean(1) * weights).sum() / weights.sum()


def class_weights(t: TrainSettings, train_set: Any) -> Tensor | None:
    """The weights [classes] that `train.class_weights` gives the classes of a data set.

    "balanced" gives `samples / (classes x samples of the class)`: the classes together weigh as many samples as there
    are, each the same.

    Raises:
        UsageError: another number of weights than classes, weights that are not positive, a class without a sample, or
            a loss that takes no such weights.
    """
    wanted, classes = t.class_weights, len(train_set.classes)
    if wanted is None:
        return None
    if "class_weights" not in inspect.signature(LOSSES[t.loss.name]).parameters:
        raise UsageError(f"train.class_weights: the loss {t.loss.name} takes no weights of classes; leave it out")
    if wanted != "balanced":
        if len(wanted) != classes or min(wanted, default=0) <= 0:
            raise UsageError(
                f"train.class_weights must be {classes} numbers above 0, one for each class of {train_set.title}, or "
                f"balanced; got {wanted}"
            )
        return torch.tensor(wanted)
    counts = torch.bincount(torch.as_tensor(train_set.labels), minlength=classes)
    if not counts.all():
        empty = train_set.classes[int(counts.argmin())]
        raise UsageError(f"train.class_weights=balanced: {train_set.title} has no sample of class {empty!r}")
    return len(train_set.labels) / (classes * counts.float())


@LOSSES.register
def ce_count(logits: Tensor, y: Tensor, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Cross-entropy of the sum over time, of spikes their counts (snnTorch's `ce_count_loss`).

    Args:
        logits: spikes [T, N, classes], or anything else that adds up.
        y: labels [N].
        label_smoothing: as `sdt`.
    """
    return F.cross_entropy(logits.sum(0), y, label_smoothing=label_smoothing)


@LOSSES.register
def mse_count(logits: Tensor, y: Tensor, correct_rate: Share = 1.0, incorrect_rate: Share = 0.0) -> Tensor:
    """The mean square of spike counts minus their targets, over T (SLAYER; snnTorch's `mse_count_loss`).

    Args:
        logits: spikes [T, N, classes].
        y: labels [N].
        correct_rate, incorrect_rate: spikes per step of the label's class, and of all others; targets are the whole
            numbers of spikes not above them.
    """
    steps, aim = logits.shape[0], _onehot(logits, y)
    on, off = int(steps * correct_rate), int(steps * incorrect_rate)
    return (logits.sum(0) - off - (on - off) * aim).square().mean() / steps


def _onehot(logits: Tensor, y: Tensor) -> Tensor:
    return y.to(logits) if y.is_floating_point() else F.one_hot(y, logits.shape[-1]).to(logits)


def irm(logits: Tensor, y: Tensor, estimator: Literal["square", "halves"] = "halves") -> Tensor:
    """The penalty of invariant risk minimisation in one environment (Arjovsky et al. 2019; course report, Eq. 10).

        || d/dw CE(w z, y) at w = 1 ||^2,   d/dw CE = mean_n (softmax(z_n) . z_n - z_n[y]),   z the mean over time

    Args:
        logits: [T, N, classes] of one environment.
        y: labels [N].
        estimator: "square" of the whole batch's gradient; or the product of those of even and odd samples ("halves"),
            whose mean over batches is the square of the population's gradient: it may be negative.

    Raises:
        UsageError: a single sample, of which there are no halves.
    """
    z = logits.mean(0)
    slopes = (z.softmax(1) * z).sum(1) - z.gather(1, y[:, None])[:, 0]
    if estimator == "square":
        return slopes.mean().square()
    if len(slopes) < 2:
        raise UsageError(
            "irm with estimator 'halves' needs at least 2 samples of every environment in a batch, got 1: "
            "raise train.batch_size"
        )
    return slopes[::2].mean() * slopes[1::2].mean()


def spike_similarity(first: Tensor, second: Tensor, axis: Literal["sample", "batch"] = "sample") -> Tensor:
    """The mean cosine of the spike sequences of two environments, in [0, 1] (course report, Eq. 7).

    A silent sequence is similar to none (0) and has no gradient.

    Args:
        first, second: spikes [T, N, features], sample n against sample n.
        axis: a sequence is all steps and features of a "sample"; or one feature at one step over the "batch".
    """
    axes = (0, 2) if axis == "sample" else (1,)
    norms = torch.linalg.vector_norm(first, dim=axes) * torch.linalg.vector_norm(second, dim=axes)
    # Zero norms are masked, not raised to a small number: by that number their gradient would be divided.
    return ((first * second).sum(axes) * torch.where(norms > 0, 1 / norms.clamp_min(1e-8), 0.0)).mean()
