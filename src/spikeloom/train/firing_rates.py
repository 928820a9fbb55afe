"""How a network fires as it begins to train: first rates set by data, warnings after the first epoch."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spikeloom.layers import BatchNorm, NormSpike
from spikeloom.layers.stateless import repeats
from spikeloom.neurons import Neuron
from spikeloom.record import RateMeter

SILENT, SATURATED = 0.001, 0.95  # spikes per neuron and step
_LARGEST_GAIN = 32.0


class FirstRate(NamedTuple):
    """The firing rate of a neuron layer on the first batch.

    Attributes:
        name: of the layer.
        before, after: spikes per neuron and step, as the network was drawn and as it starts.
    """

    name: str
    before: float
    after: float


@torch.no_grad()
def set_first_rates(model: nn.Module, x: Tensor, rate: float) -> list[FirstRate]:
    """Scales what drives each neuron layer until it fires at a wanted rate on one batch, from the input on.

    What is scaled is the weight and bias of the norm in front (in a `NormSpike` beside its residual), or of the
    convolution or linear layer whose output the neurons take. Neurons behind anything else stay as they are, and so
    do those that no scale brings to the rate: an output that starts at zero, for one.

    Args:
        model: its norms take statistics of the batch meanwhile, which are not kept.
        x: inputs as the model takes them.
        rate: spikes per neuron and step.

    Returns:
        The rates, in the order in which the layers run.
    """
    found: list[FirstRate] = []
    outputs: dict[nn.Module, Tensor] = {}
    last: list[nn.Module] = []
    owners = {unit.neuron: unit.norm for unit in model.modules() if isinstance(unit, NormSpike)}

    def driven(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output
        last[:] = [module]

    def fire(neuron: nn.Module, args: tuple[Tensor, ...]) -> None:
        u = args[0]
        driver: Any = owners.get(neuron, last[0] if last else None)
        before = _rate(neuron, u)
        y = outputs.pop(driver, None)
        if driver is None or y is None or (neuron not in owners and y.data_ptr() != u.data_ptr()):
            found.append(FirstRate(names[neuron], before, before))
            return
        y = y.view_as(u)
        gain, after = _gain(neuron, u, y, rate, before)
        for parameter in (driver.weight, driver.bias):
            if parameter is not None:
                parameter.mul_(gain)
        found.append(FirstRate(names[neuron], before, after))
        # In place, because a membrane shortcut carries the same tensor on; the steps of a static image share memory.
        (u[0] if repeats(u) else u).add_((gain - 1) * (y[0] if repeats(u) else y))

    names = {module: name for name, module in model.named_modules()}
    kinds = BatchNorm | nn.modules.conv._ConvNd | nn.Linear  # pyright: ignore[reportPrivateUsage]
    handles = [m.register_forward_hook(driven) for m in model.modules() if isinstance(m, kinds)]
    handles += [m.register_forward_pre_hook(fire) for m in model.modules() if isinstance(m, Neuron) and m.fires]
    try:
        with _trying(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _trying(model: nn.Module) -> Generator[None]:
    """Inside, the model is in training mode; its running statistics and mode are restored afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    model.train()
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        model.train(training)


def _rate(neuron: nn.Module, u: Tensor) -> float:
    return float(neuron.forward(u).float().mean())


def _gain(neuron: nn.Module, u: Tensor, y: Tensor, rate: float, before: float) -> tuple[float, float]:
    """The factor of y, and the rate of the neurons on u with y scaled so; 1 where no factor gives it."""
    low, high = math.log(1 / _LARGEST_GAIN), math.log(_LARGEST_GAIN)
    best = (abs(before - rate), 1.0, before)
    for _ in range(14):
        middle = (low + high) / 2
        gain = math.exp(middle)
        found = _rate(neuron, u + (gain - 1) * y)
        best = min(best, (abs(found - rate), gain, found))
        low, high = (middle, high) if found < rate else (low, middle)
    return (best[1], best[2]) if best[0] < 0.5 * rate else (1.0, before)


@torch.no_grad()
def describe_rates(model: nn.Module, x: Tensor) -> list[str]:
    """Names layers that hardly fire, or hardly ever rest, on one batch of training, a line each."""
    lines: list[str] = []
    with _trying(model), RateMeter(model) as meter:
        model(x)
    for name, rate in meter.rates().items():
        if rate < SILENT:
            state, remedy = "nearly silent", "lower v_threshold, raise the weight of its norm"
        elif rate > SATURATED:
            state, remedy = "saturated", "raise v_threshold, lower the weight of its norm"
        else:
            continue
        lines.append(
            f"layer {name} is {state} after the first epoch, rate {100 * rate:.2f} %: "
            f"{remedy}, or set train.initial_rate"
        )
    return lines


def goes_nowhere(accuracy: float, classes: int, seen: int) -> bool:
    """Whether a training accuracy in percent, of at least 1,000 images, is within three standard errors of guessing."""
    chance = 1 / classes
    return seen >= 1000 and accuracy / 100 < chance + 3 * math.sqrt(chance * (1 - chance) / seen)
