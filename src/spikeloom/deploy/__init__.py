"""From a trained network to one that runs elsewhere, or by its spikes."""

from spikeloom.deploy.engine import Engine, EngineStream, compile, load
from spikeloom.deploy.exact import exact
from spikeloom.deploy.fold import fold
from spikeloom.deploy.nir_read import from_nir, read_nir
from spikeloom.deploy.nir_write import to_nir, write_nir
from spikeloom.deploy.onnx_write import to_onnx

__all__ = [
    "Engine", "EngineStream", "compile", "exact", "fold", "from_nir", "load", "read_nir", "to_nir", "to_onnx",
    "write_nir",
]  # fmt: skip
