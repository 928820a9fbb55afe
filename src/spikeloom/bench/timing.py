"""How things are timed: contenders take turns in one run, each timed in the state that itself has left; medians."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spikeloom.ops._layout import like


def medians(
    contenders: dict[str, Callable[[], Any]], repeats: int, budget: float = 20.0, pause: float = 0.0
) -> dict[str, float]:
    """Milliseconds of each contender, which take turns.

    In its turn a contender runs twice, and the second is timed: what lies in the caches and in the allocator is then
    its own, not that of whoever ran before.

    Args:
        contenders: what to run, by name.
        repeats: timed turns, at least 5; fewer where one turn of all takes more than `budget / repeats` seconds.
        budget: seconds for all turns, not counted the first.
        pause: seconds before a turn, in which threads of whoever ran before stop waiting for work.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for run in contenders.values():
        run()
    turn = 2 * (time.perf_counter() - start)
    turns = max(5, min(repeats, int(budget / max(turn, 1e-9))))
    for _ in range(turns):
        for name, run in contenders.items():
            time.sleep(pause)
            run()
            start = time.perf_counter()
            run()
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


def copies(x: Tensor, grad: Tensor) -> Callable[[], None]:
    """The floor of a forward and backward pass that keeps nothing but its input: its traffic as plain copies.

    Forward x is read and the output written, one copy. Backward the output's gradient and x are read and x's gradient
    written: a copy, and one of half of x. The copies go into tensors that are allocated as those of the ops are and
    live as long: the output until the end, x's gradient until the next run.
    """
    x = x.detach()
    half = x[: (x.shape[0] + 1) // 2]
    kept: list[Tensor] = []

    def copy(source: Tensor) -> Tensor:
        return like(source, source.dtype).copy_(source)

    def run() -> None:
        kept.clear()
        output = copy(x)
        copy(half)
        kept.append(copy(grad))
        del output

    return run
