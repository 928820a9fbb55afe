"""The equations of the neurons: plain-PyTorch references, with their fast paths beside them."""

from spikeloom.ops._dispatch import backend
from spikeloom.ops.glif import gated_scan, gated_scan_reference
from spikeloom.ops.leaky_integrator import leaky_filter, leaky_filter_fft, leaky_filter_reference
from spikeloom.ops.psn import psn, sliding_psn
from spikeloom.ops.scan import fire, scan, scan_reference

__all__ = [
    "backend",
    "fire",
    "gated_scan",
    "gated_scan_reference",
    "leaky_filter",
    "leaky_filter_fft",
    "leaky_filter_reference",
    "psn",
    "scan",
    "scan_reference",
    "sliding_psn",
]
