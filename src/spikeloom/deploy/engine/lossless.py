"""Networks whose weights are on a grid: for sums of spikes that float32 takes without rounding, and for 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Conv, Plan
from spikeloom.deploy.engine.lower import lower, two_images
from spikeloom.deploy.exchange.fold import Model, fold
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d

_SIGNIFICANT = 24  # bits of float32
_LARGEST = 127  # of int8


def exact(model: Model, example: Tensor) -> Model:
    """A copy, norms folded, whose layers on spikes give the same bits in whatever order their sums are taken.

    Two ways of running one network add in two orders, and where a potential comes to within a rounding error of its
    threshold, one fires and the other does not. Sums of spikes times weights that are multiples of a power of two g are
    multiples of g; where none can exceed 2^24 g, float32 holds each of them. So in every output channel

        g = the least power of two with max(sum of s w where w > 0, sum of -s w where w < 0) <= 2^24 g,

    bias among the w, s the largest value that the layer's inputs can take; weights and bias become their nearest
    multiples of g. The engine `compile(copy, example, portable=False)` then says what the copy says in PyTorch.
    Convolutions of the copy are PyTorch's (minimal filtering rounds even these sums) and channels-last as the engine's,
    so that layers on real values, which keep their weights, are the same kernel in both.

    Args:
        model: one that `compile` takes; stays as it is.
        example: an input.

    Raises:
        UsageError: as `compile`, and where a layer's weights are not the network's own parameters.
    """

    def round_weights(weight: Tensor, bias: Tensor | None, most: int | None) -> None:
        if most is None:  # it reads real values
            return
        grid = _of_sums(weight, bias, most)
        weight.copy_(_nearest(weight.double(), grid.view(-1, *[1] * (weight.dim() - 1))))
        if bias is not None:
            bias.copy_(_nearest(bias.double(), grid))

    return _rounded(model, example, round_weights)


def quantized(model: Model, example: Tensor) -> Model:
    """A copy, norms folded, whose weights are 8-bit integers times a power of two for every output channel.

        w = q g,  q in -127 .. 127,  g the power of two with the least sum of squared errors,

    of the least g with which no weight is cut off, and half of it. Potentials stay float32; so do biases, rounded to 24
    bits of their sums (as in `exact`). The engine of `compile(model, example, weights="int8")` runs these integers.
    Sums of spikes are whole numbers there and multiples of g here, none of which float32 rounds: with `portable=False`
    the engine says to the bit what the copy says in PyTorch.

    Args:
        model: one that `compile` takes; stays as it is.
        example: an input.

    Raises:
        UsageError: as `compile`, and where a layer's weights are not the network's own parameters.
    """

    def round_weights(weight: Tensor, bias: Tensor | None, most: int | None) -> None:
        rows = weight.double().flatten(1)
        widest = _grid(rows)
        on_grids = [(rows / grid).round().clamp(-_LARGEST, _LARGEST) * grid for grid in (widest, widest / 2)]
        errors = [(found - rows).square().sum(1, keepdim=True) for found in on_grids]
        weight.copy_(torch.where(errors[0] <= errors[1], *on_grids).reshape(weight.shape))
        if bias is not None and most is not None:
            bias.copy_(_nearest(bias.double(), _of_sums(weight, bias, most)))

    return _rounded(model, example, round_weights)


def as_integers(plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """The plan and weights of a network that `quantized` made, with its integers as int8 and their scales."""
    found, steps = dict(tensors), list(plan.steps)
    for i, step in enumerate(steps):
        if not isinstance(step, Conv):
            continue
        weight = tensors[step.weight]
        scale = _grid(weight.flatten(1))
        integers = weight / scale.view(-1, 1, 1, 1)
        assert torch.equal(integers, integers.round()), step.layer
        found |= {step.weight: integers.to(torch.int8), f"{step.weight}.scale": scale.flatten()}
        steps[i] = step.model_copy(update={"scale": f"{step.weight}.scale"})
    return plan.model_copy(update={"steps": tuple(steps)}), found


def _of_sums(weight: Tensor, bias: Tensor | None, most: int) -> Tensor:
    """The grid of every output channel [C'] on which no sum of weights [C', ...] times inputs up to `most` rounds."""
    terms = most * weight.double().flatten(1)
    if bias is not None:
        terms = torch.cat([terms, bias.double().unsqueeze(1)], 1)
    largest = torch.maximum(terms.clamp(min=0).sum(1), -terms.clamp(max=0).sum(1))
    # Rounding may lengthen every term by g / 2 times its input.
    largest *= 1 + most * terms.shape[1] * 2.0**-_SIGNIFICANT
    return torch.exp2(torch.log2(largest.clamp(min=2.0**-80)).ceil() - _SIGNIFICANT)


def _nearest(x: Tensor, grid: Tensor) -> Tensor:
    return (x / grid).round() * grid


def _grid(rows: Tensor) -> Tensor:
    """The least power of two in which no element of a row [rows, 1] exceeds int8."""
    widest = rows.abs().amax(1, keepdim=True).clamp(min=2.0**-80)
    return torch.exp2(torch.log2(widest / _LARGEST).ceil())


def _rounded(
    model: Model, example: Tensor, round_weights: Callable[[Tensor, Tensor | None, int | None], None]
) -> Model:
    """A copy, norms folded, with weights and biases changed in place by round_weights(weight, bias, largest input)."""
    twin = copy.deepcopy(model).eval().float()
    twin = fold(twin, two_images(twin, example.detach().float())[1])
    lowered = lower(twin, example)
    values, state = lowered.plan.values(lowered.tensors), twin.state_dict()
    for step in lowered.plan.steps:
        if not isinstance(step, Conv):
            continue
        unknown = [name for name in step.tensors() if name not in state]
        if unknown:
            raise UsageError(f"{step.layer}: its weights are computed, not kept: no grid can be given to them")
        bias = None if step.bias is None else state[step.bias]
        round_weights(state[step.weight], bias, values[step.x].most)
    for layer in twin.modules():
        if isinstance(layer, Conv2d):
            layer.dense = True
    return twin.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
