"""From a trained network to one that runs elsewhere."""

from spikeloom.deploy.fold import fold

__all__ = ["fold"]
