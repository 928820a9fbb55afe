"""Networks of the papers, one file a document; `create_model` builds them by name."""

from spikeloom.models import ds_resnet as _ds_resnet
from spikeloom.models import ghostnet as _ghostnet
from spikeloom.models import paralif as _paralif
from spikeloom.models import psn as _psn
from spikeloom.models import psu as _psu
from spikeloom.models import report as _report
from spikeloom.models import syna as _syna
from spikeloom.models import tet as _tet
from spikeloom.models.registry import MODELS, create_model, list_models

__all__ = ["MODELS", "create_model", "list_models"]

del _ds_resnet, _ghostnet, _paralif, _psn, _psu, _report, _syna, _tet
