"""Settings that a run does not begin with: they mean nothing, or were asked for and would have no effect.

Runs that are there are opened whatever they hold, and recipes may carry settings for other budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.train.settings import TrainSettings

# What has an effect only with some values of another setting.
_NEEDS = {
    "milestones": ("schedule", ("step",)),
    "gamma": ("schedule", ("step",)),
    "min_lr": ("schedule", ("cosine", "linear", "one_cycle")),
    "cooldown_epochs": ("schedule", ("cosine", "linear")),
    "momentum": ("optimizer", ("sgd",)),
}


def check_beginning(t: TrainSettings, asked: Mapping[str, Any], where: str) -> None:
    """Refuses what a run cannot mean.

    Args:
        t: the settings of its training.
        asked: those of `train` that the user gave, beside a recipe.
        where: where they stand, for messages.

    Raises:
        UsageError: one line with the key, what is wrong and what it needs.
    """
    if any(m < 0 for m in t.milestones) or any(a >= b for a, b in zip(t.milestones, t.milestones[1:], strict=False)):
        raise UsageError(f"{where}: train.milestones must rise, from 0 epochs on, got {t.milestones}")
    if t.schedule in _NEEDS["cooldown_epochs"][1] and t.cooldown_epochs >= t.epochs:
        raise UsageError(
            f"{where}: train.cooldown_epochs must be below train.epochs, which is {t.epochs}, got {t.cooldown_epochs}"
        )
    given = {key for key, value in asked.items() if value not in (0, None, "none", [])}  # the others ask for nothing
    for key, (other, kinds) in _NEEDS.items():
        if key in given and getattr(t, other) not in kinds:
            raise UsageError(
                f"{where}: train.{key} needs train.{other}={' or '.join(kinds)}, which is {getattr(t, other)} here"
            )
    if "schedule" in given and t.schedule == "step" and not t.milestones:
        raise UsageError(f"{where}: train.schedule=step needs train.milestones, such as train.milestones=[10.0,15.0]")
    if "warmup_lr" in given and not t.warmup_epochs:
        raise UsageError(f"{where}: train.warmup_lr needs train.warmup_epochs above 0")
    if "warmup_epochs" in given and t.warmup_epochs > t.epochs:
        raise UsageError(
            f"{where}: train.warmup_epochs must be at most train.epochs, which is {t.epochs}, got {t.warmup_epochs}"
        )
