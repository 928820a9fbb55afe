"""Trained networks run by the event engine, beside dense ways of running the same weights.

    python benchmarks/inference.py RUN [RUN ...] data.root=DATA     # minutes; writes results/bench/inference.*
    python benchmarks/inference.py RUN --compiled data.root=DATA    # with torch.compile: minutes more a network
    python benchmarks/inference.py RUN --accuracy data.root=DATA    # what each gets right, and no times
    python benchmarks/inference.py RUN --half data.root=DATA        # what half the spikes, and none, take off, alone
    python benchmarks/inference.py RUN --whole data.root=DATA       # the same predictions? all test images, no times
    python benchmarks/inference.py --layers                         # one layer and a body by density, no run needed

Contenders run the network of each RUN with norms folded, on the same test images, taking turns in one process: ours as
it is ("network": convolutions leave out zeros where that pays), with PyTorch's convolutions ("dense"), those in
bfloat16, SpikingJelly's neurons (eager), `torch.compile` of the reference equations; ONNX Runtime and OpenVINO on the
exported file, in float32 and quantised to int8 on training images, OpenVINO in bfloat16 too (`rivals.py`).
Times are medians, of one image and of 64. "sparse" is the engine with thresholds raised until 4 % of inputs are active:
what sparser spikes would give. A table of its own says what share of the test images each contender gets right. Rows of
runs that were measured before stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rivals
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom.analyse.load import Target, open_target
from spikeloom.bench.timing import medians
from spikeloom.bench.write import earlier_results, kept, write_results
from spikeloom.deploy import Engine, compile, exact, fold
from spikeloom.deploy.engine.evaluate import evaluate_engine
from spikeloom.deploy.engine.ir import Conv, Fire, Mean, Neuron, Plan, Pool, Value
from spikeloom.memory import keep_memory
from spikeloom.models.trained_weights import run_folder
from spikeloom.ops import _dispatch, backend, scan
from spikeloom.surrogates import ATan
from spikeloom.train.build import build_datasets
from spikeloom.train.recipe import check_settings, merge, parse_overrides
from spikeloom.train.run import Run

Json = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "bench"
BATCHES = (1, 64)
LAYERS = ((64, 32), (128, 16), (256, 8))
DENSITIES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CALIBRATION = 256  # training images that quantisers see
SPARSE = 0.04  # the share of active inputs of a sparser network
MEAN = "geometric mean"
INT8_GAIN, INT8_BOTH = "int8 engine than float32's", "int8 engine than best int8"
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


def millijoules(run: Callable[[], Any], runs: int = 20) -> float:
    """What the processor's package took for one run, from its own counter."""
    before = int(RAPL.read_text())
    for _ in range(runs):
        run()
    return (int(RAPL.read_text()) - before) / 1e3 / runs


# --- networks ---------------------------------------------------------------------------------------------------------


def network(run: str, values: Json, leave_out: set[str], images: int, repeats: int) -> tuple[Json, list[Json]]:
    """The accuracies of one run on so many test images, and its times, a row a batch size; none for 0 repeats."""
    target = open_target(run, {**values, "images": max(images, BATCHES[-1]), "batch": BATCHES[-1]})
    x, _ = next(target.batches())
    model = target.model.eval()
    engine = compile(model, x)
    contenders = rivals.contenders(model, engine, x, calibration(run, values), leave_out)
    return accuracies(target, contenders), times(target, engine, contenders, repeats) if repeats else []


def calibration(run: str, values: Json) -> list[Tensor]:
    """Inputs of one image each, spread evenly over the training part of a run's data."""
    settings = Run.open(run_folder(run)).settings.model_dump()
    dataset, _ = build_datasets(check_settings(merge(settings, {"data": values.get("data", {})}), run))
    count = min(CALIBRATION, len(dataset))
    return [dataset.encode(dataset.batch([i * len(dataset) // count])[0]) for i in range(count)]


def accuracies(target: Target, contenders: dict[str, rivals.Contender]) -> Json:
    """What share of the test images each contender gets right, in percent; of whole batches, as shapes are compiled."""
    batches = list(target.batches())
    batches = [(x, y) for x, y in batches if len(y) == len(batches[0][1])]
    row: Json = {"run": target.title, "images": sum(len(y) for _, y in batches)}
    for name, on in contenders.items():
        found = evaluate_engine(lambda x, on=on: torch.as_tensor(on(x)()), batches, None, lambda _: None)
        row[f"{name} %"] = round(found["accuracy"], 2)
    print(json.dumps(row), flush=True)
    return row


def times(target: Target, engine: Engine, contenders: dict[str, rivals.Contender], repeats: int) -> list[Json]:
    """One run, one row a batch size."""
    x, _ = next(target.batches())
    rate = event_layers(engine, x)[1]
    sparse = at_rate(compile(target.model.eval(), x, tune=False), x, SPARSE)
    rows: list[Json] = []
    for batch in BATCHES:
        part = x[:, :batch] if target.sequence else x[:batch]
        runs = {name: on(part) for name, on in contenders.items()} | {"sparse": lambda part=part: sparse(part)}
        times = medians(runs, repeats, budget=60, pause=0.1)
        row: Json = {"run": target.title, "batch": batch, "active": round(rate, 3)}
        row |= {f"{name}_ms": round(value, 2) for name, value in times.items()}
        if RAPL.is_file():
            row |= {f"{name}_mJ": round(millijoules(run), 2) for name, run in runs.items()}
        best = min((name for name in rivals.FLOAT32 if name in times), key=times.__getitem__)
        row |= {"best float32": best, "engine times faster": round(times[best] / times["engine"], 2)}
        halves = [times[name] for name in rivals.BFLOAT16 if name in times]
        if halves:
            row["than bf16"] = round(min(halves) / times["engine"], 2)
        quantised = [name for name in rivals.INT8 if name in times]
        if quantised:
            int8 = min(quantised, key=times.__getitem__)
            row |= {"best int8": int8, "times faster than int8": round(times[int8] / times["engine"], 2)}
        if "engine_int8" in times:
            row[INT8_GAIN] = round(times["engine"] / times["engine_int8"], 2)
        if quantised and "engine_int8" in times:
            row[INT8_BOTH] = round(times[int8] / times["engine_int8"], 2)
        row[f"at {SPARSE:.0%} active times faster"] = round(times[best] / times["sparse"], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def quieter(engine: Engine, factor: float) -> Engine:
    """The engine with all thresholds raised."""
    steps: list[Any] = []
    for step in engine.steps:
        neuron = getattr(step, "neuron", None)
        if neuron is not None:
            threshold = tuple(factor * value for value in neuron.threshold)
            step = step.model_copy(update={"neuron": neuron.model_copy(update={"threshold": threshold})})
        steps.append(step)
    return engine.with_steps(steps)


def event_layers(engine: Engine, x: Tensor) -> tuple[float, float]:
    """Milliseconds of the layers that run by events, and the share of all the inputs they read that are active."""
    times, densities = engine.timed(x, repeats=9)
    layers = [(i, step) for i, step in enumerate(engine.steps) if isinstance(step, Conv) and step.way == "event"]
    sizes = [engine.values[step.x].size for _, step in layers]
    active = sum(densities[step.x] * size for (_, step), size in zip(layers, sizes, strict=True))
    return 1e3 * sum(times[i] for i, _ in layers), active / sum(sizes)


def at_rate(engine: Engine, x: Tensor, wanted: float) -> Engine:
    """The engine with thresholds raised until so many of its event layers' inputs are active."""
    low, high = 1.0, 16.0
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if event_layers(quieter(engine, middle), x)[1] > wanted else (low, middle)
    return quieter(engine, high)


def halved(run: str, values: Json) -> Json:
    """What half the spikes, and none, take off the time of the event layers."""
    target = open_target(run, {**values, "images": 8, "batch": 8})
    x, _ = next(target.batches())
    engine = compile(target.model.eval(), x, tune=False)
    rate = event_layers(engine, x)[1]
    engines = [engine, at_rate(engine, x, rate / 2), quieter(engine, 1e6)]
    turns = [[event_layers(one, x) for one in engines] for _ in range(5)]
    (whole, rate), (half, half_rate), (none, none_rate) = (sorted(of_one)[2] for of_one in zip(*turns, strict=True))
    assert none_rate == 0
    row = {
        "run": target.title,
        "active": round(rate, 4),
        "event layers ms": round(whole, 2),
        "active with raised thresholds": round(half_rate, 4),
        "then ms": round(half, 2),
        "less": round(1 - half / whole, 3),
        "silent ms": round(none, 2),
        "silent share": round(none / whole, 3),
    }
    print(json.dumps(row), flush=True)
    return row


class Remembered(nn.Module):
    """A network that is asked for the logits of an input once."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.logits = model, dict[bytes, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        key = hashlib.sha256(x.numpy().tobytes()).digest()
        if key not in self.logits:
            self.logits[key] = self.model(x)
        return self.logits[key]


def whole(run: str, values: Json, leave_out: set[str]) -> Json:
    """Network, and in other roundings: engine, the network with norms folded, and on the plain equations; and with
    weights of which no sum rounds ("exact"): the engine beside the same network in PyTorch.

    A neuron whose potential comes to within a rounding error of its threshold fires or not as the sums before it were
    rounded, and what follows differs by a spike. How often that happens to a network in PyTorch's own hands is what the
    engine, which adds in another order, can be held to; with exact weights it is held to every bit.
    """
    target = open_target(run, {**values, "images": 1 << 20, "batch": 64})
    model, (x, _) = target.model.eval(), next(target.batches())
    twin = exact(model, x)
    network, same = Remembered(model), Remembered(twin)

    def equations(x: Tensor) -> Tensor:
        with backend("reference"):
            return model(x)

    row: Json = {"run": target.title}
    ways: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], nn.Module]] = {
        "engine": (lambda: compile(model, x), network),
        "folded": (lambda: rivals.with_dense_convolutions(fold(model)), network),
        "equations": (lambda: equations, network),
        "exact weights": (lambda: same, network),
        "exact weights, engine": (lambda: compile(twin, x, portable=False), same),
    }
    for name, (make, beside) in ways.items():
        if name.split(",")[0] in leave_out:
            continue
        found = evaluate_engine(make(), target.batches(), beside, lambda _: None)
        row |= {"images": found["images"]}
        if beside is network:
            row["network %"] = round(found["model_accuracy"], 2)
        if name in ("engine", "exact weights"):
            row[f"{name} %"] = round(found["accuracy"], 2)
        row[f"{name}: same prediction %"] = round(found["same"], 2)
        row[f"{name}: logits within 1e-4 %"] = round(found["close"], 2)
        if beside is same:
            row[f"{name}: largest difference"] = found["difference"]
        print(json.dumps(row), flush=True)
    return row


# The first step of a plan that takes spikes, as 0 and 1.
INPUT = Fire(
    layer="input",
    out=(1,),
    x=0,
    keep_sum=False,
    neuron=Neuron(decay=0.0, gain=1.0, threshold=(0.5,), v_reset=None, strict_firing=False),
)


# --- one layer by density ---------------------------------------------------------------------------------------------


def layer(channels: int, side: int, density: float, images: int = 64) -> Json:
    """A 3x3 convolution with its neurons by events, and PyTorch's convolution alone in float32 and bfloat16."""
    neuron = Neuron(decay=0.5, gain=1.0, threshold=(1.0,), v_reset=0.0, strict_firing=False)
    weight = torch.randn(channels, channels, 3, 3) / math.sqrt(channels)
    plan = Plan(
        input=Value(height=side, width=side, channels=channels),
        T=1,
        steps=(
            INPUT,
            Conv(layer="conv", out=(2,), x=1, weight="w", padding=(1, 1), way="event", keep_sum=False, neuron=neuron),
            Mean(layer="mean", out=(3,), x=2),
        ),
    )
    x = (torch.rand(images, channels, side, side) < density).float().contiguous(memory_format=torch.channels_last)
    engine = Engine(plan, {"w": weight})
    # As `medians`: two runs, the second timed.
    event = sorted(engine.timed(x[None], repeats=1, images=images)[0][1] for _ in range(15))[7]
    last = weight.contiguous(memory_format=torch.channels_last)

    def dense(dtype: torch.dtype) -> Callable[[], Tensor]:
        a, b = x.to(dtype), last.to(dtype)
        return lambda: F.conv2d(a, b, None, 1, 1)

    with torch.no_grad():
        times = medians({"float32": dense(torch.float32), "bfloat16": dense(torch.bfloat16)}, 15)
    row = {"layer": f"{channels}x{side}x{side}", "images": images, "active": density, "event ms": round(1e3 * event, 2)}
    return row | {f"{name} ms": round(value, 2) for name, value in times.items()}


# --- a body of given rates --------------------------------------------------------------------------------------------


@torch.no_grad()
def body(rate: float, images: int = 16, T: int = 4) -> Json:
    """The convolutions of VGG-16 behind the first by events: random weights, thresholds at which `rate` fires."""
    steps: list[Any] = [INPUT]
    tensors: dict[str, Tensor] = {}
    spikes = x = (torch.rand(T, images, 64, 32, 32) < rate).float()
    for width in (64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        at = len(steps)
        if not width:
            steps.append(Pool(layer="pool", out=(at + 1,), x=at, op="max_pool", kernel=2, stride=2))
            x = F.max_pool2d(x.flatten(0, 1), 2).unflatten(0, (T, images))
            continue
        inside = x.shape[2]
        tensors[f"w{at}"] = weight = torch.randn(width, inside, 3, 3) / math.sqrt(9 * inside * rate)
        sums = F.conv2d(x.flatten(0, 1), weight, padding=1).unflatten(0, (T, images))
        threshold = sums[:, :4].flatten()[:1_000_000].quantile(1 - rate).item()
        neuron = Neuron(decay=0.5, gain=1.0, threshold=(threshold,), v_reset=0.0, strict_firing=False)
        steps.append(
            Conv(
                layer="conv",
                out=(at + 1,),
                x=at,
                weight=f"w{at}",
                padding=(1, 1),
                way="event",
                keep_sum=False,
                neuron=neuron,
            )
        )
        x, _ = scan(sums, None, 0.5, 1.0, threshold, 0.0, ATan(), True)
    steps.append(Mean(layer="mean", out=(len(steps) + 1,), x=len(steps)))
    plan = Plan(input=Value(height=32, width=32, channels=64), T=T, steps=tuple(steps))
    engine = Engine(plan, tensors)
    threads = torch.get_num_threads()
    many, densities = engine.timed(spikes, 9, images)
    torch.set_num_threads(1)
    one, _ = engine.timed(spikes, 9, 1)
    torch.set_num_threads(threads)
    row = {"rate": rate, "images": images, "active behind the fourth pool": round(densities[-6], 3)}
    return row | {"ms": round(1e3 * sum(many[1:]), 1), "one image, one thread ms": round(1e3 * sum(one[1:]), 1)}


def means(rows: list[Json]) -> list[Json]:
    """The rows of runs, and the geometric means of what the engine gains with the kernels of the last one."""
    kernels = rows[-1]["kernels"]
    rows = [row for row in rows if (row["run"], row["kernels"]) != (MEAN, kernels)]
    mine = [row for row in rows if row["kernels"] == kernels]
    columns = (
        "engine times faster",
        "times faster than int8",
        INT8_GAIN,
        INT8_BOTH,
        f"at {SPARSE:.0%} active times faster",
    )
    found: list[Json] = []
    for batch in BATCHES:
        group = [row for row in mine if row["batch"] == batch]
        mean: Json = {"kernels": kernels, "run": MEAN, "batch": batch}
        for column in columns:
            gains = [row[column] for row in group if column in row]
            if gains:
                mean[column] = round(math.exp(sum(map(math.log, gains)) / len(gains)), 2)
        found.append(mean)
    return rows + found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="RUN|KEY=VALUE", help="folders of runs, and data.* settings")
    parser.add_argument("--layers", action="store_true", help="measure layers by density only")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, which takes minutes a network")
    parser.add_argument("--accuracy", action="store_true", help="accuracies of all contenders, and no times")
    parser.add_argument("--images", type=int, default=1024, help="of the test data, for accuracies")
    parser.add_argument("--half", action="store_true", help="measure half the spikes, and none, alone")
    parser.add_argument("--whole", action="store_true", help="compare predictions on all test images, and no times")
    parser.add_argument("--leave-out", default="", help="contenders or, of --whole, ways; with commas between")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_intermixed_args()
    keep_memory()  # for every contender, as `spikeloom run` does
    runs = [word for word in arguments.words if "=" not in word]
    values = parse_overrides([word for word in arguments.words if "=" in word])
    tables = earlier_results(RESULTS, "inference")
    leave_out = {*arguments.leave_out.split(","), *(() if arguments.compiled else ("compiled",))}
    for run in runs:  # written one by one: a measurement that is stopped keeps what it has
        if arguments.whole:
            row = whole(run, values, leave_out)  # takes long: another process may have written meanwhile
            tables = earlier_results(RESULTS, "inference")
            before = tables.get("the whole test set", [])
            mine = (_dispatch.native.level(), row["run"], row["images"])
            known = next((old for old in before if (old["kernels"], old["run"], old["images"]) == mine), {})
            tables["the whole test set"] = kept(before, [known | row], "run")
            write_results(RESULTS, "inference", tables)
            continue
        if not arguments.half:
            found, rows = network(
                run, values, leave_out, arguments.images, 0 if arguments.accuracy else arguments.repeats
            )
            tables["accuracy"] = kept(tables.get("accuracy", []), [found], "run")
            if arguments.accuracy:
                write_results(RESULTS, "inference", tables)
                continue
            tables["networks"] = means(kept(tables.get("networks", []), rows, "run"))
        tables["half the spikes"] = kept(tables.get("half the spikes", []), [halved(run, values)], "run")
        write_results(RESULTS, "inference", tables)
    if arguments.layers:
        tables["one layer by density"] = [layer(*shape, density) for shape in LAYERS for density in DENSITIES]
        tables["the body of VGG-16 by rate"] = [body(rate) for rate in (0.02, 0.05, 0.1)]
    if not RAPL.is_file():
        print("no energy counter (RAPL) on this machine: joules are not measured")
    write_results(RESULTS, "inference", tables)


if __name__ == "__main__":
    main()
