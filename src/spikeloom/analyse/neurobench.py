"""Networks under NeuroBench's harness (Yik et al. 2025): an adapter for `neurobench.benchmarks.Benchmark`.

This module needs the package neurobench; nothing else of Spikeloom imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.neurons.base import Neuron

try:
    from neurobench.models import NeuroBenchModel
except ImportError:
    raise UsageError("NeuroBench's harness needs neurobench: pip install 'spikeloom[neurobench]'") from None


class HarnessModel(NeuroBenchModel):
    """A network as NeuroBench's harness takes it.

        model = HarnessModel(net, data.encode)
        with torch.no_grad():
            found = Benchmark(model, loader, [], [ChooseMaxCount()], [[Footprint], [SynapticOperations]]).run()

    Connections are convolutions and linear layers, activations are neurons that fire, by their full names. Metrics of
    membrane potentials find none, because state does not lie on modules.

    Args:
        model: gives logits [T, N, classes].
        encode: makes the model's input of a loader's batch, such as a data set's `encode`; None for batches that the
            model takes as they are.
    """

    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.net = model.eval()
        self.encode = encode
        self.add_activation_module(Neuron)

    def __call__(self, batch: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - theirs has no types
        """Logits [N, T, classes], steps second, as NeuroBench's postprocessors want them."""
        with torch.no_grad():
            return self.net(batch if self.encode is None else self.encode(batch)).transpose(0, 1)

    def __net__(self) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.net

    def activation_layers(self) -> list[dict[str, Any]]:
        """The neurons that fire."""
        layers = self.net.named_modules()
        return [{"layer_name": n, "layer": m} for n, m in layers if isinstance(m, Neuron) and m.fires]
