"""Measuring networks."""

from spikeloom.analyse.cost import Cost, count_cost
from spikeloom.analyse.measure import MEASUREMENTS, Measured

__all__ = ["MEASUREMENTS", "Cost", "Measured", "count_cost"]
