"""The optimiser and its learning rate, a function of the step alone: there is no state of a schedule to save."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import nn

from spikeloom.train.settings import TrainSettings

Json = dict[str, Any]


class Schedule(Protocol):
    """Sets the learning rate for a step, counted from 0 over the whole run."""

    def step_update(self, num_updates: int, /) -> None: ...


class OneCycle:
    """One rise and one fall of the learning rate, momentum the other way round (Smith and Topin 2018).

    Both are half cosines: from lr / 25 to lr while the momentum falls from its value to 0.85 / 0.95 of it, and back to
    `min_lr`. Adam's first beta stands for the momentum.

    Args:
        settings: `lr`, `warmup_epochs` (the way up), `warmup_lr`, `min_lr`, `epochs`.
        optimizer: whose groups are set.
        steps_per_epoch: optimiser steps.
    """

    def __init__(self, settings: TrainSettings, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
        self._optimizer = optimizer
        self._total = settings.epochs * steps_per_epoch
        self._rise = min(settings.warmup_epochs * steps_per_epoch, self._total - 1)
        start = settings.lr / 25 if settings.warmup_lr is None else settings.warmup_lr
        self._lr = (start, settings.lr, settings.min_lr)
        self._momentum = settings.momentum

    def step_update(self, step: int) -> None:
        start, top, end = self._lr
        if step < self._rise:
            height = _half_cosine(step / self._rise)
            lr = start + (top - start) * height
        else:
            height = 1 - _half_cosine((step - self._rise) / max(self._total - self._rise, 1))
            lr = end + (top - end) * height
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # the key is timm's, whose schedules know it too
            fall = 1 - (1 - 0.85 / 0.95) * height
            if "momentum" in group:
                group["momentum"] = fall * self._momentum
            else:
                first, second = self._optimizer.defaults["betas"]
                group["betas"] = (fall * first, second)


def _half_cosine(part: float) -> float:
    """From 0 at 0 to 1 at 1."""
    return (1 - math.cos(math.pi * part)) / 2


def build_optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a model's parameters, in groups of one learning rate and weight decay each."""
    scale = settings.norm_bias_lr_scale
    biases = set() if scale is None else {id(p) for p in norm_biases(model)}
    groups: dict[tuple[bool, bool], Json] = {}
    for p in model.parameters():
        fast, spared = id(p) in biases, not settings.decay_all and p.dim() <= 1
        group = groups.setdefault((fast, spared), {"params": []})
        group["params"].append(p)
        if fast and scale is not None:
            # A step takes lr x weight_decay off each weight: of these as much as of all others.
            group |= {"lr_scale": scale, "weight_decay": settings.weight_decay / scale}
        if spared:
            group["weight_decay"] = 0.0
    parameters = [groups[key] for key in sorted(groups)]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}
    return kinds[settings.optimizer](parameters, settings.lr, weight_decay=settings.weight_decay)


def norm_biases(model: nn.Module) -> list[nn.Parameter]:
    """The biases of what scales and shifts each channel."""
    found: list[nn.Parameter] = []
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.shape == bias.shape:
            found.append(bias)
    return found


def build_schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule:
    """The schedule of the learning rate."""
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from timm.scheduler.multistep_lr import MultiStepLRScheduler
    from timm.scheduler.poly_lr import PolyLRScheduler

    if settings.schedule == "one_cycle":
        return OneCycle(settings, optimizer, steps_per_epoch)
    total = settings.epochs * steps_per_epoch
    common: Json = {
        "warmup_t": min(round(settings.warmup_epochs * steps_per_epoch), total - 1),
        "warmup_lr_init": settings.lr / 100 if settings.warmup_lr is None else settings.warmup_lr,
        "t_in_epochs": False,
    }
    falling = max(total - round(settings.cooldown_epochs * steps_per_epoch), 1)
    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=falling, lr_min=settings.min_lr, **common)
    if settings.schedule == "linear":
        # From the end of the warm-up to min_lr at the end of the run.
        fall = max(falling - common["warmup_t"], 1)
        return PolyLRScheduler(
            optimizer, t_initial=fall, power=1.0, lr_min=settings.min_lr, warmup_prefix=True, **common
        )
    milestones = settings.milestones if settings.schedule == "step" else []
    # Without milestones the rate is constant: one lies behind the end.
    # timm counts the step that is about to end, hence the 1.
    decay = [round(m * steps_per_epoch) + 1 for m in milestones] or [total + 2]
    return MultiStepLRScheduler(optimizer, decay_t=decay, decay_rate=settings.gamma, **common)
