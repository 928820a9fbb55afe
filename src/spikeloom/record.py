"""Recorder: what flows through a model, by the names of its layers; and a summary of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.neurons.base import Neuron
from spikeloom.stream import compiled_part, previous_state, recomputing

_PRODUCTS = nn.modules.conv._ConvNd | nn.Linear  # pyright: ignore[reportPrivateUsage]


def _refuse_compiled(model: nn.Module, what: str) -> None:
    if part := compiled_part(model):
        raise TypeError(
            f"{what} sees nothing of what torch.compile has made (module {part!r}): use it with the model as it was "
            "before compile"
        )


class Recorder:
    """Records, inside its `with` block, tensors of every call of a model; detached, by layer name.

        with Recorder(model, spikes=True) as record:
            model(x)
        record.spikes["stem_spike.neuron"]  # a list, one [T, N, ...] tensor a call

    A block in which the model was not called ends with a warning.

    Args:
        model: any module, not compiled.
        spikes: outputs of the neurons.
        potentials: the potentials at which the neurons decide to fire (a second run of each neuron).
        inputs: first inputs of all convolutions and linear layers.
        only: names of the layers to record, or one name; None for all.

    Raises:
        TypeError: model is compiled.
        ValueError: a name in `only` is of no layer, or of one that is not recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        spikes: bool = True,
        potentials: bool = False,
        inputs: bool = False,
        only: str | Iterable[str] | None = None,
    ):
        _refuse_compiled(model, "a Recorder")
        self.spikes: dict[str, list[Tensor]] = {}
        self.potentials: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self._model = model
        self._wanted = (spikes, potentials, inputs)
        self._names = self._chosen(None if only is None else {only} if isinstance(only, str) else set(only))
        self._handles: list[Any] = []
        self._seen = False

    def _records(self, module: nn.Module) -> bool:
        """Whether something of this layer is recorded."""
        spikes, potentials, inputs = self._wanted
        return (isinstance(module, Neuron) and (spikes or potentials)) or (isinstance(module, _PRODUCTS) and inputs)

    def _chosen(self, only: set[str] | None) -> set[str]:
        layers = dict(self._model.named_modules())
        recorded = {name for name, module in layers.items() if self._records(module)}
        wanted = dict(zip(("spikes", "potentials", "inputs"), self._wanted, strict=True))
        what = f"with {', '.join(f'{name}={value}' for name, value in wanted.items())}"
        for name in only or ():
            if name not in layers:
                raise ValueError(f"the model has no layer named {name!r}")
            if name not in recorded:
                inside = sorted(other for other in recorded if other.startswith(f"{name}."))
                hint = f": it holds {', '.join(inside[:3])}" if inside else ""
                raise ValueError(f"nothing of {name!r}, a {type(layers[name]).__name__}, is recorded {what}{hint}")
        return recorded if only is None else only

    def __enter__(self) -> Recorder:
        spikes, potentials, inputs = self._wanted
        self._seen = False
        for name, module in self._model.named_modules():
            if name not in self._names:
                continue
            if isinstance(module, Neuron) and (spikes or potentials):
                self._handles.append(module.register_forward_hook(self._neuron_hook(name, spikes, potentials)))
            if inputs and isinstance(module, _PRODUCTS):
                self._handles.append(module.register_forward_hook(self._input_hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._names and kind is None and not self._seen:
            warnings.warn(
                f"a Recorder saw no call of its {type(self._model).__name__}: call this model itself inside the block, "
                "not a copy of it and not what torch.compile has made of it",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        stores = {"spikes": self.spikes, "potentials": self.potentials, "inputs": self.inputs}
        held = [
            f"{name} of {len(store)} layers in {max(map(len, store.values()))} calls"
            for name, store in stores.items()
            if store
        ]
        return f"Recorder({type(self._model).__name__}: {', '.join(held) or 'nothing'})"

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
            self._seen = True
            if spikes:
                self.spikes.setdefault(name, []).append(output.detach())
            if potentials:
                before = previous_state(module)
                self.potentials.setdefault(name, []).append(module.potentials(args[0].detach(), before))

        return hook

    def _input_hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not recomputing():
                self._seen = True
                self.inputs.setdefault(name, []).append(args[0].detach())

        return hook


class RateMeter:
    """Counts spikes, inside its `with` block, without keeping them: the mean output of every layer that fires.

    Args:
        model: any module, not compiled.
    """

    def __init__(self, model: nn.Module):
        _refuse_compiled(model, "a RateMeter")
        self._model = model
        self._sums: dict[str, tuple[float, int]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> RateMeter:
        for name, module in self._model.named_modules():
            if isinstance(module, Neuron) and module.fires:
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

    def spikes(self) -> dict[str, float]:
        """Spikes of every layer, all inputs and steps together."""
        return {name: total for name, (total, _) in self._sums.items()}

    def rates(self) -> dict[str, float]:
        """Spikes per neuron and step of every layer, in the order in which they ran."""
        return {name: total / max(count, 1) for name, (total, count) in self._sums.items()}

    def mean(self) -> float:
        """Spikes per neuron and step over all neurons, those of large layers counting for more."""
        totals, counts = zip(*self._sums.values(), strict=True) if self._sums else ((0.0,), (1,))
        return sum(totals) / max(sum(counts), 1)


# --- summary ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSummary:
    """A layer that ran.

    Attributes:
        name, kind: its name in the model, and its class.
        output: shape of its output, of the first call.
        parameters: elements of its own parameters, not of the layers inside it.
        rate: spikes per neuron and step; None of what is no layer of neurons.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    rate: float | None


@dataclass(frozen=True)
class Summary:
    """What `summary` found; printed, a table.

    Attributes:
        model: the class of the model.
        layers: in the order in which they ran.
        output: shape of the model's output.
        parameters: elements of all parameters, of layers that did not run too.
    """

    model: str
    layers: tuple[LayerSummary, ...]
    output: tuple[int, ...]
    parameters: int

    def __repr__(self) -> str:
        rows = [("layer", "kind", "output", "parameters", "rate %")]
        for layer in self.layers:
            rate = "" if layer.rate is None else f"{100 * layer.rate:.2f}"
            parameters = f"{layer.parameters:,}" if layer.parameters else ""
            rows.append((layer.name, layer.kind, _shape(layer.output), parameters, rate))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(n) if i > 2 else cell.ljust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        end = f"{self.model}: {self.parameters:,} parameters, output {_shape(self.output)}"
        return "\n".join([*map(str.rstrip, lines), end])


def summary(model: nn.Module, input: Tensor) -> Summary:
    """The layers of a model: output shapes, parameters and firing rates, from one call in eval mode.

        print(spikeloom.summary(model, torch.rand(1, 3, 32, 32)))

    Args:
        model: any module, not compiled; it is left as it was.
        input: what it takes.

    Raises:
        TypeError: model is compiled.
    """
    _refuse_compiled(model, "a summary")
    training = {module: module.training for module in model.modules()}
    layers: dict[str, LayerSummary] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if name not in layers:
                y = _tensor(output)
                fires = isinstance(module, Neuron) and module.fires
                rate = y.float().mean().item() if fires and y is not None else None
                own = sum(p.numel() for p in module.parameters(recurse=False))
                layers[name] = LayerSummary(name, type(module).__name__, () if y is None else tuple(y.shape), own, rate)

        return note

    handles = [
        module.register_forward_hook(hook(name or "model"))
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            output = _tensor(model.eval()(input))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    total = sum(p.numel() for p in model.parameters())
    return Summary(type(model).__name__, tuple(layers.values()), () if output is None else tuple(output.shape), total)


def _tensor(output: Any) -> Tensor | None:
    """The first tensor of what a module gave."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
