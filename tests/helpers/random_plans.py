"""Random plans of the event engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import (
    Affine,
    Conv,
    Fire,
    Flatten,
    Join,
    Map,
    Mean,
    Neuron,
    PadChannels,
    Plan,
    PlanError,
    Pool,
    Step,
    Time,
    Value,
)


def grid(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape) / 8


class RandomPlan:
    """Plans whose parts fit, and weights of which no sum rounds."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        side = chance.choice((1, 1, 2, 5, 6))
        self.input = Value(height=side, width=chance.choice((1, side)), channels=chance.choice((1, 3, 17, 40)))
        self.values, self.steps, self.tensors = [self.input], list[Step](), dict[str, Tensor]()
        self.add(Fire, x=0, keep_sum=False, neuron=self.neuron())
        for _ in range(chance.randint(1, 8)):
            self.one()
        self.add(Mean, x=len(self.values) - 1)

    def add(self, make: Callable[..., Step], **fields: Any) -> bool:
        """Adds a step, if it fits."""
        results = fields.get("keep_sum", True) + (fields.get("neuron") is not None)
        first = len(self.values)
        step = make(layer=str(first), out=tuple(range(first, first + results)), **fields)
        try:
            made = step.infer([self.values[index] for index in step.reads()], self.tensors)
        except PlanError:
            return False
        if any(value.size > 1 << 14 for value in made):
            return False
        self.steps.append(step)
        self.values += made
        return True

    def neuron(self) -> Neuron:
        levels = self.chance.choice((1, 1, 1, 3))
        return Neuron(
            decay=self.chance.choice((0.0, 0.5, 1.0)),
            gain=self.chance.choice((0.5, 1.0)),
            threshold=tuple(0.5 * (level + 1) for level in range(levels)),
            v_reset=self.chance.choice((None, 0.0, -0.5)),
            strict_firing=self.chance.random() < 0.3,
        )

    def one(self) -> None:
        x = self.chance.randrange(1, len(self.values))
        value, pick = self.values[x], self.chance.random()
        if pick < 0.6:
            self.conv(x, value)
        elif pick < 0.7:
            kernel = self.chance.choice((1, 2, 3))
            self.add(
                Pool,
                op=self.chance.choice(("max_pool", "avg_pool")),
                x=x,
                kernel=kernel,
                stride=self.chance.choice((1, 2)),
                padding=self.chance.randint(0, kernel // 2),
            )
        elif pick < 0.75:
            self.add(PadChannels, x=x, before=self.chance.randint(0, 3), behind=self.chance.randint(0, 3))
        elif pick < 0.8:
            self.add(
                Join, op=self.chance.choice(("add", "mul", "cat")), xs=(x, self.chance.randrange(1, len(self.values)))
            )
        elif pick < 0.85:
            self.tensors[f"k{len(self.values)}"] = grid(1, 1, self.chance.choice((1, value.channels)))
            self.add(Affine, op="affine", x=x, bias=f"k{len(self.values)}")
        elif pick < 0.9:
            self.add(Flatten, x=x)
        elif pick < 0.95:
            self.add(Map, op=self.chance.choice(("relu", "complement", "scale")), x=x, high=0.5)
        else:
            self.add(Time, op=self.chance.choice(("time_mean", "time_last")), x=x)

    def conv(self, x: int, value: Value) -> None:
        kernel = self.chance.choice(((1, 1), (3, 3), (2, 2), (1, 3), (5, 5)))
        groups = value.channels if self.chance.random() < 0.2 else 1
        out = groups if groups > 1 else self.chance.choice((1, 5, 16, 33, 70))
        number = len(self.values)
        shape, scale = (out, value.channels // groups, *kernel), None
        self.tensors[f"w{number}"], self.tensors[f"b{number}"] = grid(*shape), grid(out)
        if self.chance.random() < 0.4:
            scale, largest = f"s{number}", self.chance.choice((15, 127))
            self.tensors[f"w{number}"] = torch.randint(-largest, largest + 1, shape, dtype=torch.int8)
            self.tensors[scale] = torch.exp2(torch.randint(-6, -3, (out,)).float())
        neuron = self.neuron() if self.chance.random() < 0.7 else None
        same = [i for i, v in enumerate(self.values) if i and v.channels == out]
        fields: dict[str, Any] = {
            "x": x,
            "weight": f"w{number}",
            "scale": scale,
            "bias": self.chance.choice((None, f"b{number}")),
            "groups": groups,
            "stride": self.chance.choice((1, 1, 2, 3)),
            "neuron": neuron,
            "way": "dense",
            "padding": (self.chance.choice((0, kernel[0] // 2, 3)), self.chance.choice((0, kernel[1] // 2, 2))),
            "keep_sum": neuron is None or self.chance.random() < 0.3,
        }
        if not (same and self.chance.random() < 0.5 and self.add(Conv, residual=self.chance.choice(same), **fields)):
            self.add(Conv, **fields)

    def plan(self, T: int) -> Plan:
        """The plan of sequences of T steps."""
        return Plan(input=self.input, T=T, steps=tuple(self.steps), per_step=not self.values[-1].static)

    def example(self, T: int, N: int) -> Tensor:
        """An input [T, N, C, H, W]."""
        return torch.randint(-8, 17, (T, N, self.input.channels, *self.input.places)) / 8
