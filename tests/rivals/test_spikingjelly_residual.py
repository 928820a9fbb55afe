"""SpikingJelly's SEW-ResNet with the same weights: the same spikes and logits in eval mode, for every g.

Its two SEW blocks hand g's arguments over in opposite order. ADD and AND do not care; its basic block's IAND is the
paper's (1 - A) S, its bottleneck's is A (1 - S). So of the 50 layers with IAND our network is given the latter here.
"""

from __future__ import annotations

import pytest
import torch
from helpers.spikingjelly_networks import build, neuron, prepared, same, surrogate

from spikeloom.layers import SEWBlock
from spikeloom.models import create_model
from spikeloom.models._ann_weights import load_ann


@pytest.mark.parametrize(
    ("depth", "combine"),
    [
        *((18, combine) for combine in ("add", "and", "iand")),
        (50, "iand"),
        *(pytest.param(34, combine, marks=pytest.mark.slow) for combine in ("add", "and", "iand")),
        *(pytest.param(50, combine, marks=pytest.mark.slow) for combine in ("add", "and")),
    ],
)
def test_sew_resnet(depth: int, combine: str) -> None:
    x = torch.randn(4, 2, 3, 64, 64, dtype=torch.float64) * 2
    options = {"surrogate_function": surrogate.ATan(), "detach_reset": True, "spiking_neuron": neuron.IFNode}
    theirs = build("sew_resnet", f"sew_resnet{depth}", num_classes=10, cnf=combine.upper(), **options)
    theirs = prepared(theirs, x)
    ours = create_model(f"sew_resnet{depth}", num_classes=10, combine=combine).double()
    load_ann(ours, theirs.state_dict())
    if depth == 50 and combine == "iand":
        for block in ours.modules():
            if isinstance(block, SEWBlock):
                block.combine = lambda a, s: a * (1 - s)
    same(ours, theirs, x)
