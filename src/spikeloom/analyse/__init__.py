"""Measuring networks."""

from spikeloom.analyse.block_inputs import BlockInput, block_inputs, draw_block_inputs
from spikeloom.analyse.cost import Cost, count_cost
from spikeloom.analyse.curves import training_curves
from spikeloom.analyse.measure import MEASUREMENTS, Measured

__all__ = [
    "MEASUREMENTS", "BlockInput", "Cost", "Measured", "block_inputs", "count_cost", "draw_block_inputs",
    "training_curves",
]  # fmt: skip
