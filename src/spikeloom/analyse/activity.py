"""What every layer of neurons does on one input, packed small: spikes as bits, potentials as 12-bit numbers."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.cost import evaluating
from spikeloom.errors import UsageError
from spikeloom.neurons import PSN, MaskedPSN, SlidingPSN
from spikeloom.neurons.base import Neuron
from spikeloom.neurons.paralif import ParaLIF
from spikeloom.ops.paralif_firing import FIRING
from spikeloom.record import Recorder
from spikeloom.registry import nearest

Json = dict[str, Any]
_BYTES, _SPIKE_BYTES = 2_050_000, 900_000  # of all layers together, and of their spikes; base64 makes 4 bytes of 3
_HIGHEST = 4095  # number of 12 bits
_FEW_STEPS = 16  # up to which neurons without positions are drawn as a square, from there on as a raster


@dataclass(frozen=True)
class LayerActivity:
    """A layer of neurons on one input.

    Attributes:
        name, kind: in the model, and the class of the neuron.
        shape: of the layer's neurons, without steps and batch.
        steps: T.
        spikes: of all its neurons.
        rates: spikes per neuron at each step, of all its neurons.
        kept: how many neurons are packed, the first ones; whole channels where a channel fits.
        planes: bits of a value: 1 of spikes, more of neurons with several levels.
        bits: base64 of `planes` planes, in each the neurons of step 1, of step 2, ...; the lowest bit of a byte first.
        potentials: of how many neurons, the first ones, they are packed.
        levels: potentials of a neuron at a step: 1, or one a threshold.
        low, high: what the numbers 0 and 4095 stand for.
        values: base64 of 12-bit numbers [steps, levels, potentials], two in three bytes, low bits first.
        thresholds: of the potentials, one a level; empty where there is none that is fixed.
        why: why no potentials are there, in words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    steps: int
    spikes: int
    rates: tuple[float, ...]
    kept: int
    planes: int
    bits: str
    potentials: int
    levels: int
    low: float
    high: float
    values: str
    thresholds: tuple[float, ...]
    why: str

    @property
    def neurons(self) -> int:
        return math.prod(self.shape)

    @property
    def rate(self) -> float:
        """Spikes per neuron and step."""
        return sum(self.rates) / len(self.rates)

    @property
    def picture(self) -> tuple[int, int] | None:
        """Rows and columns of a channel as it is drawn; None of a raster, with time to the right."""
        if len(self.shape) > 1:
            return self.shape[-2], self.shape[-1]
        if self.steps > _FEW_STEPS:
            return None
        columns = math.ceil(math.sqrt(self.neurons))
        return math.ceil(self.neurons / columns), columns

    def left_out(self) -> str:
        """What of the layer is not packed, in words; empty if all is."""
        parts: list[str] = []
        if self.kept < self.neurons:
            parts.append(f"spikes of {self._first(self.kept)}")
        if self.potentials and self.potentials < self.neurons:
            parts.append(f"potentials of {self._first(self.potentials)}")
        return " and ".join(parts)

    def _first(self, count: int) -> str:
        size = math.prod(self.shape[-2:])
        if len(self.shape) > 2 and count % size == 0:
            return f"the first {count // size} of {self.neurons // size} channels"
        return f"the first {count:,} of {self.neurons:,} neurons"


@dataclass(frozen=True)
class Activity:
    """What a network does on one input.

    Attributes:
        layers: of neurons, in the order in which they ran.
        others: names and classes of neuron layers whose output is no spikes, such as a readout's potential.
        rates: spikes per neuron and step of every layer that fires, of those too that are not in `layers`.
        logits: [T, classes].
    """

    layers: tuple[LayerActivity, ...]
    others: tuple[tuple[str, str], ...]
    rates: dict[str, float]
    logits: Tensor


def record_activity(model: nn.Module, x: Tensor, layers: Sequence[str] = ()) -> Activity:
    """Runs one input through a network and packs what its neurons do.

    Args:
        model: built from Spikeloom's neurons, with logits [T, N, classes]; runs in eval mode.
        x: a batch of one.
        layers: names of the neuron layers to pack; all without.

    Raises:
        UsageError: no such layer, no neuron that ran, or another output than logits [T, 1, classes].
    """
    neurons = {name: module for name, module in model.named_modules() if isinstance(module, Neuron)}
    for name in layers:
        if name not in neurons:
            raise UsageError(f"the model has no layer of neurons {name!r}; {nearest(name, neurons)}")
    exposed = [name for name, neuron in neurons.items() if neuron.has_potentials and (not layers or name in layers)]
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # neurons that draw their spikes draw the same ones every time
        with Recorder(model) as record, Recorder(model, spikes=False, potentials=True, only=exposed) as inside:
            logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != 1:
        raise UsageError(f"{type(model).__name__} gives no logits [T, 1, classes]: it shows no decision over time")
    firing = {
        name: calls
        for name, calls in record.spikes.items()
        if neurons[name].fires and all(_is_spikes(call) for call in calls)
    }
    parts = [
        _Part(
            name if number == 0 else f"{name} (call {number + 1})",
            neurons[name],
            spikes,
            inside.potentials[name][number] if name in inside.potentials else None,
        )
        for name, calls in firing.items()
        for number, spikes in enumerate(calls)
        if not layers or name in layers
    ]
    if not parts:
        raise UsageError(f"no spikes to show: {', '.join(layers) or type(model).__name__} ran no layer that fires")
    bits = _shares([part.bytes_of_bits for part in parts], _SPIKE_BYTES)
    numbers = _shares([part.bytes_of_potentials for part in parts], _BYTES - sum(bits))
    return Activity(
        tuple(part.packed(*room) for part, *room in zip(parts, bits, numbers, strict=True)),
        tuple((name, type(neurons[name]).__name__) for name in record.spikes if name not in firing),
        {name: rate for name, rate in record.rates().items() if name in firing},
        logits[:, 0].float(),
    )


def _is_spikes(output: Tensor) -> bool:
    """Whether an output is spikes, or a count of them that fits a byte."""
    return bool(((output >= 0) & (output <= 255) & (output == output.round())).all())


def _shares(sizes: Sequence[int], budget: int) -> list[int]:
    """What each may have of a budget: the small ones all they need, the large ones equal parts of the rest."""
    shares = [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    for place, index in enumerate(order):
        shares[index] = min(sizes[index], budget // (len(order) - place))
        budget -= shares[index]
    return shares


class _Part:
    """A layer before it is packed: its output [T, 1, ...] and potentials [T, 1, ...] or [T, levels, 1, ...]."""

    def __init__(self, name: str, neuron: Neuron, spikes: Tensor, potentials: Tensor | None):
        self.name, self.neuron = name, neuron
        self.shape = tuple(spikes.shape[2:] if spikes.shape[1] == 1 else spikes.shape[1:]) or (1,)
        self.values = spikes.flatten(1).to(torch.uint8)
        self.steps, self.neurons = self.values.shape
        self.planes = max(1, int(self.values.max()).bit_length())
        self.levels = 1 if potentials is None else potentials.numel() // self.values.numel()
        self.potentials = (
            None if potentials is None else potentials.reshape(self.steps, self.levels, self.neurons).float()
        )

    @property
    def bytes_of_bits(self) -> int:
        return self.planes * math.ceil(self.steps * self.neurons / 8)

    @property
    def bytes_of_potentials(self) -> int:
        return 0 if self.potentials is None else math.ceil(1.5 * self.potentials.numel())

    def packed(self, room: int, potential_room: int) -> LayerActivity:
        kept = self._whole(8 * room // (self.planes * self.steps), self.neurons)
        shown = 0
        low = high = 0.0
        values, why = "", f"{type(self.neuron).__name__} does not tell its potentials"
        if self.potentials is not None:
            shown = self._whole(potential_room * 2 // (3 * self.steps * self.levels), kept)
            some = torch.nan_to_num(self.potentials[:, :, :shown]).double()
            low, high = some.min().item(), some.max().item()
            scaled = (some - low) / ((high - low) or 1.0) * _HIGHEST
            values, why = _base64(_in_12_bits(scaled.round().to(torch.int32).numpy().ravel())), ""
        bits = self.values[:, :kept].numpy().ravel()
        planes = [np.packbits((bits >> plane) & 1, bitorder="little") for plane in range(self.planes)]
        return LayerActivity(
            name=self.name,
            kind=type(self.neuron).__name__,
            shape=self.shape,
            steps=self.steps,
            spikes=int(self.values.sum(dtype=torch.int64)),
            rates=tuple(self.values.double().mean(1).tolist()),
            kept=kept,
            planes=self.planes,
            bits=_base64(np.concatenate(planes)),
            potentials=shown,
            levels=self.levels,
            low=low,
            high=high,
            values=values,
            thresholds=_thresholds(self.neuron) if shown else (),
            why=why,
        )

    def _whole(self, fitting: int, most: int) -> int:
        """At most so many neurons: all that there are, whole channels, whole rows, or as many as fit."""
        if fitting >= most:
            return most
        for size in (math.prod(self.shape[-2:]), self.shape[-1]):
            if len(self.shape) > 1 and fitting >= size:
                return fitting - fitting % size
        return max(1, fitting)


def _thresholds(neuron: Neuron) -> tuple[float, ...]:
    if isinstance(neuron, PSN | MaskedPSN | SlidingPSN):  # their bias is part of the potential
        return (0.0,)
    if isinstance(neuron, ParaLIF) and FIRING[neuron.firing] != ("", "threshold"):
        return ()
    value: Any = getattr(neuron, "v_threshold", None)
    return value if isinstance(value, tuple) else (value,) if isinstance(value, float | int) else ()


def _in_12_bits(numbers: Any) -> Any:
    """Numbers up to 4095, two in three bytes."""
    first, second = np.pad(numbers, (0, numbers.size % 2)).reshape(-1, 2).T
    return np.stack([first & 255, (first >> 8) | ((second & 15) << 4), second >> 4], 1).astype(np.uint8)


def _base64(values: Any) -> str:
    return base64.b64encode(values.tobytes()).decode()
