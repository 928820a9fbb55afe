"""From a trained network to one that runs elsewhere, or by its spikes."""

from spikeloom.deploy.engine.compile import compile
from spikeloom.deploy.engine.engine import Engine, EngineStream, load
from spikeloom.deploy.engine.lossless import exact, quantized
from spikeloom.deploy.exchange.fold import fold
from spikeloom.deploy.exchange.nir_read import from_nir, read_nir
from spikeloom.deploy.exchange.nir_write import to_nir, write_nir
from spikeloom.deploy.exchange.onnx_write import to_onnx
from spikeloom.deploy.sensor import SensorStream, WindowDecision

__all__ = [
    "Engine",
    "EngineStream",
    "SensorStream",
    "WindowDecision",
    "compile",
    "exact",
    "fold",
    "from_nir",
    "load",
    "quantized",
    "read_nir",
    "to_nir",
    "to_onnx",
    "write_nir",
]
