"""Steps that run as one: shortcuts, neurons and scales as part of the steps whose results they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spikeloom.deploy.engine.ir import Attention, Conv, Fire, Join, Map, Step, Value


@dataclass(frozen=True)
class Fused:
    """A list of steps, twice.

    Attributes:
        steps: those of a plan, which keep what later steps read.
        whole: the same steps, of which each keeps the sums at which its neurons fire.
        numbers: by value before fusing, its number in `whole`.
    """

    steps: tuple[Step, ...]
    whole: tuple[Step, ...]
    numbers: dict[int, int]


def fuse(steps: Sequence[Step], values: Sequence[Value], last: int) -> Fused:
    """The steps that `last` needs, with what follows convolutions and attention merged into them."""
    needed, kept = {last}, list[Step]()
    for step in reversed(steps):
        if needed.intersection(step.out):
            needed.update(step.reads())
            kept.append(step)
    order: list[Step | None] = [*_apart([*reversed(kept)], values, last)]
    for i, step in enumerate(order):
        if isinstance(step, Conv) and step.residual is None and step.neuron is None:
            _merge_conv(order, i, step, values, last)
        elif isinstance(step, Attention) and step.scale == 1.0:
            _merge_scale(order, i, step, last)
    whole = [step for step in order if step is not None]
    read = {last, *(index for step in whole for index in step.reads())}
    slim = [_without_sum(step) if _fires(step) and step.out[0] not in read else step for step in whole]
    return Fused(_numbered(slim)[0], *_numbered(whole))


def _apart(steps: Sequence[Step], values: Sequence[Value], last: int) -> list[Step]:
    """The steps with neurons on channels side by side (Ghost modules) as neurons on every part.

    Joined are then their spikes, a quarter of the bytes, and each part's neurons can become part of its convolution.
    """
    joins = {step.out[0]: step for step in steps if isinstance(step, Join) and step.op == "cat"}
    number = len(values)
    apart = [*steps]
    for fire in steps:
        cat = joins.get(fire.x) if isinstance(fire, Fire) else None
        if not isinstance(fire, Fire) or cat is None or len(_readers(steps, fire.x)) > 1 or fire.x == last:
            continue
        if fire.residual is None and not fire.keep_sum and not any(values[x].spikes for x in cat.xs):
            made = range(number, number + len(cat.xs))
            number += len(cat.xs)
            fires = [fire.model_copy(update={"x": x, "out": (n,)}) for x, n in zip(cat.xs, made, strict=True)]
            at = apart.index(cat)
            apart[at : at + 1] = fires
            apart[apart.index(fire)] = cat.model_copy(update={"xs": tuple(made), "out": fire.out})
    return apart


def _readers(order: Sequence[Step | None], value: int) -> list[int]:
    return [i for i, step in enumerate(order) if step is not None for index in step.reads() if index == value]


def _merge_conv(order: list[Step | None], i: int, conv: Conv, values: Sequence[Value], last: int) -> None:
    """Makes the shortcut that is added to a convolution, and the neurons on the sum, part of it."""
    at, merged, sums = i, conv, conv.out[0]
    users = _readers(order, sums)
    joins = order[users[0]] if len(users) == 1 and sums != last else None
    if isinstance(joins, Join) and joins.op == "add":
        other = joins.xs[1] if joins.xs[0] == sums else joins.xs[0]
        shapes = [(values[index].places, values[index].channels) for index in (other, sums)]
        if other != sums and shapes[0] == shapes[1]:
            order[i], at, sums = None, users[0], joins.out[0]
            merged = merged.model_copy(update={"residual": other, "out": (sums,)})
            users = _readers(order, sums)
    fires = [user for user in users if isinstance(order[user], Fire)]
    if fires:
        fire = order[fires[0]]
        assert isinstance(fire, Fire)
        merged = merged.model_copy(update={"neuron": fire.neuron, "out": (sums, *fire.out)})
        order[fires[0]] = None
    order[at] = merged


def _merge_scale(order: list[Step | None], i: int, attention: Attention, last: int) -> None:
    """Makes the scale of a product that nothing else reads part of it."""
    users = _readers(order, attention.out[0])
    scale = order[users[0]] if len(users) == 1 and attention.out[0] != last else None
    if isinstance(scale, Map) and scale.op == "scale":
        order[i] = None
        order[users[0]] = attention.model_copy(update={"scale": attention.scale * scale.high, "out": scale.out})


def _fires(step: Step) -> bool:
    return isinstance(step, Conv) and step.neuron is not None


def _without_sum(step: Step) -> Step:
    return step.model_copy(update={"keep_sum": False, "out": step.out[1:]})


def _numbered(steps: Sequence[Step]) -> tuple[tuple[Step, ...], dict[int, int]]:
    numbers = {0: 0}
    for step in steps:
        for index in step.out:
            numbers[index] = len(numbers)
    return _renumbered(steps, numbers.__getitem__), numbers


def _renumbered(steps: Sequence[Step], new: Callable[[int], int]) -> tuple[Step, ...]:
    """The steps with other indices for values."""
    names = ("x", "residual", "q", "k", "v")
    changed: list[Step] = []
    for step in steps:
        update: dict[str, object] = {"out": tuple(map(new, step.out))}
        update |= {n: new(getattr(step, n)) for n in names if getattr(step, n, None) is not None}
        if isinstance(step, Join):
            update["xs"] = tuple(map(new, step.xs))
        changed.append(step.model_copy(update=update))
    return tuple(changed)
