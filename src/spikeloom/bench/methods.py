"""`spikeloom bench methods`: time and peak memory of a training step over the number of time steps."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.analyse.training_curves import COLORS
from spikeloom.errors import UsageError
from spikeloom.layers import NormSpike
from spikeloom.layers.stateless import Conv2d, Linear
from spikeloom.models import create_model
from spikeloom.neurons import LIF, Neuron
from spikeloom.surrogates import ATan
from spikeloom.train.losses import tet
from spikeloom.train.methods import METHODS

Json = dict[str, Any]

STEPS = (2, 4, 8, 16, 32)
CONTENDERS = ("bptt", "sltt", "spikingjelly")


def rows(model: str, steps: tuple[int, ...], batch: int, turns: int) -> Iterator[Json]:
    """One row a contender and T: BPTT, SLTT, and SpikingJelly's layers in the same network with BPTT.

    Each is measured in a process of its own, with a static image of 3x32x32 and the TET loss; memory in another one,
    whose allocator gives every large block back at once: otherwise pieces that it keeps add 1 to 5 % at random.

    Args:
        model: in the registry.
        steps: numbers of time steps.
        batch: images.
        turns: timed training steps, after one that is not.

    Raises:
        UsageError: the network cannot be measured so.
    """
    for T in steps:
        for contender in CONTENDERS:
            if contender == "spikingjelly" and not _has_rival(model):
                continue
            order = {"model": model, "contender": contender, "T": T, "batch": batch}
            timed = _apart({**order, "turns": turns}, {})
            held = _apart({**order, "turns": 1}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"})
            yield {**order, "ms": timed["ms"], "peak_MB": held["peak_MB"], "of_training_MB": held["of_training_MB"]}


def _apart(order: Json, environment: dict[str, str]) -> Json:
    """`measure` in a process of its own."""
    words = [sys.executable, "-m", __name__, json.dumps(order)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{order['contender']} with {order['model']} at T = {order['T']} cannot be measured: {reason}")
    return json.loads(done.stdout)


def spread(found: list[Json], contender: str) -> float:
    """By how much, in percent, the highest of a contender's peaks over T exceeds the lowest."""
    peaks = [row["peak_MB"] for row in found if row["contender"] == contender]
    return 100 * (max(peaks) / min(peaks) - 1)


def measure(model: str, contender: str, T: int, batch: int, turns: int) -> Json:
    """Milliseconds of a training step, the median; the peak resident memory of this process, and what training added.

    Raises:
        UsageError: the system does not say.
    """
    torch.manual_seed(1)
    network = create_model(model, T=T)
    if contender == "spikingjelly":
        network = rival(network)
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % 10
    method = METHODS["sltt" if contender == "sltt" else "bptt"]
    reset: Callable[[nn.Module], None] | None = None
    if contender == "spikingjelly":
        reset = importlib.import_module("spikingjelly.activation_based.functional").reset_net
    times, before = list[float](), _memory("VmRSS")
    for _ in range(turns + 1):
        start = time.perf_counter()
        network.zero_grad()
        method(network, x, y, tet)
        if reset is not None:
            reset(network)
        times.append(1e3 * (time.perf_counter() - start))
    peak = _memory("VmHWM")
    return {
        "ms": round(statistics.median(times[1:]), 2),
        "peak_MB": round(peak / 1e6, 2),
        "of_training_MB": round((peak - before) / 1e6, 2),
    }


def _memory(key: str) -> int:
    """Bytes of this process, resident now ("VmRSS") or at most so far ("VmHWM")."""
    # Not from `resource`, whose count includes what the parent held when it started this process.
    status = Path("/proc/self/status")
    if not status.is_file():
        raise UsageError("bench methods reads /proc/self/status, which this system does not have: use Linux")
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


# --- SpikingJelly -----------------------------------------------------------------------------------------------------


def _has_rival(model: str) -> bool:
    try:
        importlib.import_module("spikingjelly.activation_based.layer")
    except ImportError:
        return False
    network = create_model(model)
    return all(type(m) is LIF and isinstance(m.surrogate, ATan) for m in network.modules() if isinstance(m, Neuron))


class TheirNormSpike(nn.Module):
    """`NormSpike` of SpikingJelly's batch norm and LIF."""

    def __init__(self, ours: NormSpike):
        super().__init__()
        layer: Any = importlib.import_module("spikingjelly.activation_based.layer")
        self.norm = layer.BatchNorm2d(ours.norm.num_features, step_mode="m")
        self.neuron = _their_lif(ours.neuron)

    def forward(self, x: Tensor, residual: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        spikes = self.with_sum(x, residual)[0]
        return spikes if add is None else spikes + add

    def with_sum(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = self.norm(x)
        if residual is not None:
            u = u + residual
        return self.neuron(u), u


def _their_lif(ours: Any) -> nn.Module:
    neuron: Any = importlib.import_module("spikingjelly.activation_based.neuron")
    surrogate: Any = importlib.import_module("spikingjelly.activation_based.surrogate")
    return neuron.LIFNode(
        ours.tau,
        ours.decay_input,
        ours.v_threshold,
        ours.v_reset,
        surrogate.ATan(ours.surrogate.alpha),
        ours.detach_reset,
        step_mode="m",
    )


def rival(network: nn.Module) -> nn.Module:
    """The network with its layers of weights, norms and neurons replaced, in place, by SpikingJelly's; weights kept."""
    layer: Any = importlib.import_module("spikingjelly.activation_based.layer")
    for name, ours in list(network.named_children()):
        if isinstance(ours, NormSpike):
            setattr(network, name, TheirNormSpike(ours))
        elif isinstance(ours, LIF):
            setattr(network, name, _their_lif(ours))
        elif isinstance(ours, Conv2d | Linear):
            if isinstance(ours, Conv2d):
                theirs = layer.Conv2d(
                    ours.in_channels,
                    ours.out_channels,
                    ours.kernel_size,
                    ours.stride,
                    ours.padding,
                    groups=ours.groups,
                    bias="bias" in ours.state_dict(),
                    step_mode="m",
                )
            else:
                theirs = layer.Linear(ours.in_features, ours.out_features, "bias" in ours.state_dict(), step_mode="m")
            theirs.load_state_dict(ours.state_dict())
            setattr(network, name, theirs)
        else:
            rival(ours)
    return network


def plot(found: list[Json]) -> Any:
    """Time and peak memory over T, two panels, one line a contender."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=["ms per training step", "peak resident memory, MB"])
    colors = dict(zip(CONTENDERS, COLORS, strict=False))
    for column, key in enumerate(("ms", "peak_MB"), 1):
        for contender in dict.fromkeys(row["contender"] for row in found):
            points = [row for row in found if row["contender"] == contender]
            figure.add_trace(
                go.Scatter(
                    x=[row["T"] for row in points],
                    y=[row[key] for row in points],
                    name=contender,
                    legendgroup=contender,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": colors[contender]},
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title="time steps T", tickvals=sorted({row["T"] for row in found}))
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(title=f"{found[0]['model']}, batch {found[0]['batch']}", template="plotly_white")
    return figure


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
