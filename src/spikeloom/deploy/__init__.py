"""From a trained network to one that runs elsewhere, or by its spikes."""

from spikeloom.deploy.engine import Engine, EngineStream, compile, load
from spikeloom.deploy.fold import fold

__all__ = ["Engine", "EngineStream", "compile", "fold", "load"]
