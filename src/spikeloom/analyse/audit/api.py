"""Audit: what enters every convolution, linear layer and matrix product of any PyTorch network, and what it costs.

The network runs as it is, under a `TorchDispatchMode` that sees every operation PyTorch carries out, functional ones
too. Layers are named by the modules and weights they belong to.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.audit.cost import evaluating
from spikeloom.analyse.audit.energy import RULES, Energy
from spikeloom.analyse.audit.layer import SPIKES, Costs, Layer
from spikeloom.analyse.audit.tracer import OpTrace
from spikeloom.analyse.calibrate import calibrated
from spikeloom.errors import UsageError
from spikeloom.notebook import html_table

Json = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        model: the class of the network.
        rows: its layers, in the order in which they first ran.
        images: how many went through.
        steps: T, time steps an image; their mean where batches differ.
        parameters: elements of all parameters.
        costs: energies of the operations.
        uncounted: operations that hold matrix products which could not be looked into.
        untrained_norms: norms with the statistics that they were made with, mean 0 and variance 1.
        footprint: bytes of all parameters and buffers.
        fired, activations: what neurons gave for all images and steps: how many values are not 0, and how many there
            are; leaky readouts are not among them.
    """

    model: str
    rows: tuple[Layer, ...]
    images: int
    steps: float
    parameters: int
    costs: Costs
    uncounted: tuple[str, ...] = ()
    untrained_norms: int = 0
    footprint: int = 0
    fired: int = 0
    activations: int = 0

    def __repr__(self) -> str:
        energy = f"{self.energy_pj / 1e6:.3g} uJ an image" if self.rows else "nothing counted"
        return f"Audit({self.model}: {len(self.rows)} layers, {self.images} images, T = {self.steps}, {energy})"

    def _repr_html_(self) -> str:
        """The verdict and the layers, for notebooks."""
        head = ("layer", "input", "rate, %", "MACs", "ACs", "energy, nJ", "breaks it because")
        rows = [
            (
                row.name,
                row.input,
                f"{100 * row.rate:.2f}",
                f"{row.macs:,.0f}",
                f"{row.acs:,.0f}",
                f"{row.energy_pj / 1e3:,.2f}",
                row.why if row.breaks else "",
            )
            for row in self.rows
        ]
        return html_table("; ".join([repr(self), *map(str.strip, self.verdict())]), rows, head)

    @property
    def breaking(self) -> tuple[Layer, ...]:
        """The layers that keep the network from being spike-driven, each with its `why`."""
        return tuple(row for row in self.rows if row.breaks)

    @property
    def silent(self) -> tuple[Layer, ...]:
        """The layers behind the encoder that received nothing: zeros, from every image at every step."""
        return tuple(row for row in self.rows if row.input == "silent" and row.role != "encoder")

    @property
    def spike_driven(self) -> bool | None:
        """Whether every layer behind the encoder is driven by spikes; None if these inputs cannot tell.

        Each then only adds weights, when a spike arrives. A classifier may receive pooled spikes: a mean before a
        linear layer is a factor of its weights. They cannot tell if no layer breaks it, but one received nothing, or
        products could not be looked into.
        """
        if self.breaking:
            return False
        if self.silent or self.uncounted or all(row.input == "silent" for row in self.rows):
            return None
        return any(row.input in SPIKES for row in self.rows)

    @property
    def macs(self) -> float:
        return sum(row.macs for row in self.rows)

    @property
    def acs(self) -> float:
        return sum(row.acs for row in self.rows)

    @property
    def activation_sparsity(self) -> float | None:
        """The share of zeros in what neurons gave; None without neurons."""
        return (self.activations - self.fired) / self.activations if self.activations else None

    @property
    def effective_macs(self) -> float:
        """Operations with a weight and an input that are not 0, of layers that receive more than 0, 1 and -1."""
        return sum(row.effective for row in self.rows if row.input not in SPIKES)

    @property
    def effective_acs(self) -> float:
        """The same of layers that receive 0, 1 and -1 alone."""
        return sum(row.effective for row in self.rows if row.input in SPIKES)

    @property
    def energy_pj(self) -> float:
        return sum(row.energy_pj for row in self.rows)

    def energy(self, rule: str = "measured", **options: Any) -> Energy:
        """Energy of one image by a published rule.

        Args:
            rule: of `RULES`.
            options: of the rule.

        Raises:
            UsageError: unknown rule or option.
        """
        function = RULES[rule]
        known = list(inspect.signature(function).parameters)[3:]
        for key in options:
            if key not in known:
                raise UsageError(f"energy rule {rule} has no option {key!r}; it takes {', '.join(known) or 'none'}")
        return function(self.rows, self.steps, self.costs, **options)

    def energies(self) -> dict[str, Energy]:
        """Energy of one image by every rule, with its defaults."""
        return {name: self.energy(name) for name in RULES}

    def verdict(self) -> list[str]:
        """The verdict in words: a line, and one for each cause that breaks it; before them what to do about silence."""
        silent, lines = len(self.silent), list[str]()
        if silent and self.untrained_norms:
            lines.append(
                f"never trained: {silent} of {len(self.rows)} layers received nothing, and {self.untrained_norms} "
                "norms have the statistics they were made with; audit(..., calibrate=True) takes those of the first "
                "batch"
            )
        behind = sum(row.role != "encoder" for row in self.rows)
        if self.spike_driven:
            lines.append(f"spike-driven: all {behind} layers behind the encoder receive spikes")
        elif self.breaking or not (silent or self.uncounted):
            count = len(self.breaking)
            lines.append(f"not spike-driven: {count} of {len(self.rows)} layers receive what is not made of spikes")
        else:
            why = f"{silent} of {behind} layers behind the encoder received nothing" if silent else "not all was seen"
            lines.append(f"cannot tell whether it is spike-driven: {why}")
        causes: dict[str, list[str]] = {}
        for row in self.breaking:
            causes.setdefault(f"{row.input} values from {row.why.split(' in ')[0]}", []).append(row.name)
        for cause, names in causes.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {len(names)} with {cause}: {', '.join(names[:3])}{more}")
        lines += [f"  not looked into: {name}" for name in self.uncounted]
        if silent:
            lines.append(f"  {silent} received nothing at all: what they cost says little")
        return lines

    def to_json(self) -> Json:
        """Everything as plain values: the fields, the verdict, and the totals of every rule."""
        return {
            "model": self.model,
            "images": self.images,
            "steps": self.steps,
            "parameters": self.parameters,
            "spike_driven": self.spike_driven,
            "uncounted": list(self.uncounted),
            "untrained_norms": self.untrained_norms,
            "breaking": [{"name": row.name, "input": row.input, "why": row.why} for row in self.breaking],
            "macs": self.macs,
            "acs": self.acs,
            "energy_pj": self.energy_pj,
            "effective_macs": self.effective_macs,
            "effective_acs": self.effective_acs,
            "footprint": self.footprint,
            "fired": self.fired,
            "activations": self.activations,
            "costs": vars(self.costs),
            "energies": {n: {"macs": e.macs, "acs": e.acs, "pj": e.pj} for n, e in self.energies().items()},
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, values: Json) -> Audit:
        """The audit of which these are the `to_json`.

        Raises:
            KeyError, TypeError: they are of no audit.
        """
        rows = tuple(Layer.from_json(row) for row in values["rows"])
        return cls(
            values["model"],
            rows,
            values["images"],
            values["steps"],
            values["parameters"],
            Costs(**values["costs"]),
            tuple(values["uncounted"]),
            *(values.get(name, 0) for name in ("untrained_norms", "footprint", "fired", "activations")),
        )


def audit(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    batch_axis: int | None = None,
    folded_biases: Sequence[str] = (),
    reset: Callable[[nn.Module], Any] | None = None,
    costs: Costs = Costs(),  # noqa: B008
    calibrate: bool = False,
) -> Audit:
    """Measures a network on some batches, in eval mode and without gradients; it is left as it was.

    Works for any PyTorch module: convolutions, linear layers and matrix products are seen where they run, whoever
    calls them. Products inside a neuron, such as PSN's over time, are part of the neuron and not counted, as leaks and
    thresholds are not; recurrent weights are counted.

    Args:
        model: takes a batch. State that modules of SpikingJelly and snnTorch keep is reset before each batch.
        batches: each a tensor, or inputs and labels; an iterable of at least one, or one alone: a tensor, or a tuple
            of inputs and integer labels.
        batch_axis: of the first input; found from labels, logits or 5 axes ([T, N, C, H, W]) if None, otherwise 0.
        folded_biases: names of layers whose bias came from folding a norm; it is not counted.
        reset: called with the network before each batch, for other networks that keep state on their modules.
        costs: energies of the operations.
        calibrate: measure a copy whose norms have the statistics of the first batch, as at the first training step;
            for a network that was never trained, in which hardly a spike passes the norms.

    Raises:
        UsageError: no module, no batch, a compiled model, a name in `folded_biases` that is no layer, or nothing to
            count.
    """
    _refuse(model)
    batches = iter(as_batches(batches))
    if calibrate:
        batches = itertools.chain(first := list(itertools.islice(batches, 1)), batches)
        _reset(model, reset)
        model = calibrated(model, _parts(first[0])[0]) if first else model
    trace = OpTrace(model)
    images, steps = 0, 0
    with evaluating(model), torch.no_grad(), trace.attached():
        for batch in batches:
            x, labels = _parts(batch)
            _reset(model, reset)
            with trace.recording(x):
                output = model(x)
            count, ran = _sizes(model, x, labels, output, batch_axis, trace)
            trace.close(count, ran)
            images, steps = images + count, steps + count * ran
    if images == 0:
        raise UsageError("an audit needs at least one batch, got none: give a list or a loader of inputs")
    mean = steps // images if steps % images == 0 else steps / images
    rows = trace.layers(images, mean, set(folded_biases))
    if not rows:
        unseen = f"; what cannot be looked into: {', '.join(trace.opaque)}" if trace.opaque else ""
        raise UsageError(f"{type(model).__name__} ran no convolution, linear layer or matrix product to audit{unseen}")
    rows = [replace(row, energy_pj=costs.mac * row.macs + costs.ac * row.acs) for row in rows]
    parameters = sum(p.numel() for p in model.parameters())
    return Audit(
        type(model).__name__,
        tuple(rows),
        images,
        mean,
        parameters,
        costs,
        tuple(trace.opaque),
        _untrained_norms(model),
        sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())),
        trace.fired,
        trace.activations,
    )


def _refuse(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"an audit takes a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError(
                f"an audit cannot look into compiled code (module {name or 'model'!r}): "
                "audit the model as it was before torch.compile"
            )


def as_batches(batches: Any) -> Iterable[Any]:
    """Batches, or one alone: a tensor, or a tuple of inputs and integer labels.

    Raises:
        UsageError: neither.
    """
    if isinstance(batches, Tensor):
        return [batches]
    if isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(part, Tensor) for part in batches):
        x, labels = batches
        if x.dim() > 1 and labels.dim() == 1 and not labels.is_floating_point():
            return [batches]
    if not isinstance(batches, Iterable):
        raise UsageError(f"batches must be a tensor, a list or a loader of inputs, got {type(batches).__name__}")
    return batches


def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise UsageError(f"a batch must be a tensor, or inputs and labels, got {type(batch).__name__}")


def _reset(model: nn.Module, reset: Callable[[nn.Module], Any] | None) -> None:
    if reset is not None:
        reset(model)
    for module in model.modules():
        # SpikingJelly's functional.reset_net and snnTorch's utils.reset, which a user may forget.
        for library, method in (("spikingjelly.", "reset"), ("snntorch._neurons", "reset_mem")):
            if any(kind.__module__.startswith(library) for kind in type(module).__mro__):
                forget = getattr(module, method, None)
                if callable(forget):
                    forget()


def _untrained_norms(model: nn.Module) -> int:
    """Norms with the statistics that they were made with."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    return sum(
        norm.running_mean is not None
        and norm.running_var is not None
        and not norm.running_mean.any()
        and bool((norm.running_var == 1).all())
        for norm in norms
    )


def _sizes(
    model: nn.Module, x: Tensor, labels: Tensor | None, output: Any, batch_axis: int | None, trace: OpTrace
) -> tuple[int, int]:
    """Images of a batch, and T."""
    if isinstance(model, nn.RNNBase):
        if x.dim() == 2:
            return 1, len(x)
        batch_axis = int(not model.batch_first) if batch_axis is None else batch_axis
        return x.shape[batch_axis], x.shape[1 - batch_axis]
    logits: Any = output[0] if isinstance(output, tuple | list) and output else output
    shape = logits.shape if isinstance(logits, Tensor) else torch.Size()
    # Three axes are [T, N, classes] where there are neurons; elsewhere they may be [N, tokens, features].
    sequence = len(shape) == 3 and trace.spiking and shape[1] in x.shape[:2]
    time_first = batch_axis == 1
    if batch_axis is not None:
        images = x.shape[batch_axis]
    elif labels is not None:
        images = len(labels)
    elif sequence:
        images = shape[1]
    elif len(shape) == 2 and x.dim() > 2 and shape[0] in x.shape[:2]:
        images = shape[0]
    else:
        time_first = x.dim() == 5
        images = x.shape[int(time_first)]
    if images == 0:
        raise UsageError(f"a batch of shape {tuple(x.shape)} holds no image")
    if sequence and shape[1] == images:
        return images, shape[0]
    if time_first or (x.dim() > 1 and x.shape[0] != images and x.shape[1] == images):
        return images, x.shape[0]
    return images, trace.steps(images)
