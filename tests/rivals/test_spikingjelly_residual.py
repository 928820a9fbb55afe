"""SpikingJelly's SEW-ResNet and MS-ResNet with the same weights: the same spikes and logits in eval mode.

Its two SEW blocks hand g's arguments over in opposite order. ADD and AND do not care; its basic block's IAND is the
paper's (1 - A) S, its bottleneck's is A (1 - S). So of the 50 layers with IAND our network is given the latter here.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import SEWBlock
from spikeloom.models import create_model
from spikeloom.models._ann_weights import load_ann
from spikeloom.neurons import Neuron
from spikeloom.record import Recorder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of its optional parts
    sj: Any = pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed: no comparison with it"
    )
    from spikingjelly.activation_based import functional, surrogate  # pyright: ignore
    from spikingjelly.activation_based.model import ms_resnet, sew_resnet  # pyright: ignore


def prepared(theirs: Any, x: Tensor) -> Any:
    """Norms that have seen data and shift it, in double precision, so that no rounding flips a spike."""
    functional.set_step_mode(theirs, "m")
    theirs.double().train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    with torch.no_grad():
        for _ in range(3):
            theirs(x)
            functional.reset_net(theirs)
    return theirs.eval()


@torch.no_grad()
def same(ours: nn.Module, theirs: Any, x: Tensor) -> None:
    seen: list[Tensor] = []
    for module in theirs.modules():
        if isinstance(module, sj.BaseNode):
            module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    expected = theirs(x)
    with Recorder(ours) as record:
        got = ours.double().eval()(x)
    recorded = [calls[0] for calls in record.spikes.values()]
    assert len(recorded) == len(seen) == sum(isinstance(m, Neuron) for m in ours.modules())
    for index, (a, b) in enumerate(zip(recorded, seen, strict=True)):
        assert torch.equal(a, b), f"neuron layer {index}"
    assert torch.stack([s.mean() for s in seen]).min() > 0
    got = got if expected.dim() == 3 else got.mean(0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


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
    build = getattr(sew_resnet, f"sew_resnet{depth}")
    options = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
    theirs = prepared(build(num_classes=10, cnf=combine.upper(), spiking_neuron=sj.IFNode, **options), x)
    ours = create_model(f"sew_resnet{depth}", num_classes=10, combine=combine).double()
    load_ann(ours, theirs.state_dict())
    if depth == 50 and combine == "iand":
        for block in ours.modules():
            if isinstance(block, SEWBlock):
                block.combine = lambda a, s: a * (1 - s)
    same(ours, theirs, x)


def test_ms_resnet18() -> None:
    x = torch.randn(4, 2, 3, 64, 64, dtype=torch.float64)
    theirs = prepared(ms_resnet.ms_resnet18(num_classes=10), x)
    names = {"stem.0.": "conv1.", "stem.1.": "bn1.", "head.": "fc."}
    state = {
        next((new + k[len(old) :] for old, new in names.items() if k.startswith(old)), k): v
        for k, v in theirs.state_dict().items()
    }
    ours = create_model("ms_resnet18", num_classes=10).double()
    load_ann(ours, state)
    same(ours, theirs, x)
