"""Weights on a grid, for sums of spikes that float32 takes without rounding."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Conv
from spikeloom.deploy.engine.lower import lower, two_images
from spikeloom.deploy.exchange.fold import Model, fold
from spikeloom.errors import UsageError
from spikeloom.layers import Conv2d

_SIGNIFICANT = 24  # bits of float32


def exact(model: Model, example: Tensor) -> Model:
    """A copy, norms folded, whose layers on spikes give the same bits in whatever order their sums are taken.

    Two ways of running one network add in two orders, and where a potential comes to within a rounding error of its
    threshold, one fires and the other does not. Sums of spikes times weights that are multiples of a power of two g are
    multiples of g; where none can exceed 2^24 g, float32 holds each of them. So in every output channel

        g = the least power of two with max(sum of s w where w > 0, sum of -s w where w < 0) <= 2^24 g,

    bias among the w, s the largest value that the layer's inputs can take; weights and bias become their nearest
    multiples of g. The engine that `compile` makes of the copy then says what the copy says in PyTorch. Convolutions of
    the copy are PyTorch's (minimal filtering rounds even these sums) and channels-last as the engine's, so that layers
    on real values, which keep their weights, are the same kernel in both.

    Args:
        model: one that `compile` takes; stays as it is.
        example: an input.

    Raises:
        UsageError: as `compile`, and where a layer's weights are not the network's own parameters.
    """
    twin = copy.deepcopy(model).eval().float()
    twin = fold(twin, two_images(twin, example.detach().float())[1])
    lowered = lower(twin, example)
    values, state = lowered.plan.values(lowered.tensors), twin.state_dict()
    for step in lowered.plan.steps:
        if not isinstance(step, Conv):
            continue
        most = values[step.x].most
        if most is None:  # it reads real values
            continue
        unknown = [name for name in step.tensors() if name not in state]
        if unknown:
            raise UsageError(f"{step.layer}: its weights are computed, not kept: no grid can be given to them")
        weight, bias = state[step.weight], None if step.bias is None else state[step.bias]
        _round(weight, bias, most)
    for layer in twin.modules():
        if isinstance(layer, Conv2d):
            layer.dense = True
    return twin.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _round(weight: Tensor, bias: Tensor | None, most: int) -> None:
    """Rounds the weights [C', ...] and bias [C'] of sums over inputs up to `most`, in place."""
    rows = weight.double().flatten(1)
    terms = most * rows
    if bias is not None:
        terms = torch.cat([terms, bias.double().unsqueeze(1)], 1)
    largest = torch.maximum(terms.clamp(min=0).sum(1), -terms.clamp(max=0).sum(1))
    # Rounding may lengthen every term by g / 2 times its input.
    largest *= 1 + most * terms.shape[1] * 2.0**-_SIGNIFICANT
    grid = torch.exp2(torch.log2(largest.clamp(min=2.0**-80)).ceil() - _SIGNIFICANT).unsqueeze(1)
    weight.copy_(((rows / grid).round() * grid).reshape(weight.shape))
    if bias is not None:
        bias.copy_((bias.double().unsqueeze(1) / grid).round().mul(grid).squeeze(1))
