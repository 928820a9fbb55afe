"""Models by name."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any

from torch import nn

from spikeloom.errors import UsageError
from spikeloom.registry import Registry, nearest

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds a registered model.

    Args:
        name: one of `list_models()`.
        overrides: arguments of its builder; all take `in_channels`, `num_classes`, `neuron` (a factory) and `T`,
            the number of times a static image is repeated.

    Returns:
        A module from [N, C, H, W] or [T, N, C, H, W] to logits per step [T, N, num_classes]. Networks for events, whose
        T is `encode.Frames` by default, take images only where a T is given.

    Raises:
        UsageError: unknown name or argument, with the nearest known ones, or a number that is none.
        TypeError: `neuron` is a name or a layer, not what makes layers.
    """
    builder = MODELS[name]
    known = inspect.signature(builder).parameters
    for key in overrides:
        if key not in known:
            raise UsageError(f"model {name} has no argument {key!r}; {nearest(key, known)}")
        if key in ("T", "in_channels", "num_classes") and not _counts(overrides[key]):
            raise UsageError(f"model {name}: {key} must be a whole number from 1, got {overrides[key]!r}")
    return builder(**overrides)


def _counts(value: object) -> bool:
    return isinstance(value, numbers.Integral) and value is not True and int(value) >= 1


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted."""
    return MODELS.names(pattern)
