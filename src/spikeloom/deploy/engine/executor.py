"""The memory of one run of a plan, and the calls that fill it."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeloom.deploy.engine.bind import bind_step, input_fields
from spikeloom.deploy.engine.cost import products
from spikeloom.deploy.engine.ir import Conv, Fire, Neuron, PadChannels, Plan, Step, Value
from spikeloom.deploy.engine.pack import Packed
from spikeloom.ops import _dispatch
from spikeloom.ops.scan.params import ScanParams

SHAPES = 32  # whose calls an arena keeps
# Products of a layer of PyTorch's from which on all threads share it: OpenMP's look for more work for milliseconds
# afterwards, on the cores of the engine's own.
LARGE = 10**8

States = dict[int, Tensor]
"""Potentials [levels, N, H, W, C] by step."""


class Arena:
    """The memory of one run at a time, whatever its steps and images: buffers are as large as the largest run needed.

    Args:
        make: an executor of T steps of N images on some threads, in this arena.
    """

    def __init__(self, make: Callable[[Arena, int, int, int], Executor]):
        self._make = make
        self._buffers: dict[int, Tensor] = {}
        self._executors: OrderedDict[tuple[int, int, int], Executor] = OrderedDict()
        self.last: Executor | None = None  # that ran here

    def executor(self, T: int, N: int, threads: int) -> Executor:
        """The calls of T steps of N images; those of the last few shapes are kept."""
        key = (T, N, threads)
        found = self._executors.pop(key, None) or self._make(self, T, N, threads)
        self._executors[key] = found
        if len(self._executors) > SHAPES:
            self._executors.popitem(last=False)[1].release()
        return found

    def buffer(self, key: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory by a number: the same at every call, unless a larger shape is asked for."""
        size = math.prod(shape)
        found = self._buffers.get(key)
        if found is None or found.numel() < size:
            for executor in self._executors.values():
                executor.release()  # it has the smaller one
            self._executors.clear()
            self.last = None
            self._buffers.pop(key, None)
            found = self._buffers[key] = torch.empty(size, dtype=dtype)
        return found[:size].view(*shape)

    def bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Executor:
    """The calls that run T steps of N images in the buffers of an arena: nothing is allocated after the first run.

    (But for what PyTorch's own layers allocate for themselves.)
    """

    def __init__(
        self,
        plan: Plan,
        values: Sequence[Value],
        tensors: Mapping[str, Tensor],
        packed: Mapping[int, Packed],
        arena: Arena,
        T: int,
        N: int,
        threads: int,
    ):
        self.T, self.N = T, N
        self._plan, self._values, self._tensors, self._packed = plan, values, tensors, packed
        self._arena, self._threads = arena, threads
        shared = dict(plan.in_place(values))
        self._maps: list[Tensor] = []
        for index, value in enumerate(values):
            other = shared.get(index)
            self._maps.append(self._buffer(index, value) if other is None else self._maps[other])
        self._zeroed: list[Tensor] = []
        self._kept: list[Any] = []
        self._states: States | None = None
        self._calls = [self._call(i, step) for i, step in enumerate(plan.steps)]

    def _buffer(self, index: int, value: Value) -> Tensor:
        shape = (1 if value.static else self.T, self.N, *value.places, value.channels)
        return self._arena.buffer(index, shape, torch.uint8 if value.spikes else torch.float32)

    def release(self) -> None:
        """Forgets all buffers."""
        self._calls.clear()
        self._maps.clear()
        self._zeroed.clear()

    def _start(self, x: Tensor, states: States | None) -> None:
        self._states = states
        if self._arena.last is not self:  # another shape has written here
            self._arena.last = self
            for zeros in self._zeroed:
                zeros.zero_()
        self._maps[0].copy_(x)

    def __call__(self, x: Tensor, states: States | None = None) -> Tensor:
        self._start(x, states)
        for call in self._calls:
            call()
        logits = self._maps[-1].flatten(2)
        return logits.expand(self.T, *logits.shape[1:]).clone() if self._plan.per_step else logits[0].clone()

    def timed(self, x: Tensor) -> list[float]:
        """Seconds of every step."""
        self._start(x, None)
        times: list[float] = []
        for call in self._calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def each_step(self, x: Tensor, given: Mapping[int, Tensor]) -> Iterator[tuple[Step, list[Tensor], list[Tensor]]]:
        """Runs the steps one after the other, each on the given values, where there are some, instead of its own.

        Yields the step, what it read and what it made.
        """
        self._start(x, None)
        for step, call in zip(self._plan.steps, self._calls, strict=True):
            for index in step.reads():
                if index in given:
                    self._maps[index].copy_(given[index])
            read = [given[index] if index in given else self._maps[index].clone() for index in step.reads()]
            call()
            yield step, read, [self._maps[index] for index in step.out]

    def densities(self) -> list[float]:
        """The share of nonzeros of every value after a run."""
        return [torch.count_nonzero(values).item() / values.numel() for values in self._maps]

    # --- steps --------------------------------------------------------------------------------------------------------

    def _call(self, i: int, step: Step) -> Callable[[], None]:
        maps = self._maps
        if isinstance(step, Conv):
            return {"event": self._event, "dense": self._dense, "direct": self._direct}[step.way](i, step)
        if isinstance(step, Fire):
            return self._fire(i, step, lambda: maps[step.x])
        if isinstance(step, PadChannels):
            self._zeroed.append(maps[step.out[0]])
        xs = [maps[index] for index in step.reads()]
        bound = bind_step(step, xs, maps[step.out[0]], self._tensors, self._threads)
        self._kept.append(bound.kept)
        if len(bound.calls) == 1:
            return bound.calls[0]
        return lambda: _void([call() for call in bound.calls])

    def _fired(self, i: int, step: Conv | Fire) -> tuple[dict[str, Any], Callable[[], int]]:
        """The kernels' fields of what follows the sums, and what gives the address of the potentials at every call."""
        neuron = step.neuron or Neuron(decay=0.0, gain=1.0, threshold=(0.0,), v_reset=None, strict_firing=False)
        params = ScanParams(neuron.threshold, neuron.v_reset, neuron.strict_firing)
        fires = params.kernel_fields()
        self._kept.append(fires)  # the fields point to its tensors
        residual = None if step.residual is None else self._maps[step.residual]
        real = residual is not None and residual.dtype == torch.float32
        pointer = 0 if residual is None else residual.data_ptr()
        stride = 0 if residual is None or residual.shape[0] != self.T else residual[0].numel()
        spikes = None if step.neuron is None else self._maps[step.out[-1]]
        fields = {
            "steps": self.T,
            "residual": pointer if real else 0,
            "residual_spikes": 0 if real else pointer,
            "residual_stride": stride,
            "sum": self._maps[step.out[0]].data_ptr() if step.keep_sum else 0,
            "spikes": 0 if spikes is None else spikes.data_ptr(),
            "decay": neuron.decay,
            "gain": neuron.gain,
            "threads": self._threads,
            **fires.forward,
        }

        def potentials() -> int:
            if self._states is None or spikes is None:
                return 0
            if i not in self._states:
                shape = (params.levels, *spikes.shape[1:])
                self._states[i] = torch.full(shape, fires.forward["v_rest"])
            return self._states[i].data_ptr()

        return fields, potentials

    def _layer(self, step: Conv) -> dict[str, int]:
        """The kernels' fields of a layer's shapes."""
        value, weight = self._values[step.x], self._tensors[step.weight]
        return {
            "images": self.N,
            "height": value.height,
            "width": value.width,
            "in": value.channels,
            "out": weight.shape[0],
            "kernel_height": weight.shape[2],
            "kernel_width": weight.shape[3],
            "stride": step.stride,
            "padding_y": step.padding[0],
            "padding_x": step.padding[1],
        }

    def _event(self, i: int, step: Conv) -> Callable[[], None]:
        fields, potentials = self._fired(i, step)
        fields |= self._layer(step) | {
            "depthwise": step.depthwise(self._tensors[step.weight]),
            "binary": self._values[step.x].most == 1,
            "x": self._maps[step.x].data_ptr(),
            **self._packed[i].fields(),
        }
        kernel = _dispatch.native.bound_engine_conv(fields, ["v"])
        return lambda: kernel(potentials())

    def _direct(self, i: int, step: Conv) -> Callable[[], None]:
        x = self._maps[step.x]
        fields, potentials = self._fired(i, step)
        fields |= self._layer(step) | {
            "x_steps": x.shape[0],
            "groups": step.groups,
            "once": step.keep_sum and self._values[step.out[0]].static,
            **input_fields(x),
            "weight": self._packed[i].weight.data_ptr(),
            "bias": self._packed[i].bias.data_ptr(),
        }
        kernel = _dispatch.native.bound_engine_direct(fields, ["v"])
        return lambda: kernel(potentials())

    def _dense(self, i: int, step: Conv) -> Callable[[], None]:
        x, (weight, bias, *_) = self._maps[step.x], self._packed[i]
        images = x.flatten(0, 1).permute(0, 3, 1, 2)
        real = None
        if images.dtype != torch.float32:
            real = self._arena.buffer(~i, x.flatten(0, 1).shape, torch.float32).permute(0, 3, 1, 2)
        alone = self._values[step.x].places == (1, 1) and weight.shape[2:] == (1, 1)
        linear = alone and step.padding == (0, 0) and step.groups == 1
        matrix = weight.flatten(1)

        def sums() -> Tensor:
            inputs = images if real is None else real.copy_(images)
            if linear:
                return F.linear(inputs.flatten(1), matrix, bias)
            return F.conv2d(inputs, weight, bias, step.stride, step.padding, 1, step.groups).permute(0, 2, 3, 1)

        if self.N * x.shape[0] * products(step, self._values, self._tensors) >= LARGE:
            sums = partial(_shared, self._threads, sums)
        out = self._values[step.out[0]]
        if step.neuron is None and step.residual is None:
            y = self._maps[step.out[0]].flatten(0, 1)
            return lambda: _void(y.copy_(sums().view_as(y)))
        lead = (x.shape[0], self.N, *out.places, out.channels)
        return self._fire(i, step, lambda: sums().reshape(lead))

    def _fire(self, i: int, step: Conv | Fire, sums: Callable[[], Tensor]) -> Callable[[], None]:
        fields, potentials = self._fired(i, step)
        value = self._values[step.out[0]]
        many = self._maps[step.x].shape[0] == self.T > 1
        size = self.N * value.size
        fields |= {"size": size, "x_stride": size if many else 0, "once": step.keep_sum and value.static}
        kernel = _dispatch.native.bound_engine_fire(fields, ["x", "v"])

        def run() -> None:
            x = sums().contiguous()
            kernel(x.data_ptr(), potentials())

        return run


def _shared(threads: int, sums: Callable[[], Tensor]) -> Tensor:
    with _dispatch.native.LayerThreads(threads):
        return sums()


def _void(_: object) -> None:
    """Drops a result."""
