"""Changes to the plan and the tensors of an engine's file, each of which a reader refuses or understands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


def write(path: Path, plan: str, tensors: dict[str, Tensor]) -> None:
    metadata = {"format": "spikeloom event engine 1", "plan": plan}
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


STRANGE: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    64,
    255,
    256,
    1000,
    1024,
    1 << 16,
    1 << 20,
    1 << 31,
    1 << 63,
    10**30,
    -(1 << 40),
    0.5,
    -0.0,
    1e38,
    1e-45,
    1e300,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "conv",
    "x" * 10_000,
    [],
    [1],
    [1, 2, 3],
    {},
    {"x": 1},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, part in inner for place in places(part, (*path, key))]


def changed(plan: Any, chance: random.Random) -> Any:
    """The plan with one to three values replaced, removed or doubled."""
    plan = json.loads(json.dumps(plan))
    for _ in range(chance.randint(1, 3)):
        *outer, key = chance.choice(places(plan))
        parent = plan
        for part in outer:
            parent = parent[part]
        what = chance.random()
        if what < 0.1:
            del parent[key]
        elif what < 0.2 and isinstance(parent, list):
            parent.insert(key, json.loads(json.dumps(parent[key])))
        elif what < 0.4 and isinstance(parent[key], int):
            parent[key] += chance.choice((-1, 1))
        else:
            parent[key] = chance.choice(STRANGE)
    return plan


def changed_text(plan: Any, chance: random.Random, number: int) -> str:
    """The plan changed, as a text, which every hundredth time has a number of thousands of digits."""
    text = json.dumps(changed(plan, chance))
    return text.replace("2", "2" * chance.choice((4000, 5000)), 1) if number % 100 == 0 else text


CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t[:0],
    lambda t: t[:1],
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.transpose(0, -1),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.to(torch.int8),
    lambda t: t.bfloat16(),
    lambda t: t * torch.nan,
    lambda t: t * torch.inf,
    lambda t: t * 1e38,
    lambda t: torch.zeros_like(t),
    lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    lambda t: t.repeat(*[1] * (t.dim() - 1), 3),
    lambda t: t.sum(),
)


def changed_tensors(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """One or two of the tensors changed or left out."""
    bad = dict(tensors)
    for name in chance.sample(sorted(bad), chance.randint(1, 2)):
        if chance.random() < 0.1:
            del bad[name]
        else:
            bad[name] = chance.choice(CHANGES)(bad[name])
    return bad
