"""Time and memory of a layer of LIF neurons, against SpikingJelly and against the bytes that must move.

    python benchmarks/neurons.py [--json FILE]

Every figure is a median; contenders take turns within one run, after warm-up. The floor is the number of passes over
memory that any implementation must make (forward: read x, write s; backward: read dS, read x, write dX), made as plain
copies into newly allocated tensors of the same sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikeloom.neurons import LIF
from spikeloom.train.run import environment

SHAPES = [(4, 32, 64, 32, 32), (64, 32, 256), (4, 32, 256), (16, 32, 256), (256, 32, 256), (1024, 32, 256)]


def medians(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each contender, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 3):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= 3:
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


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    data = x.detach()
    ours = LIF(tau=2.0)

    def both(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            layer(x).backward(grad)

        return run

    def floor() -> None:
        torch.empty_like(data).copy_(data)  # forward: one read, one write
        torch.empty_like(data).copy_(data)  # backward: one of the two reads, the write
        torch.empty_like(data)[: (shape[0] + 1) // 2].copy_(data[: (shape[0] + 1) // 2])  # and half a copy: the other

    forward = torch.no_grad()(lambda: ours(data))
    contenders: dict[str, Callable[[], Any]] = {"forward": forward, "both": both(ours), "floor": floor}
    row: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError:
        peer = None
    else:
        node = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")

        def peer(x: Tensor) -> Tensor:
            node.reset()
            return node(x)

        contenders["spikingjelly"] = both(peer)
    found = medians(contenders, repeats)
    row |= {f"{name}_ms": round(value, 3) for name, value in found.items()}
    row["ratio_to_floor"] = round(found["both"] / found["floor"], 2)
    row["saved_bytes_per_input_byte"] = round(saved_bytes(lambda: ours(x)) / data.nbytes, 2)
    if peer is not None:
        row["times_faster_than_spikingjelly"] = round(found["spikingjelly"] / found["both"], 2)
        row["spikingjelly_saved_bytes_per_input_byte"] = round(saved_bytes(lambda: peer(x)) / data.nbytes, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            rows.append(measure(shape, dtype, arguments.repeats))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
