"""Networks of the papers, one file a paper; `create_model` builds them by name."""

from spikeloom.models import cifar10_net as _cifar10
from spikeloom.models import course_report as _report
from spikeloom.models import delay_net as _delay_net
from spikeloom.models import ds_resnet as _ds_resnet
from spikeloom.models import ghostnet as _ghostnet
from spikeloom.models import masked_autoencoder as _masked_autoencoder
from spikeloom.models import ms_resnet as _ms_resnet
from spikeloom.models import paralif as _paralif
from spikeloom.models import plif_net as _plif_net
from spikeloom.models import psn as _psn
from spikeloom.models import psu as _psu
from spikeloom.models import sew_resnet as _sew_resnet
from spikeloom.models import spikformer as _spikformer
from spikeloom.models import spikformer_v2 as _spikformer_v2
from spikeloom.models import spiking_vgg as _spiking_vgg
from spikeloom.models import spikingformer as _spikingformer
from spikeloom.models import syna as _syna
from spikeloom.models import tet as _tet
from spikeloom.models.registry import MODELS, create_model, list_models
from spikeloom.models.spikingjelly import load_spikingjelly
from spikeloom.models.trained_weights import list_weights
from spikeloom.models.weight_matching import copy_weights

__all__ = ["MODELS", "copy_weights", "create_model", "list_models", "list_weights", "load_spikingjelly"]

del _cifar10, _delay_net, _ds_resnet, _ghostnet, _masked_autoencoder, _ms_resnet, _paralif, _plif_net, _psn, _psu
del _report, _sew_resnet, _spikformer, _spikformer_v2, _spiking_vgg, _spikingformer, _syna, _tet
