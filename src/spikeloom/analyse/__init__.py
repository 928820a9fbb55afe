"""Measuring networks."""

from spikeloom.analyse.block_inputs import BlockInput, block_inputs, draw_block_inputs
from spikeloom.analyse.cost import Cost, count_cost
from spikeloom.analyse.curves import training_curves
from spikeloom.analyse.gradients import BlockGradient, block_gradients, draw_gradients
from spikeloom.analyse.measure import MEASUREMENTS, Measured
from spikeloom.analyse.rates import BlockRates, block_rates, draw_rates

from spikeloom.analyse import depth as depth  # isort: skip - registers its measurements

__all__ = [
    "MEASUREMENTS", "BlockGradient", "BlockInput", "BlockRates", "Cost", "Measured", "block_gradients", "block_inputs",
    "block_rates", "count_cost", "draw_block_inputs", "draw_gradients", "draw_rates", "training_curves",
]  # fmt: skip
