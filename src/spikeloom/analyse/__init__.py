"""Measuring networks."""

from spikeloom.analyse.audit import Audit, audit
from spikeloom.analyse.cost import Cost, count_cost
from spikeloom.analyse.energy import RULES, Costs, Energy, Layer, LayerEnergy, Operand, report_readings
from spikeloom.analyse.measure import MEASUREMENTS, Measured

__all__ = [
    "MEASUREMENTS", "RULES", "Audit", "Cost", "Costs", "Energy", "Layer", "LayerEnergy", "Measured", "Operand",
    "audit", "count_cost", "report_readings",
]  # fmt: skip
