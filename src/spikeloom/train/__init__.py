"""Training: methods, losses, recipes, and the loop that runs them."""

from spikeloom.data import RandomTemporalDelete
from spikeloom.train import losses, methods

__all__ = ["RandomTemporalDelete", "losses", "methods"]
