"""Training: methods, losses, recipes, and the loop that runs them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from spikeloom.data import RandomTemporalDelete
from spikeloom.train import losses, methods

if TYPE_CHECKING:
    from spikeloom.train.fitting import fit, train_recipe

# Said in notebooks without ipywidgets when accelerate is imported; nothing here draws such a bar.
warnings.filterwarnings("ignore", "IProgress not found")

__all__ = ["RandomTemporalDelete", "fit", "losses", "methods", "train_recipe"]


def __getattr__(name: str) -> Any:
    if name not in ("fit", "train_recipe"):
        raise AttributeError(f"module 'spikeloom.train' has no attribute {name!r}")
    from spikeloom.train import fitting  # with accelerate, which takes a second to import

    return getattr(fitting, name)
