"""The equations of the neurons: plain-PyTorch references, with their fast paths beside them."""

from spikeloom.ops.dispatch import backend
from spikeloom.ops.scan import scan, scan_reference

__all__ = ["backend", "scan", "scan_reference"]
