"""Measuring networks."""

from spikeloom.analyse.audit.api import Audit, audit
from spikeloom.analyse.audit.cost import Cost, count_cost
from spikeloom.analyse.audit.energy import RULES, Energy, LayerEnergy, report_readings
from spikeloom.analyse.audit.layer import Costs, Layer, Operand
from spikeloom.analyse.calibrate import calibrated
from spikeloom.analyse.confusion import Confusion, confusion, draw_confusion
from spikeloom.analyse.load import Target, open_target
from spikeloom.analyse.measurements import MEASUREMENTS, Measured
from spikeloom.analyse.papers.attention_inputs import BlockInput, block_inputs, draw_block_inputs
from spikeloom.analyse.papers.gradients import BlockGradient, block_gradients, draw_gradients
from spikeloom.analyse.papers.isometry import block_isometry, draw_isometry
from spikeloom.analyse.papers.landscape import Landscape, draw_landscape, loss_landscape
from spikeloom.analyse.papers.pruning import Pruning, draw_pruning, prune_silent_shortcuts
from spikeloom.analyse.papers.rates import BlockRates, block_rates, draw_layer_rates, draw_rates
from spikeloom.analyse.papers.residual_influence import draw_influence, residual_influence, simulate_influence
from spikeloom.analyse.papers.similarity import block_similarity, draw_similarity, ssim
from spikeloom.analyse.plots import draw_figures, figure_data, read_figure, write_figure
from spikeloom.analyse.report.render import write_report
from spikeloom.analyse.spike_plots import (
    NeuronTrace,
    attention_rates,
    draw_attention_rates,
    draw_raster,
    draw_responses,
    draw_spike_maps,
    draw_traces,
    neuron_trace,
    probe_current,
    responses,
    spike_train,
)
from spikeloom.analyse.training_curves import metric_curves, training_curves

from spikeloom.analyse.papers import depth as depth  # isort: skip - registers its measurements
from spikeloom.analyse.papers import figures as figures  # isort: skip - registers its measurements
from spikeloom.analyse.papers import forecast as forecast  # isort: skip - registers its measurements
from spikeloom.analyse.papers import trained as trained  # isort: skip - registers its measurements

__all__ = [
    "MEASUREMENTS",
    "RULES",
    "Audit",
    "BlockGradient",
    "BlockInput",
    "BlockRates",
    "Confusion",
    "Cost",
    "Costs",
    "Energy",
    "Landscape",
    "Layer",
    "LayerEnergy",
    "Measured",
    "NeuronTrace",
    "Operand",
    "Pruning",
    "Target",
    "attention_rates",
    "audit",
    "block_gradients",
    "block_inputs",
    "block_isometry",
    "block_rates",
    "block_similarity",
    "calibrated",
    "confusion",
    "count_cost",
    "draw_attention_rates",
    "draw_block_inputs",
    "draw_confusion",
    "draw_figures",
    "draw_gradients",
    "draw_influence",
    "draw_isometry",
    "draw_landscape",
    "draw_layer_rates",
    "draw_pruning",
    "draw_raster",
    "draw_rates",
    "draw_responses",
    "draw_similarity",
    "draw_spike_maps",
    "draw_traces",
    "figure_data",
    "loss_landscape",
    "metric_curves",
    "neuron_trace",
    "open_target",
    "probe_current",
    "prune_silent_shortcuts",
    "read_figure",
    "report_readings",
    "residual_influence",
    "responses",
    "simulate_influence",
    "spike_train",
    "ssim",
    "training_curves",
    "write_figure",
    "write_report",
]
