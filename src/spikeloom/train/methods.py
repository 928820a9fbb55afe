"""How gradients are taken: functions from a model and a batch to logits, with gradients left in `.grad`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spikeloom.encode import repeat
from spikeloom.errors import UsageError
from spikeloom.registry import Registry
from spikeloom.stream import Stream, detached_steps
from spikeloom.train.losses import Loss

if TYPE_CHECKING:
    from spikeloom.train.settings import TrainSettings

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


@METHODS.register
def sltt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    mode: Literal["online", "multi_step_detached"] = "online",
) -> Tensor:
    """Spatial learning through time: no gradient between steps (Meng et al. 2023, SLTT, Eqs. 8-10).

    Args:
        model, x, y: as `bptt`; a model that repeats a batch T times by itself says so by its attributes `T` and `dims`,
            the axes of a batch.
        loss: a mean of a loss of each step, as `tet` is; online it is given one step at a time, and its sum over the
            steps divided by T. "multi_step_detached" takes any loss.
        mode: "online" takes one step at a time, so that memory does not grow with T; batch statistics, tdBN's too, are
            then those of each step, and running ones are updated at every step. "multi_step_detached" runs all steps
            at once, with statistics over time and memory that grows, and detaches what neurons carry.

    Returns:
        As `bptt`.
    """
    if mode == "multi_step_detached":
        with detached_steps():
            return bptt(model, x, y, loss)
    steps = _steps(model, x, y)
    return _online(model, steps, y, loss, range(len(steps)))


@METHODS.register
def sltt_k(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, k: Annotated[int, Field(ge=1)] = 4) -> Tensor:
    """SLTT with gradients at K of the T steps only, drawn anew each time (Meng et al. 2023, SLTT-K, Sec. 4.4).

    The other steps run forward without a graph. A step's loss keeps the factor 1/T: the mean over draws is K/T times
    the gradient of `sltt`, and k = T is `sltt`.

    Args:
        model, x, y: as `bptt`.
        loss: as `sltt` online; not called for the steps without gradient.
        k: the number of steps, from 1; all where there are no more, as in a stage of `train.steps`.

    Returns:
        As `bptt`, the logits of all steps.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    steps = _steps(model, x, y)
    return _online(model, steps, y, loss, torch.randperm(len(steps))[:k].tolist())


def check_method(settings: TrainSettings, model: nn.Module, dataset: Any) -> None:
    """Refuses an `sltt_k` that learns from more steps than there are.

    Raises:
        UsageError: k is above T.
    """
    k = settings.method.options.get("k")
    if settings.method.name != "sltt_k" or k is None:
        return
    T = len(dataset.encode(dataset.batch([0])[0])) if dataset.is_sequence else getattr(model, "T", None)
    if T is not None and k > T:
        raise UsageError(
            f"train.method.k={k} is above T = {T}, the number of steps: lower it, or use train.method=sltt"
        )


def _online(model: nn.Module, steps: Tensor, y: Tensor, loss: Loss, learning: Collection[int]) -> Tensor:
    """One step after another, each with its own backward pass if it is among the learning ones."""
    stream, logits = Stream(model), list[Tensor]()
    for t, x_t in enumerate(steps):
        # Several processes exchange gradients once, with the last backward pass.
        last = t == max(learning)
        with (
            torch.set_grad_enabled(t in learning),
            contextlib.nullcontext() if last else getattr(model, "no_sync", contextlib.nullcontext)(),
        ):
            output = stream(x_t[None])
            if t in learning:
                (loss(output, y) / len(steps)).backward()
        stream.detach()
        logits.append(output.detach())
    return torch.cat(logits)


def _steps(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """x as a sequence [T, N, ...]: a model that repeats its input (`T`) takes a batch [N, ...] too, of `dims` axes.

    Raises:
        UsageError: a model with `T` but not `dims`, and an input whose first two axes are both as long as the labels.
    """
    model = getattr(model, "module", model)
    T, dims = getattr(model, "T", None), getattr(model, "dims", None)
    if T is None:
        return x
    if dims is None:
        images = [size == len(y) for size in x.shape[:2]]
        if all(images):
            raise UsageError(
                f"the input {tuple(x.shape)} of {len(y)} images may be [N, ...] or [T, N, ...]: say how many axes a "
                f"batch has, by an attribute {type(model).__name__}.dims (4 for [N, C, H, W])"
            )
        return repeat(x, T) if images[0] else x
    return repeat(x, T) if x.dim() == dims else x
