"""Measuring networks."""

from spikeloom.analyse.cost import Cost, count_cost

__all__ = ["Cost", "count_cost"]
