"""The event engine: a trained network run by its spikes (plan in `engine.ir`, kernels in native/engine).

Between layers there are maps of bytes. A convolution lists the active inputs of every window and adds up their rows of
weights in registers, fires the neurons behind it over all steps while the sums are in cache, and writes the next map.
Layers whose inputs are real values (the first, a gate) are multiplied by PyTorch's kernel or by ours (`Engine.tuned`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
import torch
from torch import Tensor

from spikeloom.checks import all_finite
from spikeloom.deploy.engine.cost import Cost, cost_of
from spikeloom.deploy.engine.executor import Arena, Executor, States
from spikeloom.deploy.engine.ir import Conv, Plan, PlanError, Step, Value
from spikeloom.deploy.engine.pack import pack
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, read_safetensors, write_safetensors
from spikeloom.ops import _dispatch

# Images that go through all layers together: weights are read and every layer is started for all of them, and their
# largest map fits in cache.
FEWEST, MOST, MAP_BYTES = 16, 64, 6 << 20
MOST_BYTES = 4 << 30  # of all maps of the images that go together, unless one needs more
_FORMAT = "spikeloom event engine 1"
_FILE_BYTES = 1 << 34

Way = Literal["event", "dense", "direct"]

Timings = dict[int, dict[str, float | None]]
"""By step, what was measured when its way was chosen."""
_MEASURED = ("active", *(f"{way}_ms" for way in get_args(Way)))


class Engine:
    """A network that runs by its spikes. Called as the model; threads may call it at the same time.

    Args:
        plan: of `engine.lower.lower`, or of a file.
        tensors: its weights, by the names that the plan uses.
        timings: what `tuned` measured.

    Attributes:
        source: what its file says that it was made of, the `files.fingerprint` of a network, or nothing.

    Raises:
        PlanError: plan and weights do not fit together.
        UsageError: the native kernels are not there.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], timings: Timings | None = None):
        if _dispatch.native is None:
            raise UsageError("the event engine needs the native kernels, which this installation lacks: see `doctor`")
        self._values = plan.values(tensors)
        # Of one image: the largest map that is the same at all steps, and one step of the largest other one.
        self._static_bytes, self._step_bytes = (
            max((v.size * (1 if v.spikes else 4) for v in self._values if v.static == static), default=0)
            for static in (True, False)
        )
        self._cost = cost_of(plan, self._values, tensors)
        self._plan, self._tensors = plan, dict(tensors)
        self._level = _dispatch.native.level()
        self._packed = {
            i: pack(step, self._values[step.x], self._tensors)
            for i, step in enumerate(plan.steps)
            if isinstance(step, Conv)
        }
        # A call takes an arena and puts it back: there are as many as calls at the same time. Lists do so at once, so
        # that no lock can be held by a thread that a fork leaves behind.
        self._idle: list[Arena] = []
        self._timings = timings or {}
        self.source = ""

    def __repr__(self) -> str:
        given, ways = self._plan.input, [step.way for step in self._plan.steps if isinstance(step, Conv)]
        steps = f"{self._plan.T} steps of an image" if given.static else "sequences"
        return (
            f"Engine({_shape(given)} -> {_shape(self._values[-1])}, {steps}, {len(self._plan.steps)} layers, "
            f"{ways.count('event')} of them by events)"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of [N, ...], an image repeated T times, or [T, N, ...]: [T, N, classes], or [N, classes] of a network
        that joins its steps.

        Raises:
            ValueError: x has another shape, or holds NaN or infinite numbers.
        """
        sequence, T = self._sequence(x)
        parts = -(-sequence.shape[1] // self._most(T))
        logits = [self._run(part, T) for part in sequence.tensor_split(parts, 1)]
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1 if self._plan.per_step else 0)

    def _most(self, T: int) -> int:
        fit = min(max(MAP_BYTES // max(self._static_bytes, T * self._step_bytes), FEWEST), MOST)
        return max(1, min(fit, MOST_BYTES * self._plan.T // (self._cost.bytes * T)))

    @property
    def cost(self) -> Cost:
        """What one image costs, with as many steps as the example had."""
        return self._cost

    def stream(self) -> EngineStream:
        """The engine with neurons that remember: a call continues where the one before it ended."""
        return EngineStream(self)

    def _sequence(self, x: Tensor) -> tuple[Tensor, int]:
        """The input as [T or 1, N, H, W, C], and the number of steps."""
        value = self._plan.input
        wanted = (value.channels, *value.places)
        shapes: list[tuple[int, ...]] = [wanted]
        if value.height == 1:
            shapes.append((value.channels, value.width))
        if value.places == (1, 1):
            shapes.append((value.channels,))
        for shape in shapes:
            lead = x.dim() - len(shape)
            if tuple(x.shape[lead:]) == shape and lead == (1 if value.static else 2) and x.numel():
                if self._plan.fixed_T and not value.static and x.shape[0] != self._plan.T:
                    raise ValueError(f"this engine takes sequences of {self._plan.T} steps, got {x.shape[0]}")
                y = x.detach().reshape(*(x.shape[:lead] if lead == 2 else (1, x.shape[0])), *wanted)
                y = y.to(torch.float32).permute(0, 1, 3, 4, 2)
                if not all_finite(y):  # neurons would take it for silence
                    raise ValueError("the input holds NaN or infinite numbers")
                return y, self._plan.T if value.static else x.shape[0]
        lead = "[N, " if value.static else "[T, N, "
        expected = " or ".join(f"{lead}{', '.join(map(str, shape))}]" for shape in shapes)
        raise ValueError(f"this engine takes {expected}, got {tuple(x.shape)}")

    def advance(self, x: Tensor, states: States) -> Tensor:
        """The next steps from some potentials, which are replaced by those after them; a static image is one step."""
        sequence, T = self._sequence(x)
        return self._run(sequence, 1 if self._plan.input.static else T, states)

    def _run(self, x: Tensor, T: int, states: States | None = None) -> Tensor:
        with self.executor(T, x.shape[1]) as executor:
            return executor(x, states)

    @contextmanager
    def executor(self, T: int, N: int) -> Generator[Executor]:
        """Buffers and calls of T steps of N images, which nobody else has until the block ends. Threads stay awake."""
        if _dispatch.native.level() != self._level:
            raise RuntimeError("the instruction level of the kernels changed after the engine was made: make it anew")
        try:
            arena = self._idle.pop()
        except IndexError:
            arena = Arena(partial(Executor, self._plan, self._values, self._tensors, self._packed))
        threads = 1 if _dispatch.native.forked() else torch.get_num_threads()  # others do not survive a fork
        try:
            with torch.no_grad(), _dispatch.native.Awake(threads):
                yield arena.executor(T, N, threads)
        finally:
            self._idle.append(arena)

    # --- choosing, showing, saving ------------------------------------------------------------------------------------

    def timed(self, x: Tensor, repeats: int = 3, images: int = FEWEST) -> tuple[list[float], list[float]]:
        """Seconds that every step takes on the first `images` of x, the least of some runs, and the share of nonzero
        elements in every value."""
        sequence, T = self._sequence(x)
        part = sequence[:, :images]
        with self.executor(T, part.shape[1]) as executor:
            runs = [executor.timed(part) for _ in range(repeats + 1)][1:]
            return [min(times) for times in zip(*runs, strict=True)], executor.densities()

    def tuned(self, x: Tensor, repeats: int = 3, portable: bool | None = None) -> Engine:
        """An engine whose layers run by events or densely, whichever took less time on x.

        Dense layers are PyTorch's (`portable` False), "direct" ones (True), or either, but PyTorch's where a layer
        could run by events (None).
        """
        ways: tuple[Way, ...] = ("event", "direct") if portable else ("event", "dense")
        timed = {way: self.with_ways(way).timed(x, repeats) for way in ways}
        if portable is None:
            timed["direct"] = self.with_ways("direct", only_real=True).timed(x, repeats)
        densities = timed["event"][1]
        steps = list(self._plan.steps)
        timings: Timings = {}
        for i, step in enumerate(steps):
            if not isinstance(step, Conv):
                continue
            skipped = ("direct" if portable is None else "") if self._can(step) else "event"
            seconds = {way: times[i] for way, (times, _) in timed.items() if way != skipped}
            steps[i] = step.model_copy(update={"way": min(seconds, key=seconds.__getitem__)})
            timings[i] = {"active": densities[step.x]}
            timings[i] |= {f"{way}_ms": 1e3 * seconds[way] if way in seconds else None for way in get_args(Way)}
        return Engine(self._plan.model_copy(update={"steps": tuple(steps)}), self._tensors, timings)

    def _can(self, step: Conv) -> bool:
        """Whether a layer can run by events."""
        return step.takes_events(self._values[step.x], self._tensors[step.weight])

    def with_ways(self, way: Way, only_real: bool = False) -> Engine:
        """The engine whose layers all run one way, where they can, or only those that cannot run by events."""

        def changes(step: Step) -> bool:
            return isinstance(step, Conv) and (not self._can(step) if only_real else way != "event" or self._can(step))

        return self.with_steps(
            step.model_copy(update={"way": way}) if changes(step) else step for step in self._plan.steps
        )

    def with_steps(self, steps: Iterable[Step]) -> Engine:
        """The engine with other steps for the same weights."""
        return Engine(self._plan.model_copy(update={"steps": tuple(steps)}), self._tensors)

    def layers(self) -> list[dict[str, Any]]:
        """The steps: `layer`, `step`, `reads`, `makes` (shapes), `way` ("event", "dense", "direct" or ""), and what was
        measured when the way was chosen: `active` (share of nonzero inputs), `event_ms`, `dense_ms` and `direct_ms`,
        None where not."""
        rows: list[dict[str, Any]] = []
        for i, step in enumerate(self._plan.steps):
            parts = [step.op, "shortcut" * (getattr(step, "residual", None) is not None)]
            parts.append("neurons" * (step.op != "fire" and getattr(step, "neuron", None) is not None))
            way = step.way if isinstance(step, Conv) else ""
            row = {
                "layer": step.layer,
                "step": " + ".join(filter(None, parts)),
                "reads": _shape(self._values[step.reads()[0]]),
                "makes": _shape(self._values[step.out[-1]]),
                "way": way,
            }
            rows.append(row | self._timings.get(i, dict.fromkeys(_MEASURED)))
        return rows

    def plan(self) -> str:
        """`layers` as a table."""
        columns = ("layer", "step", "reads", "makes", "way", *_MEASURED)
        rows: list[tuple[str, ...]] = [columns]
        for layer in self.layers():
            cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell or "") for cell in layer.values()]
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

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The weights and constants by their names in the plan."""
        return self._tensors

    def save(self, path: PathLike) -> None:
        """Writes weights and plan as one safetensors file, whole or not at all."""
        source = {"source": self.source} if self.source else {}
        write_safetensors(path, self._tensors, {"format": _FORMAT, "plan": self._plan.model_dump_json(), **source})

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self._plan.model_dump_json(), self._tensors, self._timings)


def _restored(plan: str, tensors: dict[str, Tensor], timings: Timings) -> Engine:
    """An engine from what its file holds, for pickle and copy."""
    return Engine(Plan.model_validate_json(plan), tensors, timings)


def load(path: PathLike, max_bytes: int = 2 << 30, max_operations: int = 200 * 10**9) -> Engine:
    """An engine from the file that `Engine.save` wrote. Nothing in the file is executed; everything is checked.

    Args:
        path: of the file.
        max_bytes, max_operations: the most that one image may cost (`Engine.cost`).

    Raises:
        UsageError: the file is not there or not whole, its plan and weights do not fit together, or an image costs more
            than is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; an engine is written by `spikeloom run RUN --save FILE`")
    if path.stat().st_size > _FILE_BYTES:
        raise UsageError(f"{path}: larger than {_FILE_BYTES >> 30} GiB, which no engine is")
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise UsageError(f"{path}: not an event engine ({_FORMAT!r} is missing in its header)")
    try:
        plan = Plan.model_validate_json(metadata.get("plan", ""))
        cost = cost_of(plan, plan.values(tensors), tensors)
        for found, most, unit, name in (
            (cost.bytes, max_bytes, "bytes of maps", "max_bytes"),
            (cost.operations, max_operations, "operations", "max_operations"),
        ):
            if found > most:
                raise PlanError(
                    f"an image takes {found:,} {unit}, the limit is {most:,}: raise it by load(..., {name}=...)"
                )
        engine = Engine(plan, {name: tensor.contiguous() for name, tensor in tensors.items()})
        engine.source = metadata.get("source", "")
        return engine
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'plan'}: {first['msg']}"
    except PlanError as error:
        reason = str(error)
    # The reason may quote the file.
    raise UsageError(f"{path}: plan: {' '.join(reason.split())[:300]}")


class EngineStream:
    """Steps as they come: carries the potentials of all neurons from call to call."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._states: States = {}

    def __repr__(self) -> str:
        return f"EngineStream({self._engine!r}, {'neurons remember' if self._states else 'at rest'})"

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the next steps, as the engine's; of a static image T = 1 step, [N, ...] -> [1, N, classes]."""
        images = next(iter(self._states.values())).shape[1] if self._states else None
        axis = 0 if self._engine.values[0].static else 1
        if images not in (None, x.shape[axis]):
            raise ValueError(f"this stream carries {images} images, got {x.shape[axis]}: start another")
        return self._engine.advance(x, self._states)


def _shape(value: Value) -> str:
    return f"{value.channels}x{value.height}x{value.width}" if value.places != (1, 1) else str(value.channels)
