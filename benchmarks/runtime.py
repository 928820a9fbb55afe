"""What runs without PyTorch: our convolution of real inputs beside oneDNN's on first layers, and a network's start.

    python benchmarks/runtime.py [--images 16] [--threads 1]

Both convolutions write sums [N, H, W, C] of the same images, in turn in one process; medians of single calls. The start
is from the path of cifar10_net's file to the logits of one image, the first time and as the median of more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from spikeloom import create_model, deploy, runtime
from spikeloom.deploy.engine.engine import Engine, Way
from spikeloom.deploy.engine.ir import Conv, Mean, Plan, Value

# Input, channels out, kernel, stride, padding.
LAYERS: dict[str, tuple[tuple[int, int, int], int, int, int, int]] = {
    "cifar10_net": ((3, 32, 32), 32, 3, 1, 1),
    "report_vgg16": ((3, 32, 32), 64, 3, 1, 1),
    "report_sew_resnet34": ((3, 32, 32), 16, 3, 1, 1),
    "report_ms_resnet34": ((3, 32, 32), 16, 3, 1, 1),
    "spikingformer_4_256": ((3, 32, 32), 32, 3, 1, 1),
    "DVS Gesture": ((2, 128, 128), 64, 3, 1, 1),
    "ImageNet, 7x7": ((3, 224, 224), 64, 7, 2, 3),
}


def layer(name: str, way: Way) -> Engine:
    (channels, height, width), out, kernel, stride, padding = LAYERS[name]
    step = Conv(layer=name, out=(1,), x=0, weight="w", bias="b", stride=stride, padding=(padding, padding), way=way)
    plan = Plan(
        input=Value(height=height, width=width, channels=channels, static=True),
        T=1,
        steps=(step, Mean(layer="mean", out=(2,), x=1)),
    )
    return Engine(plan, {"w": torch.randn(out, channels, kernel, kernel), "b": torch.randn(out)})


def starts(repeats: int) -> list[float]:
    """Milliseconds from file to first logits."""
    x = torch.rand(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        deploy.compile(create_model("cifar10_net").eval(), x, tune=False, portable=True).save(path)
        found: list[float] = []
        for _ in range(repeats):
            start = time.perf_counter()
            runtime.load(path)(x.numpy())
            found.append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{'first layer of':<22} {'oneDNN ms':>10} {'direct ms':>10} {'ratio':>6}")
    for name, (shape, *_) in LAYERS.items():
        x = torch.rand(given.images, *shape)
        found: dict[Way, list[float]] = {"dense": [], "direct": []}
        engines = {way: layer(name, way) for way in found}
        for _ in range(given.repeats):
            for way, times in found.items():
                times.append(engines[way].timed(x, 1, given.images)[0][0])
        dense, direct = (1e3 * statistics.median(times) for times in found.values())
        print(f"{name:<22} {dense:10.3f} {direct:10.3f} {direct / dense:6.2f}")
    runtime.set_threads(given.threads)
    first, *more = starts(given.repeats)
    print(f"from file to first logits: {first:.1f} ms, then {statistics.median(more):.1f} ms")


if __name__ == "__main__":
    main()
