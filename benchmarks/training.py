"""Whole training steps of one network with one set of weights: ours, SpikingJelly's neurons (eager, compiled), ReLU.

    python benchmarks/training.py                      # all networks and precisions, minutes; writes results/bench
    python benchmarks/training.py sew18 --precision bf16 --repeats 9
    python benchmarks/training.py sew18 --compiled     # with SpikingJelly under torch.compile: compiles for minutes
    python benchmarks/training.py --check              # fails where a small network's ratio to ReLU got 15 % worse

Contenders are the same modules with the same weights; where ours has a `NormSpike`, the others have batch norm and
their activation, on the same sequence [T, N, C, H, W]. Spikformer's rival is SpikingJelly's own network. Contenders
take turns in one process; times are medians, without the first step, in which the compiled one compiles. Peak memory is
that of a process of its own for every contender but the compiled one, where it would be the compiler's. Rows of other
networks in results/bench are left as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import spikeloom
from spikeloom.bench.timing import medians
from spikeloom.bench.write import earlier_results, kept, write_results
from spikeloom.encode import repeat
from spikeloom.files import write_json
from spikeloom.layers import BatchNorm, Conv2d, GlobalAvgPool, Linear, NormSpike, SEWBlock, basic_branch
from spikeloom.memory import keep_memory
from spikeloom.neurons import LIF
from spikeloom.ops import _dispatch, backend
from spikeloom.ops.scan.native import bound_kernel
from spikeloom.train.losses import sdt
from spikeloom.train.machine import environment

Json = dict[str, Any]
COMPILED = "spikingjelly_compiled"
CONTENDERS = ("ours", "relu", "spikingjelly")
RESULTS = Path(__file__).parents[1] / "results" / "bench"


# --- networks ---------------------------------------------------------------------------------------------------------


class SEW18(nn.Module):
    """SEW-ResNet-18 (ADD) for 32x32 images: stages of 64, 128, 256 and 512 channels, two blocks each."""

    def __init__(self, T: int, widths: tuple[int, ...] = (64, 128, 256, 512), blocks: int = 2):
        super().__init__()
        self.T = T
        self.stem = nn.Sequential(Conv2d(3, widths[0], 3, padding=1, bias=False), NormSpike(widths[0], LIF))
        layers: list[nn.Module] = []
        width = widths[0]
        for stage, out in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                same = stride == 1 and width == out
                shortcut = (
                    nn.Identity()
                    if same
                    else nn.Sequential(Conv2d(width, out, 1, stride, bias=False), NormSpike(out, LIF))
                )
                layers.append(SEWBlock(basic_branch(width, out, stride, LIF), NormSpike(out, LIF), shortcut))
                width = out
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(GlobalAvgPool(), Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(repeat(x, self.T))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sew18": (lambda: SEW18(T=4), 32),
    "report_sew_resnet34": (lambda: spikeloom.create_model("report_sew_resnet34", T=6), 64),
    "report_ms_resnet34": (lambda: spikeloom.create_model("report_ms_resnet34", T=6), 64),
    "spikformer_4_256": (lambda: spikeloom.create_model("spikformer_4_256", T=4), 32),
    "small": (lambda: SEW18(T=4, widths=(32, 64), blocks=1), 16),
}


class Other(nn.Module):
    """What stands in a rival's network where ours has a `NormSpike`: batch norm, sum, activation."""

    def __init__(self, norm: BatchNorm, activation: nn.Module):
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict())
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        s, _ = self.with_sum(x, residual)
        return s if add is None else s + add

    def with_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        u = u if residual is None else u + residual
        return self.activation(u), u


class Peer(nn.Module):
    """SpikingJelly's LIF, from rest at every call."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron, surrogate

        self.neuron = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        self.neuron.reset()
        return self.neuron(x)


class PeerSpikformer(nn.Module):
    """SpikingJelly's own Spikformer of the same size, from rest at every call."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based.model.spikformer import Spikformer

        self.model = Spikformer(4, 3, 32, 32, 4, 10, embed_dims=256, num_heads=8, mlp_ratio=4.0, depths=4)

    def forward(self, x: Tensor) -> Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self.model)
        return self.model(x)


def build(network: str, contender: str) -> nn.Module:
    """One contender; all have the same weights, but where SpikingJelly has a network of its own."""
    torch.manual_seed(0)
    if network == "spikformer_4_256" and contender in ("spikingjelly", COMPILED):
        peer = PeerSpikformer().to(memory_format=torch.channels_last)
        return torch.compile(peer) if contender == COMPILED else peer  # pyright: ignore[reportReturnType]
    model = NETWORKS[network][0]().to(memory_format=torch.channels_last)
    if contender == "ours":
        return model
    make: Callable[[], nn.Module] = {"relu": nn.ReLU, "spikingjelly": Peer, COMPILED: Peer}[contender]
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NormSpike):
                setattr(module, name, Other(child.norm, make()))
            elif isinstance(child, LIF):  # of attention, behind its product
                setattr(module, name, make())
    if contender == COMPILED:
        model = torch.compile(model)
    return model


def ours_or_reference(contender: str) -> AbstractContextManager[None]:
    return nullcontext() if contender == "ours" else backend("reference")


def step_of(network: str, contender: str, precision: str) -> Callable[[], None]:
    """A whole training step: forward, loss, backward, SGD."""
    model = build(network, contender)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    n = NETWORKS[network][1]
    x = torch.rand(n, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (n,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        # Rivals have PyTorch's convolutions.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), ours_or_reference(contender):
            loss = sdt(model(x).float(), y)
        loss.backward()
        optimizer.step()

    return step


# --- measurements -----------------------------------------------------------------------------------------------------

KINDS = {
    "convolution": ("convolution", "mkldnn", "spike_conv"),
    "norm + neuron": ("norm_scan", "batch_norm", "spikeloom", "relu", "threshold"),
    "copies": ("copy_", "clone", "contiguous", "_to_copy"),
}


def split(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step by kind of op."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((k for k, words in KINDS.items() if any(word in event.key for word in words)), "other")
        found[kind] += event.self_cpu_time_total / 1e3
    return {kind: round(found[kind], 1) for kind in (*KINDS, "other")}


class Clock:
    """The native kernels, with the seconds that their calls take, by name."""

    def __init__(self, native: Any):
        self._native, self.seconds = native, defaultdict[str, float](float)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._native, name)
        if name.startswith("bound_"):
            return lambda *fields: self._timed(name.removeprefix("bound_"), call(*fields))
        return self._timed(name, call)

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*arguments: Any, **fields: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **fields)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


NATIVE = {"convolution": ("conv_", "depthwise_"), "norm + neuron": ("scan_", "moments", "affine")}


def native_split(step: Callable[[], None], steps: int = 3) -> dict[str, float]:
    """Milliseconds of one step inside our kernels by kind, which a profiler's own work does not add to."""
    native = _dispatch.native
    _dispatch.native = clock = Clock(native)
    bound_kernel.cache_clear()  # kernels that were bound without the clock
    try:
        step()
        clock.seconds.clear()
        for _ in range(steps):
            step()
    finally:
        _dispatch.native = native
        bound_kernel.cache_clear()
    return {
        kind: round(1e3 * sum(s for name, s in clock.seconds.items() if name.startswith(names)) / steps, 1)
        for kind, names in NATIVE.items()
    }


def peak_memory(network: str, contender: str, precision: str) -> float:
    """Megabytes that three steps add to the resident set of a new process."""
    words = [sys.executable, __file__, network, "--precision", precision, "--only", contender]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def own_peak(network: str, contender: str, precision: str) -> float:
    """Of this process, from Linux's own account: that of `getrusage` begins with the parent's."""
    step = step_of(network, contender, precision)
    before = _high_water()
    for _ in range(3):
        step()
    return (_high_water() - before) / 1024


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(network: str, precision: str, contenders: tuple[str, ...], repeats: int, memory: bool) -> Json:
    """Times of all contenders in turn and their ratios; with `memory` peak memory and the split by kind of op too.

    Where the compiled contender cannot be compiled, the row says why and the others are measured.
    """
    steps = {name: step_of(network, name, precision) for name in contenders}
    failure = _compile(steps[COMPILED]) if COMPILED in steps else None
    if failure is not None:
        del steps[COMPILED]
    times = medians(steps, repeats, budget=120)
    images = NETWORKS[network][1]
    row: Json = {"network": network, "precision": precision}
    row |= {f"{name}_ms": round(value, 1) for name, value in times.items()}
    row |= {f"ours_to_{name}": round(times["ours"] / value, 3) for name, value in times.items() if name != "ours"}
    row["images_per_second"] = round(1e3 * images / times["ours"], 1)
    if failure is not None:
        row[COMPILED] = f"not compiled: {failure}"
    if not memory:
        return row
    eager = [name for name in steps if name != COMPILED]
    for name in eager:
        row |= {f"{name}_{kind}_ms": value for kind, value in split(steps[name]).items()}
    if "ours" in steps and _dispatch.native is not None:
        row |= {f"native_{kind}_ms": value for kind, value in native_split(steps["ours"]).items()}
    row |= {f"{name}_peak_MB": round(peak_memory(network, name, precision)) for name in eager}
    return row


def _compile(step: Callable[[], None]) -> str | None:
    """Runs a first step, which compiles; why it cannot, None if it can."""
    try:
        step()
    except TorchDynamoException as error:
        return " ".join(str(error).split("\n")[:2])  # the second line is the cause where a backend failed
    return None


def check(repeats: int) -> int:
    """Compares the small network's ratio to ReLU with the recorded one; 1 where it got 15 % worse, three times over."""
    recorded = json.loads((RESULTS / "training_check.json").read_text())
    for precision, limit in ((name, 1.15 * ratio) for name, ratio in recorded["ours_to_relu"].items()):
        # A neighbour on the machine can spoil one measurement: the best of up to three counts.
        found = [float("inf")]
        while min(found) > limit and len(found) < 4:
            found.append(measure("small", precision, ("ours", "relu"), repeats, memory=False)["ours_to_relu"])
        print(f"small, {precision}: ours / ReLU {min(found):.3f}, at most {limit:.3f}")
        if min(found) > limit:
            return 1
    return 0


def record(repeats: int) -> None:
    """Writes the ratios that `check` compares with: the median of five measurements."""
    ratios = {
        precision: sorted(
            measure("small", precision, ("ours", "relu"), repeats, memory=False)["ours_to_relu"] for _ in range(5)
        )[2]
        for precision in ("fp32", "bf16")
    }
    write_json(RESULTS / "training_check.json", {"environment": environment(), "ours_to_relu": ratios})
    print(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["sew18", "report_sew_resnet34", "report_ms_resnet34"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="both without it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument(
        "--compiled", action="store_true", help=f"with {COMPILED} too; compiling takes minutes a network and precision"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory and the split out")
    parser.add_argument("--check", action="store_true", help="compare a small network with what was recorded")
    parser.add_argument("--record", action="store_true", help="record what --check compares with")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    keep_memory()  # for every contender, as `spikeloom train` does
    if arguments.only:
        print(own_peak(arguments.networks[0], arguments.only, arguments.precision))
        return
    if arguments.check:
        sys.exit(check(arguments.repeats))
    if arguments.record:
        record(arguments.repeats)
        return
    rows = earlier_results(RESULTS, "training").get("training steps", [])
    for network in arguments.networks:  # written one by one; rows of other networks stay
        for precision in [arguments.precision] if arguments.precision else ["fp32", "bf16"]:
            contenders = (*arguments.contenders.split(","), *([COMPILED] if arguments.compiled else []))
            row = measure(network, precision, contenders, arguments.repeats, not arguments.no_memory)
            rows = kept(rows, [row], "network", "precision")
            print(json.dumps(row), flush=True)
            write_results(RESULTS, "training", {"training steps": rows})


if __name__ == "__main__":
    main()
