"""Measurements of speed that a user can repeat: `spikeloom bench`, and recipes of speed figures."""

from spikeloom.bench import speed as speed
