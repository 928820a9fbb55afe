"""Measuring networks."""

from spikeloom.analyse.cost import Cost, count_cost
from spikeloom.analyse.curves import training_curves
from spikeloom.analyse.measure import MEASUREMENTS, Measured

__all__ = ["MEASUREMENTS", "Cost", "Measured", "count_cost", "training_curves"]
