"""Five minutes on an accelerator: every neuron against the reference, and SEW-ResNet-18 on 224 pixels beside its rival.

    python benchmarks/accelerator.py                       # on CUDA where there is one
    python benchmarks/accelerator.py --record              # writes results/bench/accelerator-DEVICE.md and .json too
    python benchmarks/accelerator.py --device cpu --pixels 64 --batch 2 --skip compiled

The first table has spikes and gradients of each registered neuron on the device beside those of the plain PyTorch
reference on the CPU, at odd sizes, in float32: rounding moves few spikes, and a gradient by little. The second one has
milliseconds of a training step and peak memory of SEW-ResNet-18 (ADD) with the same weights: ours, ours under
torch.compile, SpikingJelly's with the kernels that it chooses, and ours with ReLU for the neurons.
All take turns in one process. The exit code is 1 where a neuron is wrong.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spikeloom
from spikeloom.bench.neurons import make
from spikeloom.bench.timing import medians
from spikeloom.bench.write import markdown, write_results
from spikeloom.models import load_spikingjelly
from spikeloom.neurons import IF, NEURONS
from spikeloom.train.losses import sdt

Json = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "bench"
SHAPE = (7, 3, 13, 5, 3)  # [T, N, C, H, W]
MAX_SPIKES, MAX_ERROR = 0.005, 0.02  # parts of the spikes that may differ, and of a gradient's length


# --- neurons ----------------------------------------------------------------------------------------------------------


def neuron_row(name: str, device: torch.device) -> Json:
    """Spikes and gradients of a neuron on the device and by the reference."""
    torch.manual_seed(0)
    shape = SHAPE[:3] if name.startswith("Recurrent") else SHAPE
    layer = make(name, shape[0], shape[2])
    x, grad = torch.randn(shape) + 0.3, torch.randn(shape)
    with spikeloom.backend("reference"):
        expected = _run(layer, x, grad)
    try:
        found = _run(copy.deepcopy(layer).to(device), x.to(device), grad.to(device))
    except Exception as error:
        return {"neuron": name, "verdict": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if name == "SPSN":  # draws its spikes: only their rate is the same
        spikes = abs(found[0].mean().item() - expected[0].mean().item()) / 10
    else:
        spikes = (found[0].cpu() != expected[0]).float().mean().item()
    errors = [_distance(a.cpu(), b) for a, b in zip(found[1:], expected[1:], strict=True)]
    ok = spikes <= MAX_SPIKES and max(errors) <= MAX_ERROR
    row = {"neuron": name, "spikes_that_differ": f"{spikes:.2%}", "gradient_error": f"{max(errors):.1e}"}
    return {**row, "gradients": len(errors), "verdict": "equal" if ok else "WRONG"}


def _run(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = layer(x)
    used = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *used], grad)]


def _distance(found: Tensor, expected: Tensor) -> float:
    """The length of the difference, as a part of the expected length."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


# --- SEW-ResNet-18 ----------------------------------------------------------------------------------------------------


def rival(device: torch.device) -> nn.Module:
    """SpikingJelly's SEW-ResNet-18; from 2.0 on it takes its Triton kernels by itself where they run.

    Raises:
        ImportError: SpikingJelly is not installed.
    """
    base = "spikingjelly.activation_based"
    neuron, surrogate, functional, sew = (
        importlib.import_module(f"{base}.{part}") for part in ("neuron", "surrogate", "functional", "model.sew_resnet")
    )
    net = sew.sew_resnet18(
        spiking_neuron=neuron.IFNode, cnf="ADD", surrogate_function=surrogate.ATan(), detach_reset=True
    )
    functional.set_step_mode(net, "m")
    return net.to(device).train()


def _step_rival(net: nn.Module, x: Tensor, T: int, functional: Any) -> Callable[[], None]:
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> None:
        functional.reset_net(net)
        net.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = net(x.expand(T, *x.shape))
        sdt(logits.float(), labels).backward()

    return run


def _step(net: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], None]:
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = net(x)
        sdt(logits.float(), labels).backward()

    return run


class ReLU(nn.ReLU):
    """In the place of a neuron: the same network without spikes."""


def contenders(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """A training step of each network, in bf16."""
    torch.manual_seed(0)
    x = torch.rand(args.batch, 3, args.pixels, args.pixels, device=device)
    x = x.to(memory_format=torch.channels_last)
    found: dict[str, Callable[[], None]] = {}
    ours = spikeloom.create_model("sew_resnet18", T=args.T, neuron=IF)
    if "spikingjelly" not in args.skip:
        net = rival(device)
        ours = load_spikingjelly(net, "sew_resnet18", T=args.T)
        functional = importlib.import_module("spikingjelly.activation_based.functional")
        found["spikingjelly"] = _step_rival(net, x, args.T, functional)
    ours = ours.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    found["ours"] = _step(ours, ours, x)
    if "compiled" not in args.skip:
        found["ours, compiled"] = _step(torch.compile(ours), ours, x)
    relu = spikeloom.create_model("sew_resnet18", T=args.T, neuron=ReLU)
    relu = relu.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    found["ours with ReLU"] = _step(relu, relu, x)
    return found


def step_rows(args: argparse.Namespace, device: torch.device) -> list[Json]:
    """Milliseconds of a step and peak memory, and the ratios to ours."""
    cuda = device.type == "cuda"

    def waited(run: Callable[[], None]) -> Callable[[], None]:
        def through() -> None:
            run()
            if cuda:
                torch.cuda.synchronize()

        return through

    steps = {name: waited(run) for name, run in contenders(args, device).items()}
    memory: Json = {}
    first: Json = {}
    for name, run in steps.items():
        start = time.perf_counter()
        run()
        first[name] = round(time.perf_counter() - start, 1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            run()
            memory[name] = round(torch.cuda.max_memory_allocated() / 2**20)
    times = medians(steps, args.repeats, budget=60.0)
    return [
        {
            "network": name,
            "step_ms": round(ms, 2),
            "images_per_s": round(1e3 * args.batch / ms, 1),
            "to_ours": round(ms / times["ours"], 2),
            "first_step_s": first[name],
            "peak_MB": memory.get(name),
        }
        for name, ms in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--skip", nargs="*", default=[], choices=["compiled", "spikingjelly", "neurons", "steps"])
    parser.add_argument("--record", action="store_true", help="write results/bench")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, spikeloom {spikeloom.__version__}\n")
    tables: dict[str, list[Json]] = {}
    if "neurons" not in args.skip:
        tables["neurons, float32, against the reference"] = rows = [neuron_row(name, device) for name in NEURONS]
        print(markdown(rows), "\n")
    if "steps" not in args.skip:
        title = f"SEW-ResNet-18, {args.batch} images of {args.pixels} pixels, T = {args.T}, bf16, a training step"
        tables[title] = rows = step_rows(args, device)
        print(markdown(rows))
    if args.record:
        tables = {title: [{"device": where, **row} for row in rows] for title, rows in tables.items()}
        write_results(args.out, f"accelerator-{where.lower().replace(' ', '-')}", tables)
    wrong = [row for rows in tables.values() for row in rows if row.get("verdict", "equal") != "equal"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
