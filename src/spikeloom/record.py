"""Recorder: what flows through a model, by the names of its layers."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.neurons.base import Neuron
from spikeloom.stream import previous_state, recomputing


class Recorder:
    """Records, inside its `with` block, tensors of every call of a model; detached, by layer name.

        with Recorder(model, spikes=True) as record:
            model(x)
        record.spikes["stem_spike.neuron"]  # a list, one [T, N, ...] tensor a call

    Args:
        model: any module.
        spikes: outputs of the neurons.
        potentials: the potentials at which the neurons decide to fire (a second run of each neuron).
        inputs: first inputs of all convolutions and linear layers.
        only: names of the layers to record; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        spikes: bool = True,
        potentials: bool = False,
        inputs: bool = False,
        only: set[str] | None = None,
    ):
        names = {name for name, _ in model.named_modules()}
        for name in only or ():
            if name not in names:
                raise ValueError(f"the model has no layer named {name!r}")
        self.spikes: dict[str, list[Tensor]] = {}
        self.potentials: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self._model, self._only = model, only
        self._wanted = (spikes, potentials, inputs)
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        spikes, potentials, inputs = self._wanted
        for name, module in self._model.named_modules():
            if self._only is not None and name not in self._only:
                continue
            if isinstance(module, Neuron) and (spikes or potentials):
                self._handles.append(module.register_forward_hook(self._neuron_hook(name, spikes, potentials)))
            if inputs and isinstance(module, nn.modules.conv._ConvNd | nn.Linear):  # pyright: ignore[reportPrivateUsage]
                self._handles.append(module.register_forward_hook(self._input_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forgets what was recorded."""
        for store in (self.spikes, self.potentials, self.inputs):
            store.clear()

    def rates(self) -> dict[str, float]:
        """Spikes per neuron and step of every recorded neuron layer, in the order of the network."""
        return {
            name: sum(s.float().sum().item() for s in calls) / max(sum(s.numel() for s in calls), 1)
            for name, calls in self.spikes.items()
        }

    def _neuron_hook(self, name: str, spikes: bool, potentials: bool) -> Any:
        def hook(module: Neuron, args: tuple[Tensor, ...], output: Tensor) -> None:
            if recomputing():
                return
            if spikes:
                self.spikes.setdefault(name, []).append(output.detach())
            if potentials:
                before = previous_state(module)
                self.potentials.setdefault(name, []).append(module.potentials(args[0].detach(), before))

        return hook

    def _input_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not recomputing():
                self.inputs.setdefault(name, []).append(args[0].detach())

        return hook


class RateMeter:
    """Counts spikes, inside its `with` block, without keeping them: the mean output of every neuron layer.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._sums: dict[str, tuple[float, int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> RateMeter:
        for name, module in self._model.named_modules():
            if isinstance(module, Neuron):
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not recomputing():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + output.detach().sum(dtype=torch.float32).item(), count + output.numel())

        return hook

    def rates(self) -> dict[str, float]:
        """Spikes per neuron and step of every layer, in the order in which they ran."""
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
