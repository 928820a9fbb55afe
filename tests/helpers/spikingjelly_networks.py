"""Networks of SpikingJelly with norms that have seen data, and the comparison with ours, spike by spike."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.neurons import Neuron
from spikeloom.record import Recorder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at import: of its optional parts
    neuron: Any = pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="SpikingJelly is not installed: no comparison with it"
    )
    from spikingjelly.activation_based import functional, surrogate  # pyright: ignore

__all__ = ["build", "neuron", "prepared", "same", "surrogate"]


def build(family: str, name: str, **options: Any) -> Any:
    """A network of SpikingJelly's, by the module that has it."""
    return getattr(importlib.import_module(f"spikingjelly.activation_based.model.{family}"), name)(**options)


def prepared(theirs: Any, x: Tensor, shift: float = 0.4) -> Any:
    """Norms that have seen data and shift it, in double precision, so that no rounding flips a spike."""
    functional.set_step_mode(theirs, "m")
    theirs.double().train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, shift)
    with torch.no_grad():
        for _ in range(3):
            theirs(x)
            functional.reset_net(theirs)
    return theirs.eval()


@torch.no_grad()
def same(ours: nn.Module, theirs: Any, x: Tensor, one_to_one: bool = True) -> None:
    """The same logits and, where the layers of neurons are `one_to_one`, the same spikes in each; all of them fire."""
    seen: list[Tensor] = []
    for module in theirs.modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    expected = theirs(x)
    with Recorder(ours) as record:
        got = ours.double().eval()(x)
    if one_to_one:
        recorded = [calls[0] for calls in record.spikes.values()]
        assert len(recorded) == len(seen) == sum(isinstance(m, Neuron) for m in ours.modules())
        for index, (a, b) in enumerate(zip(recorded, seen, strict=True)):
            assert torch.equal(a, b), f"neuron layer {index}"
    assert torch.stack([s.mean() for s in seen]).min() > 0
    got = got if expected.dim() == 3 else got.mean(0)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
