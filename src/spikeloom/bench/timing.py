"""How things are timed: contenders take turns in one run, after warm-up; medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops.layout import fresh


def medians(contenders: dict[str, Callable[[], Any]], repeats: int, budget: float = 20.0) -> dict[str, float]:
    """Milliseconds of each contender, which take turns.

    Args:
        contenders: what to run, by name.
        repeats: timed turns, at least 5; fewer where one turn of all takes more than `budget / repeats` seconds.
        budget: seconds for all turns, not counted the first.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for run in contenders.values():
        run()
    turn = time.perf_counter() - start
    turns = max(5, min(repeats, int(budget / max(turn, 1e-9))))
    for warm in range(turns + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if warm >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, every storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storages.values())


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    """One forward and backward pass of a layer on a leaf x."""

    def run() -> None:
        x.grad = None
        layer(x).backward(grad)

    return run


def copies(x: Tensor, passes: int) -> Callable[[], None]:
    """The floor: as many passes over memory as two a copy, made as plain copies into newly allocated tensors.

    The tensors are allocated as those of the ops are, so that both pay the same for new pages.
    """
    data = x.detach()
    half = data[: (data.shape[0] + 1) // 2]

    def run() -> None:
        for part in [data] * (passes // 2) + [half] * (passes % 2):
            fresh(part, part.dtype).copy_(part)

    return run
