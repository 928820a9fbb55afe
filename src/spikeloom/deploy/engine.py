"""The event engine: a trained network run by its spikes (plan in `deploy.plan`, kernels in native/events.cpp).

Between layers there are maps of bytes. A convolution lists the active inputs of every window and adds up their rows of
weights in registers, fires the neurons behind it over all steps while the sums are in cache, and writes the next map.
Layers whose inputs are real values (the first, a gate) are PyTorch's, inside the same plan.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikeloom.deploy.plan import (
    Attention,
    Conv,
    Fire,
    Join,
    Map,
    Neuron,
    PadChannels,
    Plan,
    PlanError,
    Pool,
    Step,
    Value,
)
from spikeloom.errors import UsageError
from spikeloom.ops import dispatch
from spikeloom.train.checkpoint import atomic

SLICE = 8  # images that go through all layers together: their maps stay in cache
_FORMAT = "spikeloom event engine 1"
_MOST_BYTES = 1 << 34  # of a file


class Engine:
    """A network that runs by its spikes. Called as the model; threads may call it at the same time.

    Args:
        plan: of `deploy.lower.lower`, or of a file.
        tensors: its weights, by the names that the plan uses.

    Raises:
        PlanError: plan and weights do not fit together.
        UsageError: the native kernels are not there.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]):
        if dispatch.native is None:
            raise UsageError("the event engine needs the native kernels, which this installation lacks: see `doctor`")
        self._values = plan.values(tensors)
        self._plan, self._tensors = plan, dict(tensors)
        self._level = dispatch.native.level()
        self._packed = {i: _pack(step, self._tensors) for i, step in enumerate(plan.steps) if isinstance(step, Conv)}
        self._idle: dict[tuple[int, int, bool], list[_Workspace]] = {}
        self._lock = threading.Lock()
        self._timings: dict[int, dict[str, float | None]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [T, N, classes] of [N, ...], an image repeated T times, or [T, N, ...]."""
        sequence, T = self._sequence(x)
        logits = [self._run(part, T) for part in sequence.split(SLICE, 1)]
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def stream(self) -> EngineStream:
        """The engine with neurons that remember: a call continues where the one before it ended."""
        return EngineStream(self)

    def _sequence(self, x: Tensor) -> tuple[Tensor, int]:
        """The input as [T or 1, N, H, W, C], and the number of steps."""
        value = self._plan.input
        wanted = (value.channels, *value.places)
        shapes = {wanted: None, **({wanted[::2]: None} if value.height == 1 else {})}
        shapes |= {wanted[:1]: None} if value.places == (1, 1) else {}
        for shape in shapes:
            lead = x.dim() - len(shape)
            if tuple(x.shape[lead:]) == shape and lead == (1 if value.static else 2) and x.numel():
                y = x.detach().reshape(*(x.shape[:lead] if lead == 2 else (1, x.shape[0])), *wanted)
                y = y.to(torch.float32).permute(0, 1, 3, 4, 2)
                return y, self._plan.T if value.static else x.shape[0]
        lead = "[N, " if value.static else "[T, N, "
        expected = " or ".join(f"{lead}{', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"this engine takes {expected}, got {tuple(x.shape)}")

    def _run(self, x: Tensor, T: int, states: _States | None = None) -> Tensor:
        with self._workspace(T, x.shape[1], states is not None) as workspace:
            return workspace(x, states)

    @contextmanager
    def _workspace(self, T: int, N: int, carries: bool) -> Generator[_Workspace]:
        if dispatch.native.level() != self._level:
            raise RuntimeError("the instruction level of the kernels changed after the engine was made: make it anew")
        key = (T, N, carries)
        with self._lock:
            idle = self._idle.setdefault(key, [])
            workspace = idle.pop() if idle else None
        workspace = workspace or _Workspace(self._plan, self._values, self._tensors, self._packed, T, N)
        try:
            yield workspace
        finally:
            with self._lock:
                idle.append(workspace)

    # --- choosing, showing, saving ------------------------------------------------------------------------------------

    def timed(self, x: Tensor, repeats: int = 3, images: int = SLICE) -> tuple[list[float], list[float]]:
        """Seconds that every step takes on the first `images` of x, the least of some runs, and the share of nonzero
        elements in every value."""
        sequence, T = self._sequence(x)
        part = sequence[:, :images]
        with self._workspace(T, part.shape[1], False) as workspace:
            runs = [workspace.timed(part) for _ in range(repeats + 1)][1:]
            return [min(times) for times in zip(*runs, strict=True)], workspace.densities()

    def tuned(self, x: Tensor, repeats: int = 3) -> Engine:
        """An engine whose layers run by events or densely, whichever took less time on x."""
        engines = [self.with_ways(way) for way in ("event", "dense")]
        (event, densities), (dense, _) = (engine.timed(x, repeats) for engine in engines)
        steps = list(self._plan.steps)
        timings: dict[int, dict[str, float | None]] = {}
        for i, step in enumerate(steps):
            if not isinstance(step, Conv):
                continue
            can = step.takes_events(self._values[step.x], self._tensors[step.weight])
            steps[i] = step.model_copy(update={"way": "event" if can and event[i] < dense[i] else "dense"})
            timings[i] = {
                "active": densities[step.x], "event_ms": 1e3 * event[i] if can else None, "dense_ms": 1e3 * dense[i],
            }  # fmt: skip
        engine = self.with_steps(steps)
        engine._timings = timings
        return engine

    def with_ways(self, way: Literal["event", "dense"]) -> Engine:
        """The engine whose layers all run one way, where they can."""
        return self.with_steps(
            step.model_copy(update={"way": way})
            if isinstance(step, Conv) and step.takes_events(self._values[step.x], self._tensors[step.weight])
            else step
            for step in self._plan.steps
        )

    def with_steps(self, steps: Iterable[Step]) -> Engine:
        """The engine with other steps for the same weights."""
        return Engine(self._plan.model_copy(update={"steps": tuple(steps)}), self._tensors)

    def layers(self) -> list[dict[str, Any]]:
        """The steps: `layer`, `step`, `reads`, `makes` (shapes), `way` ("event", "dense" or ""), and what was measured
        when the way was chosen: `active` (share of nonzero inputs), `event_ms` and `dense_ms`, None where not."""
        rows: list[dict[str, Any]] = []
        for i, step in enumerate(self._plan.steps):
            parts = [step.op, "shortcut" * (getattr(step, "residual", None) is not None)]
            parts.append("neurons" * (step.op != "fire" and getattr(step, "neuron", None) is not None))
            way = step.way if isinstance(step, Conv) else ""
            row = {
                "layer": step.layer, "step": " + ".join(filter(None, parts)),
                "reads": _shape(self._values[step.reads()[0]]), "makes": _shape(self._values[step.out[-1]]), "way": way,
            }  # fmt: skip
            rows.append(row | self._timings.get(i, dict.fromkeys(("active", "event_ms", "dense_ms"))))
        return rows

    def plan(self) -> str:
        """`layers` as a table."""
        columns = ("layer", "step", "reads", "makes", "way", "active", "event_ms", "dense_ms")
        rows = [columns]
        for layer in self.layers():
            cells = [f"{cell:.2f}" if isinstance(cell, float) else cell or "" for cell in layer.values()]
            if layer["active"] is not None:
                cells[5] = f"{layer['active']:.1%}"
            rows.append(tuple(cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    @property
    def values(self) -> tuple[Value, ...]:
        """The values that the steps make, from the input on."""
        return tuple(self._values)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the plan."""
        return self._plan.steps

    def save(self, path: str | Path) -> None:
        """Writes weights and plan as one safetensors file, whole or not at all."""
        with atomic(Path(path)) as partial:
            save_file(self._tensors, partial, {"format": _FORMAT, "plan": self._plan.model_dump_json()})


def load(path: str | Path) -> Engine:
    """An engine from the file that `Engine.save` wrote. Nothing in the file is executed; everything is checked.

    Raises:
        UsageError: the file is not there or not whole, or its plan and weights do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; an engine is written by `spikeloom run RUN --save FILE`")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{path}: larger than {_MOST_BYTES >> 30} GiB, which no engine is")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"{path}: not a safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise UsageError(f"{path}: not an event engine ({_FORMAT!r} is missing in its header)")
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise UsageError(f"{path}: weights must be float32")
    try:
        plan = Plan.model_validate(json.loads(metadata.get("plan", "")), strict=False)
        return Engine(plan, {name: tensor.contiguous() for name, tensor in tensors.items()})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: plan: {place}: {first['msg']}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: its plan is not JSON: {error}") from error
    except PlanError as error:
        raise UsageError(f"{path}: plan: {error}") from error


def compile(model: nn.Module, example: Tensor, tune: bool = True) -> Engine:
    """An engine that runs a trained model by its spikes.

    Args:
        model: takes [N, ...] or [T, N, ...], gives logits [T, N, classes]; runs in eval mode, with norms folded.
        example: real inputs, two images or more: which layers run by events is decided by their time on these.
        tune: decide so; else all layers that can run by events do.

    Raises:
        UsageError: a layer that the engine does not know, or no native kernels.
    """
    from spikeloom.deploy.lower import lower

    plan, tensors = lower(model, example)
    engine = Engine(plan, tensors)
    return engine.tuned(example) if tune else engine.with_ways("event")


class EngineStream:
    """Steps as they come: carries the potentials of all neurons from call to call."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._states: _States = {}
        self._images = 0

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [T, N, classes] of the next steps; of a static image T = 1 step, [N, ...] -> [1, N, classes]."""
        sequence, T = self._engine._sequence(x)
        static = self._engine._plan.input.static
        if self._images not in (0, sequence.shape[1]):
            raise ValueError(f"this stream carries {self._images} images, got {sequence.shape[1]}: start another")
        self._images = sequence.shape[1]
        return self._engine._run(sequence, 1 if static else T, self._states)


# --- inside -----------------------------------------------------------------------------------------------------------

_States = dict[int, Tensor]
"""Potentials [levels, N, H, W, C] by step."""


def _shape(value: Value) -> str:
    return f"{value.channels}x{value.height}x{value.width}" if value.places != (1, 1) else str(value.channels)


def _pack(step: Conv, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weights as the way of the layer reads them, and the bias."""
    weight = tensors[step.weight]
    bias = torch.zeros(weight.shape[0]) if step.bias is None else tensors[step.bias]
    if step.way == "dense":
        return weight.contiguous(memory_format=torch.channels_last), bias
    count = torch.zeros(1, dtype=torch.int64)
    depthwise = step.depthwise(weight)
    fields = {
        "in": weight.shape[1], "out": weight.shape[0], "kernel_height": weight.shape[2],
        "kernel_width": weight.shape[3], "stride": step.stride, "depthwise": depthwise,
        "weight": weight.data_ptr(), "floats": count.data_ptr(),
    }  # fmt: skip
    dispatch.native.event_pack(**fields, packed=0)
    packed = torch.empty(int(count) + 16)  # vectors are read from their first element on
    dispatch.native.event_pack(**fields, packed=packed.data_ptr())
    return packed, bias


class _Workspace:
    """Buffers for T steps of N images, and the calls that fill them: nothing is allocated after the first run.

    (But for what PyTorch's own layers allocate for themselves.)
    """

    def __init__(
        self, plan: Plan, values: Sequence[Value], tensors: Mapping[str, Tensor],
        packed: Mapping[int, tuple[Tensor, Tensor]], T: int, N: int,
    ):  # fmt: skip
        self.T, self.N = T, N
        self._values, self._tensors, self._packed = values, tensors, packed
        self._maps: list[Tensor] = [self._buffer(value) for value in values]
        self._threads = torch.get_num_threads()
        self._kept: list[Any] = []
        self._states: _States | None = None
        self._calls = [self._call(i, step) for i, step in enumerate(plan.steps)]

    def _buffer(self, value: Value) -> Tensor:
        steps = 1 if value.static else self.T
        return torch.empty(
            steps, self.N, *value.places, value.channels, dtype=torch.uint8 if value.spikes else torch.float32
        )  # fmt: skip

    def __call__(self, x: Tensor, states: _States | None = None) -> Tensor:
        self._states = states
        self._maps[0].copy_(x)
        with torch.no_grad():
            for call in self._calls:
                call()
        logits = self._maps[-1].flatten(2)
        return logits.expand(self.T, *logits.shape[1:]).clone()

    def timed(self, x: Tensor) -> list[float]:
        """Seconds of every step."""
        self._states = None
        self._maps[0].copy_(x)
        times: list[float] = []
        with torch.no_grad():
            for call in self._calls:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return times

    def densities(self) -> list[float]:
        """The share of nonzeros of every value after a run."""
        return [torch.count_nonzero(values).item() / values.numel() for values in self._maps]

    # --- steps --------------------------------------------------------------------------------------------------------

    def _call(self, i: int, step: Step) -> Callable[[], None]:
        maps = self._maps
        if isinstance(step, Conv):
            return self._event(i, step) if step.way == "event" else self._dense(i, step)
        if isinstance(step, Fire):
            return self._fire(i, step, lambda: maps[step.x])
        y = maps[step.out[0]]
        if isinstance(step, Pool):
            return self._pool(step, maps[step.x], y)
        if isinstance(step, Attention):
            return self._attention(step, y)
        if isinstance(step, Join):
            return _join(step, [maps[index] for index in step.xs], y)
        x = maps[step.x]
        if isinstance(step, PadChannels):
            y.zero_()
            inner = y[..., step.before : step.before + x.shape[-1]]
            return lambda: _void(inner.copy_(x))
        if isinstance(step, Map):
            return _map(step, x, y)
        if step.op == "mean":
            places = y.flatten(2)
            return lambda: _void(torch.mean(x.flatten(2, 3), 2, dtype=torch.float32, out=places))
        return lambda: _void(y.copy_(x.flatten(2).view_as(y)))

    def _fired(self, i: int, step: Conv | Fire) -> tuple[dict[str, Any], Callable[[], None]]:
        """The kernels' fields of what follows the sums, and what must be done before every call."""
        neuron = step.neuron or Neuron(decay=0.0, gain=1.0, threshold=(0.0,), v_reset=None, strict_firing=False)
        threshold = torch.tensor(neuron.threshold, dtype=torch.float32)
        fire_at = torch.nextafter(threshold, torch.tensor(math.inf)) if neuron.strict_firing else threshold
        self._kept += [threshold, fire_at]
        residual = None if step.residual is None else self._maps[step.residual]
        repeated = residual
        if residual is not None and residual.shape[0] != self.T:
            repeated = torch.empty(self.T, *residual.shape[1:], dtype=residual.dtype)
            self._kept.append(repeated)
        real = residual is not None and residual.dtype == torch.float32
        pointer = 0 if repeated is None else repeated.data_ptr()
        spikes = None if step.neuron is None else self._maps[step.out[-1]]
        fields = {
            "steps": self.T, "residual": pointer if real else 0, "residual_spikes": 0 if real else pointer,
            "sum": self._maps[step.out[0]].data_ptr() if step.keep_sum else 0,
            "spikes": 0 if spikes is None else spikes.data_ptr(), "v": 0, "decay": neuron.decay, "gain": neuron.gain,
            "v_rest": neuron.v_reset or 0.0, "hard": neuron.v_reset is not None, "levels": len(neuron.threshold),
            "threshold": threshold.data_ptr(), "fire_at": fire_at.data_ptr(), "threads": self._threads,
        }  # fmt: skip

        def prepare() -> None:
            if repeated is not residual:
                assert repeated is not None
                assert residual is not None
                repeated.copy_(residual.expand_as(repeated))
            if spikes is not None:
                fields["v"] = 0
                if self._states is not None:
                    if i not in self._states:
                        shape = (len(neuron.threshold), *spikes.shape[1:])
                        self._states[i] = torch.full(shape, neuron.v_reset or 0.0)
                    fields["v"] = self._states[i].data_ptr()

        return fields, prepare

    def _event(self, i: int, step: Conv) -> Callable[[], None]:
        value, weight = self._values[step.x], self._tensors[step.weight]
        packed, bias = self._packed[i]
        fields, prepare = self._fired(i, step)
        fields |= {
            "images": self.N, "height": value.height, "width": value.width, "in": value.channels,
            "out": weight.shape[0], "kernel_height": weight.shape[2], "kernel_width": weight.shape[3],
            "stride": step.stride, "padding_y": step.padding[0], "padding_x": step.padding[1],
            "depthwise": step.depthwise(weight), "binary": value.most == 1, "x": self._maps[step.x].data_ptr(),
            "weight": packed.data_ptr(), "bias": bias.data_ptr(),
        }  # fmt: skip
        kernel = dispatch.native.event_conv

        def run() -> None:
            prepare()
            kernel(**fields)

        return run

    def _dense(self, i: int, step: Conv) -> Callable[[], None]:
        x, (weight, bias) = self._maps[step.x], self._packed[i]
        images = x.flatten(0, 1).permute(0, 3, 1, 2)
        real = None if images.dtype == torch.float32 else torch.empty_like(images, dtype=torch.float32)
        linear = self._values[step.x].places == (1, 1) and weight.shape[2:] == (1, 1)
        matrix = weight.flatten(1)

        def sums() -> Tensor:
            inputs = images if real is None else real.copy_(images)
            if linear:
                return F.linear(inputs.flatten(1), matrix, bias)
            return F.conv2d(inputs, weight, bias, step.stride, step.padding, 1, step.groups).permute(0, 2, 3, 1)

        out = self._values[step.out[0]]
        if step.neuron is None and step.residual is None:
            y = self._maps[step.out[0]].flatten(0, 1)
            return lambda: _void(y.copy_(sums().view_as(y)))
        lead = (x.shape[0], self.N, *out.places, out.channels)
        return self._fire(i, step, lambda: sums().reshape(lead))

    def _fire(self, i: int, step: Conv | Fire, sums: Callable[[], Tensor]) -> Callable[[], None]:
        fields, prepare = self._fired(i, step)
        out = self._maps[step.out[0]] if step.keep_sum else None
        once = out is not None and out.shape[0] == 1 and self._values[step.out[0]].static
        if once:
            fields["sum"] = 0
        kernel = dispatch.native.event_fire

        def run() -> None:
            prepare()
            x = sums().contiguous()
            if once:
                assert out is not None
                out.copy_(x)
                if step.residual is not None:
                    out.add_(self._maps[step.residual])
                if step.neuron is None:
                    return
            fields["x"] = x.data_ptr()
            fields["size"] = x[0].numel()
            fields["x_stride"] = 0 if x.shape[0] != self.T or self.T == 1 else x[0].numel()
            kernel(**fields)

        return run

    def _pool(self, step: Pool, x: Tensor, y: Tensor) -> Callable[[], None]:
        if step.op == "max_pool" and x.dtype == torch.uint8:
            fields = {
                "images": x.shape[0] * x.shape[1], "height": x.shape[2], "width": x.shape[3], "channels": x.shape[4],
                "kernel": step.kernel, "stride": step.stride, "padding": step.padding, "x": x.data_ptr(),
                "y": y.data_ptr(), "threads": self._threads,
            }  # fmt: skip
            kernel = dispatch.native.event_max_pool
            return lambda: kernel(**fields)
        if step.kernel == 1 and step.padding == 0:
            chosen = x[:, :, :: step.stride, :: step.stride][:, :, : y.shape[2], : y.shape[3]]
            return lambda: _void(y.copy_(chosen))

        def run() -> None:
            images = x.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32)
            if step.op == "max_pool":
                found = F.max_pool2d(images, step.kernel, step.stride, step.padding)
            else:
                found = F.avg_pool2d(images, step.kernel, step.stride, step.padding, step.ceil, step.count_padding)
            y.copy_(found.permute(0, 2, 3, 1).view_as(y))

        return run

    def _attention(self, step: Attention, y: Tensor) -> Callable[[], None]:
        q, k, v = (self._maps[index] for index in step.reads())
        fields = {
            "maps": q.shape[0] * q.shape[1], "tokens": q.shape[2] * q.shape[3], "channels": q.shape[4],
            "heads": step.heads, "scale": step.scale, "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(),
            "y": y.data_ptr(), "threads": self._threads,
        }  # fmt: skip
        kernel = dispatch.native.event_attention
        return lambda: kernel(**fields)


def _void(_: object) -> None:
    """Drops a result."""


def _map(step: Map, x: Tensor, y: Tensor) -> Callable[[], None]:
    if step.op == "complement":
        return lambda: _void(torch.bitwise_xor(x, 1, out=y))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": lambda z: z.relu_(), "sigmoid": lambda z: z.sigmoid_(), "clamp": lambda z: z.clamp_(step.low, step.high),
        "scale": lambda z: z.mul_(step.high), "shift": lambda z: z.add_(step.high),
    }  # fmt: skip
    function = functions[step.op]
    return lambda: _void(function(y.copy_(x)))


def _join(step: Join, xs: Sequence[Tensor], y: Tensor) -> Callable[[], None]:
    if step.op == "cat":
        parts = y.split([x.shape[-1] for x in xs], -1)
        pairs = list(zip(parts, xs, strict=True))
        return lambda: [part.copy_(x.expand_as(part)) for part, x in pairs] and None
    functions: dict[str, Callable[..., Tensor]] = {"add": torch.add, "mul": torch.mul, "or": torch.bitwise_or}
    function, a, b = functions[step.op], *xs
    if y.dtype == torch.float32 and a.dtype == b.dtype == torch.uint8:
        return lambda: _void(function(a.to(torch.float32), b, out=y))
    return lambda: _void(function(a, b, out=y))
