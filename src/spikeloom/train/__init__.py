"""Training: methods, losses, recipes, and the loop that runs them."""

from spikeloom.train import losses, methods

__all__ = ["losses", "methods"]
