"""Networks of the papers, one file a document; `create_model` builds them by name."""

from spikeloom.models import report as _report
from spikeloom.models.registry import MODELS, create_model, list_models

__all__ = ["MODELS", "create_model", "list_models"]

del _report
