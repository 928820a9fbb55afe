"""What a plan will cost, said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from spikeloom.deploy.engine.ir import Attention, Conv, Plan, Pool, Step, Value


class Cost(NamedTuple):
    """What one image costs an engine.

    Attributes:
        bytes: of all maps.
        operations: multiplications and additions, if no input were zero, and elements that are read or written.
    """

    bytes: int
    operations: int


def cost_of(plan: Plan, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> Cost:
    """The cost of one image, with T steps.

    Args:
        plan, tensors: of an engine.
        values: `plan.values(tensors)`.
    """
    steps = [1 if value.static else plan.T for value in values]
    size = sum(n * value.size * (1 if value.spikes else 4) for n, value in zip(steps, values, strict=True))
    operations = 0
    for step in plan.steps:
        touched = (*step.reads(), *step.out)
        n = max(steps[index] for index in touched)
        operations += n * (sum(values[index].size for index in touched) + products(step, values, tensors))
        if isinstance(step, Conv) and values[step.x].spikes:
            size += 4 * n * values[step.x].size  # as numbers, where the layer runs densely
    return Cost(size, operations)


def products(step: Step, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> int:
    """Products of a layer for one time step of one image."""
    made = values[step.out[0]]
    if isinstance(step, Conv):
        return made.size * tensors[step.weight][0].numel()
    if isinstance(step, Pool):
        return made.size * step.kernel**2
    if isinstance(step, Attention):
        return 2 * made.size * (made.channels // step.heads)
    return 0
