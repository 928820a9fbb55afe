"""Models by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from spikeloom.checks import count
from spikeloom.errors import UsageError
from spikeloom.files import PathLike
from spikeloom.models.trained_weights import build_trained, read_weights
from spikeloom.neurons.base import check_factory
from spikeloom.registry import Registry, nearest

MODELS: Registry[Callable[..., nn.Module]] = Registry("model")
"""Builders of networks, by the names that `create_model` takes."""


def create_model(name: str, *, weights: PathLike | None = None, **overrides: Any) -> nn.Module:
    """Builds a registered model, with random weights or trained ones.

    Args:
        name: one of `list_models()`.
        weights: the task of one of `list_weights()`, such as "cifar10"; a file or the folder of a run; or
            "hf-hub:owner/name", a repository of the Hugging Face Hub. The model is then made as it was trained, and
            in eval mode.
        overrides: arguments of its builder; all take `in_channels`, `num_classes`, `neuron` (a factory) and `T`,
            the number of times a static image is repeated.

    Returns:
        A module from [N, C, H, W] or [T, N, C, H, W] to logits per step [T, N, num_classes]. Networks for events, whose
        T is `encode.Frames` by default, take images only where a T is given.

    Raises:
        UsageError: unknown name or argument, with the nearest known ones; a neuron that is no factory; T = 0; no such
            weights.
        DataFileError: weights that are damaged, of another model or of other shapes.
        ValueError: another value that the network cannot have.
    """
    builder = MODELS[name]
    known = inspect.signature(builder).parameters
    for key in overrides:
        if key not in known:
            raise UsageError(f"model {name} has no argument {key!r}; {nearest(key, known)}")
    if "neuron" in overrides:
        check_factory(overrides["neuron"])
    for key in overrides.keys() & {"T", "in_channels", "num_classes"}:
        try:
            count(key, overrides[key])
        except ValueError as error:
            raise UsageError(f"model {name}: {error}") from None
    if weights is not None:
        return build_trained(name, builder, read_weights(name, weights), overrides)
    return builder(**overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted."""
    return MODELS.names(pattern)
