"""Spikeloom: deep spiking neural networks in PyTorch, trained directly, measured, and run by their spikes.

`import spikeloom` is cheap; what a name needs is imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikeloom import analyse, data, deploy, encode, layers, models, neurons, ops, surrogates, train
    from spikeloom.errors import DataFileError, UsageError
    from spikeloom.memory import keep_memory
    from spikeloom.models import create_model, list_models, list_weights
    from spikeloom.ops import backend
    from spikeloom.record import Recorder, summary
    from spikeloom.registry import Registry
    from spikeloom.stream import Stream, checkpoint
    from spikeloom.train.evaluate import load

__version__ = "0.1.0"

__all__ = [
    "DataFileError",
    "Recorder",
    "Registry",
    "Stream",
    "UsageError",
    "analyse",
    "backend",
    "checkpoint",
    "create_model",
    "data",
    "deploy",
    "encode",
    "keep_memory",
    "layers",
    "list_models",
    "list_weights",
    "load",
    "models",
    "neurons",
    "ops",
    "summary",
    "surrogates",
    "train",
]

_HOME = {
    "DataFileError": "errors",
    "UsageError": "errors",
    "Recorder": "record",
    "Registry": "registry",
    "Stream": "stream",
    "backend": "ops",
    "checkpoint": "stream",
    "create_model": "models",
    "keep_memory": "memory",
    "list_models": "models",
    "list_weights": "models",
    "load": "train.evaluate",
    "summary": "record",
}


def __getattr__(name: str) -> Any:
    # The command line answers `--help` without waiting for torch.
    if name not in __all__:
        raise AttributeError(f"module 'spikeloom' has no attribute {name!r}")
    home = importlib.import_module(f"spikeloom.{_HOME.get(name, name)}")
    value = getattr(home, name) if name in _HOME else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
