"""Training: methods, losses, recipes, and the loop that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spikeloom.data import RandomTemporalDelete
from spikeloom.train import losses, methods

if TYPE_CHECKING:
    from spikeloom.train.fitting import fit

__all__ = ["RandomTemporalDelete", "fit", "losses", "methods"]


def __getattr__(name: str) -> Any:
    if name != "fit":
        raise AttributeError(f"module 'spikeloom.train' has no attribute {name!r}")
    from spikeloom.train.fitting import fit  # with accelerate, which takes a second to import

    return fit
