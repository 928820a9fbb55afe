"""Single images by the event engine on a busy machine, beside ONNX Runtime.

    python benchmarks/load.py [NETWORK ...] [data.KEY=VALUE ...]     # a minute a network; --record writes results/bench

Of each network: milliseconds of one image, the median and the 90th percentile, on the machine as it is and beside one
process that computes without end; then images a second of one caller with one thread, and of two callers in two Python
threads with one thread each. A network is as `spikeloom run` takes it, and trained or with norms calibrated on the
images. All layers that can run by events do. Engine and ONNX Runtime take turns of half a second. What somebody else
computes meanwhile shows in "quiet": measure on a machine that nobody uses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import rivals
import torch

from spikeloom.analyse import calibrated
from spikeloom.analyse.load import open_target
from spikeloom.bench.write import earlier_results, kept, write_results
from spikeloom.deploy import compile
from spikeloom.train.recipe import parse_overrides

Json = dict[str, Any]
Runs = dict[str, Callable[[], Any]]
RESULTS = Path(__file__).parents[1] / "results" / "bench"
NETWORKS = ("report_vgg16", "weights:report_sew_resnet34/cifar10")
TURN = 0.5  # seconds


@contextmanager
def busy_process() -> Generator[None]:
    """One process that computes without end, on any core."""
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        child.kill()
        child.wait()


def latencies(runs: Runs, turns: int) -> Json:
    """Median and 90th percentile of the milliseconds of a call, by contender."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):  # the first is not counted
        for name, run in runs.items():
            run()  # finds threads asleep and cold caches
            found: list[float] = []
            end = time.perf_counter() + TURN
            while not found or time.perf_counter() < end:
                start = time.perf_counter()
                run()
                found.append(1e3 * (time.perf_counter() - start))
            times[name] += found if turn else []
    row: Json = {}
    for name, values in times.items():
        values.sort()
        row |= {f"{name} ms": values[len(values) // 2], f"{name} 90 % ms": values[len(values) * 9 // 10]}
    return row


def calls_a_second(run: Callable[[], Any], callers: int) -> float:
    """Calls that some threads make in a turn together, each with one thread of its own."""
    counts = [0] * callers
    barrier = threading.Barrier(callers)

    def call(index: int) -> None:
        torch.set_num_threads(1)
        run()
        barrier.wait()
        end = time.perf_counter() + TURN
        while time.perf_counter() < end:
            run()
            counts[index] += 1

    threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / TURN


def callers(runs: Runs, turns: int) -> Json:
    """Calls a second of one caller, of two at the same time, and the second by twice the first: medians."""
    found: dict[tuple[str, int], list[float]] = {(name, count): [] for name in runs for count in (1, 2)}
    for _ in range(turns):
        for name, count in found:
            found[name, count].append(calls_a_second(runs[name], count))
    middle = {key: sorted(values)[len(values) // 2] for key, values in found.items()}
    row: Json = {}
    for name in runs:
        row |= {f"{name} 1 caller": middle[name, 1], f"{name} 2 callers": middle[name, 2]}
        row[f"{name} of twice"] = middle[name, 2] / middle[name, 1] / 2
    return row


def network(name: str, values: Json, turns: int, alone: bool) -> list[Json]:
    """One network: a row of the machine as it is, one beside a busy process, one of two callers."""
    target = open_target(name, {**values, "images": 16, "batch": 16})
    x, _ = next(target.batches())
    model = target.model.eval() if target.trained else calibrated(target.model, x).eval()
    engine = compile(model, x, tune=False)  # what is timed on a busy machine would differ from run to run
    image = x[:1].contiguous()
    onnx = b"" if alone else rivals.onnx_file(model, image)

    def contenders() -> Runs:
        engine_alone: Runs = {"engine": lambda: engine(image)}
        return engine_alone if alone else {**engine_alone, "onnx": rivals.onnx_runtime(onnx)(image)}

    rows: list[Json] = []
    threads = torch.get_num_threads()
    runs = contenders()
    for state, beside in (("quiet", nullcontext()), ("busy", busy_process())):
        with beside:
            rows.append({"run": f"{name}, {state}", "threads": threads} | latencies(runs, turns))
    torch.set_num_threads(1)
    runs = contenders()  # ONNX Runtime's threads are those of its session
    rows.append({"run": f"{name}, callers", "threads": 1} | callers(runs, turns))
    torch.set_num_threads(threads)
    for row in rows:
        row |= {key: round(value, 2) for key, value in row.items() if isinstance(value, float)}
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="NETWORK|KEY=VALUE", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--turns", type=int, default=8, help="of half a second, for each contender and state")
    parser.add_argument("--alone", action="store_true", help="the engine without ONNX Runtime")
    parser.add_argument("--record", action="store_true", help="write results/bench/load.*")
    arguments = parser.parse_intermixed_args()
    names = [word for word in arguments.words if "=" not in word] or list(NETWORKS)
    values = parse_overrides([word for word in arguments.words if "=" in word])
    rows = [row for name in names for row in network(name, values, arguments.turns, arguments.alone)]
    if arguments.record:
        tables = earlier_results(RESULTS, "load")
        write_results(RESULTS, "load", {"one image": kept(tables.get("one image", []), rows, "run")})


if __name__ == "__main__":
    main()
