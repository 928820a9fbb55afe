"""Comparing an engine with the network that it was made from, step by step.

Two runs of a network differ where a potential comes to within a rounding error of its threshold, and from there on in
everything: a comparison of logits would have to allow any difference. So every step is run by itself on what the graph
of the network has as its inputs. Sums must then be the graph's within what rounding in any order explains, and neurons
must give the spikes that their equations make of these sums, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from spikeloom.deploy.engine.engine import Engine
from spikeloom.deploy.engine.ir import Affine, Attention, Conv, Join, Map, Mean, Pool, Step, Time, Value
from spikeloom.deploy.engine.lower_state import Lowered
from spikeloom.deploy.engine.views import View
from spikeloom.deploy.exchange.graph import described
from spikeloom.errors import UsageError
from spikeloom.ops.scan import scan
from spikeloom.surrogates import ATan

_HALF_UNIT = 2.0**-24  # the largest rounding error of float32, relative
_BF16 = 2.0**-8  # of a weight


def verify(engine: Engine, lowered: Lowered) -> None:
    """Runs the engine's steps on two images.

    Raises:
        UsageError: a step gives something else than the network; the message names the layer.
    """
    # The same steps, with the sums of all neurons.
    steps = [
        step.model_copy(update={"way": own.way, "scale": own.scale}) if isinstance(own, Conv) else step
        for step, own in zip(lowered.fused.whole, engine.steps, strict=True)
    ]
    whole = engine.with_steps(steps)
    with torch.no_grad():
        T, N = lowered.plan.T if whole.values[0].static else len(lowered.example), 2
        run = _Graph(lowered, whole.values, N)
        given = _with_parts(run.values(), whole)
        with whole.executor(T, N) as executor:
            for step, read, made in executor.each_step(given[0], given):
                for index, got in zip(step.out, made, strict=True):
                    fired = isinstance(step, Conv) and index != step.out[0]
                    if fired:
                        _same(step, got, _spikes(step, made[0], T))  # pyright: ignore[reportArgumentType]
                    elif index in given:
                        _close(step, got, given[index], read, engine)
        if not torch.equal(engine(run.x), whole(run.x)):
            raise UsageError("the engine's steps, each as the network's, do not add up to it: run the model itself")


class _Graph(fx.Interpreter):
    """Runs the graph of a network and keeps what the engine's values are there, as maps [T or 1, N, H, W, C]."""

    def __init__(self, lowered: Lowered, values: Sequence[Value], N: int):
        super().__init__(lowered.program.graph_module)
        self._lowered, self._values, self._N = lowered, values, N
        self._found: dict[int, Tensor] = {}
        axis = 0 if values[0].static else 1
        self.x = lowered.example.narrow(axis, 0, N)

    def values(self) -> dict[int, Tensor]:
        inputs = self._lowered.inputs
        self.run(*(self.x if isinstance(value, View) else value for value in inputs.values()))
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        view = self._lowered.views.get(n)
        index = None if view is None else self._lowered.fused.numbers.get(view.value)
        if view is not None and index is not None:
            maps = self._as_maps(view, result, self._values[index])
            known = self._found.setdefault(index, maps.clone())
            if not bool(((maps == known) | maps.isnan()).all()):
                raise UsageError(f"{described(n)}: the engine takes {n.target} for other axes: run the model itself")
        return result

    def _as_maps(self, view: View, x: Tensor, value: Value) -> Tensor:
        maps = view.to_map(x, value)
        maps = maps.reshape(-1, self._N, *maps.shape[-3:])
        if value.static and not bool(((maps == maps[:1]) | maps.isnan()).all()):
            raise UsageError("the engine takes steps for the same that differ: run the model itself")
        return maps[:1] if value.static else maps


def _with_parts(given: dict[int, Tensor], engine: Engine) -> dict[int, Tensor]:
    """The values, and of what the engine joins along the channels where the network does not, the parts."""
    for step in engine.steps:
        if isinstance(step, Join) and step.op == "cat" and step.out[0] in given:
            parts = given[step.out[0]].split([engine.values[index].channels for index in step.xs], -1)
            given = dict(zip(step.xs, parts, strict=True)) | given
    return given


def _spikes(step: Conv, sums: Tensor, T: int) -> Tensor:
    """What the step's neurons make of sums."""
    neuron = step.neuron
    assert neuron is not None
    x = sums.expand(T, *sums.shape[1:]).contiguous()
    return scan(
        x,
        None,
        neuron.decay,
        neuron.gain,
        neuron.threshold,
        neuron.v_reset,
        ATan(),
        True,
        False,
        strict=neuron.strict_firing,
    )[0]


def _close(step: Step, got: Tensor, wanted: Tensor, read: Sequence[Tensor], engine: Engine) -> None:
    """Compares what a step made with the network's, within rounding where it is real."""
    if got.dtype == torch.uint8:
        _same(step, got, wanted)
        return
    limit = _conv_error(step, read, engine) if isinstance(step, Conv) else _error(step, wanted, read, engine)
    off = torch.where((got == wanted) | wanted.isnan(), 0.0, (got - wanted).abs()).nan_to_num(torch.inf)
    if bool((off > limit).any()):
        worst = (off - limit).argmax()
        _refuse(step, f"{got.flatten()[worst]:.6g} where the network has {wanted.flatten()[worst]:.6g}")


def _same(step: Step, got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got.to(wanted.dtype), wanted):
        count = int((got != wanted).sum())
        _refuse(step, f"other spikes than the network in {count} of {got.numel()} places")


def _refuse(step: Step, what: str) -> None:
    raise UsageError(f"{step.layer}: the engine's {step.op} gives {what}, on the same input: run the model itself")


def _conv_error(step: Conv, read: Sequence[Tensor], engine: Engine) -> Tensor:
    """What rounding can change in a convolution's sums, in whatever order they are taken."""
    weight = step.real_weight(engine.tensors)
    x = read[0].flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32)
    bias = None if step.bias is None else engine.tensors[step.bias].abs()
    terms = F.conv2d(x.abs(), weight.abs(), bias, step.stride, step.padding, 1, step.groups)
    terms = terms.permute(0, 2, 3, 1).unflatten(0, read[0].shape[:2])
    if len(read) > 1:
        terms = terms + read[1].abs()
    count = weight[0].numel() + 16
    return terms * (2 * count * _HALF_UNIT + (_BF16 if engine.tensors[step.weight].dtype == torch.bfloat16 else 0.0))


def _error(step: Step, wanted: Tensor, read: Sequence[Tensor], engine: Engine) -> Tensor:
    """What rounding can change in any other step's results."""
    largest = torch.stack([wanted.abs().amax(), *(x.float().abs().amax() for x in read)]).nan_to_num(0, 0).amax()
    count = 16
    if isinstance(step, Mean):
        count += read[0].shape[2] * read[0].shape[3]
    elif isinstance(step, Pool):
        count += step.kernel**2
    elif isinstance(step, Time):
        count += len(read[0])
    elif isinstance(step, Attention):
        count += read[0].shape[2:].numel()
    elif isinstance(step, Map):
        largest = largest.clamp(min=1.0) + abs(step.high)
    elif isinstance(step, Affine):
        weight, bias = (
            None if name is None else engine.tensors[name].abs().amax() for name in (step.weight, step.bias)
        )
        largest = largest * (1 if weight is None or step.op == "divide" else 1 + weight) + (0 if bias is None else bias)
    return largest * (2 * count * _HALF_UNIT)
