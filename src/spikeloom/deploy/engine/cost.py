"""What a plan will cost, said before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from spikeloom.deploy.engine.ir import Attention, Conv, Fire, Plan, Pool, Step, Value

BYTE, FLOAT = 4, 16  # products that take as long as reading or writing one


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
    size = sum((1 if value.static else plan.T) * value.size * (1 if value.spikes else 4) for value in values)
    operations = 0
    for step in plan.steps:
        n, elements = _touched(step, plan, values)
        operations += n * (elements + _products(step, values, tensors))
        if isinstance(step, Conv) and values[step.x].spikes:
            size += 4 * n * values[step.x].size  # as numbers, where the layer runs densely
    return Cost(size, operations)


def operations_of_pytorch(plan: Plan, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """About how many products of one image are PyTorch's (dense layers, and steps without a kernel of ours), and ours.

    Args: as `cost_of`.
    """
    theirs = ours = 0
    for step in plan.steps:
        n, elements = _touched(step, plan, values)
        bytes_only = values[step.out[0]].spikes
        if isinstance(step, (Fire, Attention)) or (isinstance(step, Pool) and step.op == "max_pool" and bytes_only):
            ours += n * elements
        elif isinstance(step, Conv) and step.way == "event":
            ours += n * _products(step, values, tensors)
        elif isinstance(step, Conv):
            theirs += (1 if values[step.x].static else n) * _products(step, values, tensors)
        else:
            theirs += n * elements * (BYTE if bytes_only else FLOAT)
    return theirs, ours


def _touched(step: Step, plan: Plan, values: Sequence[Value]) -> tuple[int, int]:
    """How often a step runs for an image, and the elements that it reads and writes then."""
    touched = [values[index] for index in (*step.reads(), *step.out)]
    return 1 if all(value.static for value in touched) else plan.T, sum(value.size for value in touched)


def _products(step: Step, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> int:
    """Of one step of one image."""
    made = values[step.out[0]]
    if isinstance(step, Conv):
        return made.size * tensors[step.weight][0].numel()
    if isinstance(step, Pool):
        return made.size * step.kernel**2
    if isinstance(step, Attention):
        return 2 * made.size * (made.channels // step.heads)
    return 0
