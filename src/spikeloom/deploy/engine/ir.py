"""What the event engine runs: values, and the steps that make them, as data that can be written down and checked.

A value is a map [T, N, H, W, C] of bytes ("spikes": 0/1 or small integers) or of float32 ("real"); features are maps of
one place. Steps stand in the order in which they run. The rules by which a step's outputs follow from its inputs are
here once: lowering makes values by them, and loading checks a file by them, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from spikeloom.errors import UsageError

MOST = 255  # of a byte
MOST_ELEMENTS = 1 << 32  # of all maps of one image
MOST_LEVELS = 16  # of native/kernels.hpp

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Margin = Annotated[int, Field(ge=0, le=1 << 10)]
Index = Annotated[int, Field(ge=0)]


class PlanError(UsageError):
    """A plan whose parts do not fit together."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Value(_Strict):
    """The shape and kind of one step of a map.

    Attributes:
        height, width, channels: H, W, C.
        most: the largest value of spikes; None for real values.
        static: the same at every step, and kept once.
    """

    height: Size
    width: Size
    channels: Size
    most: Annotated[int, Field(ge=1, le=MOST)] | None = None
    static: bool = False

    @property
    def spikes(self) -> bool:
        return self.most is not None

    @property
    def size(self) -> int:
        """Elements of one step of one image."""
        return self.height * self.width * self.channels

    @property
    def places(self) -> tuple[int, int]:
        return self.height, self.width


class Neuron(_Strict):
    """Constants of `ops.scan`, equations there: charge, thresholds (ascending levels), reset (None: soft)."""

    decay: float
    gain: float
    threshold: Annotated[tuple[float, ...], Field(min_length=1, max_length=MOST_LEVELS)]
    v_reset: float | None
    strict_firing: bool


class _Step(_Strict):
    """One step; `layer` names the module that it comes from."""

    layer: str
    out: Annotated[tuple[int, ...], Field(max_length=2)]

    def reads(self) -> tuple[int, ...]:
        """Indices of the values that it needs."""
        raise NotImplementedError

    def tensors(self) -> tuple[str, ...]:
        """Names of its weights."""
        return ()

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        """What its inputs [as `reads`] make: the values of `out`.

        Raises:
            PlanError: they do not fit.
        """
        raise NotImplementedError

    def _need(self, fits: bool, what: str) -> None:
        if not fits:
            raise PlanError(f"{self.layer}: {what}")


class _Fired(_Step):
    """A step that may end in neurons: `out` is what `keep_sum` and `neuron` ask for, the sum before the spikes."""

    x: Index
    residual: Index | None = None
    keep_sum: bool = True
    neuron: Neuron | None = None

    def reads(self) -> tuple[int, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    def _fired(self, sums: Value, values: Sequence[Value]) -> list[Value]:
        made: list[Value] = []
        if self.residual is not None:
            other = values[1]
            self._need((*other.places, other.channels) == (*sums.places, sums.channels), "the shortcut's shape differs")
            sums = sums.model_copy(update={"static": sums.static and other.static})
        if self.keep_sum:
            made.append(sums)
        if self.neuron is not None:
            made.append(sums.model_copy(update={"most": len(self.neuron.threshold), "static": False}))
        self._need(bool(made), "a step without a result")
        return made


class Conv(_Fired):
    """A convolution or, on maps of one place, a linear layer, with its bias, shortcut and neurons.

    Attributes:
        weight: [C', C / groups, k, k'], float32, bfloat16 or int8; its bias [C'] follows.
        scale: of int8 weights, what they are multiplied by in every output channel [C'].
        way: "event" adds up the weights' rows of active inputs, "direct" multiplies, "dense" is PyTorch's.
    """

    op: Literal["conv"] = "conv"
    weight: str
    scale: str | None = None
    bias: str | None = None
    stride: Annotated[int, Field(ge=1, le=64)] = 1
    padding: tuple[Margin, Margin] = (0, 0)
    groups: Size = 1
    way: Literal["event", "dense", "direct"] = "dense"

    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.scale, self.bias) if name is not None)

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x, weight = values[0], tensors[self.weight]
        known = (torch.float32, torch.bfloat16) if self.scale is None else (torch.int8,)
        self._need(weight.dtype in known, f"its weight is not {' or '.join(str(dtype)[6:] for dtype in known)}")
        self._need(weight.dim() == 4, "its weight has not four axes")
        out, inside, *kernel = weight.shape
        self._need(x.channels == inside * self.groups and out % self.groups == 0, "channels do not fit the weight")
        bias = None if self.bias is None else tensors[self.bias]
        self._need(bias is None or bias.shape == (out,), "the bias does not fit the weight")
        self._need(bias is None or bias.dtype == torch.float32, "its bias is not float32")
        scale = None if self.scale is None else tensors[self.scale]
        fits = scale is None or (scale.shape == (out,) and scale.dtype == torch.float32)
        self._need(fits, "the scale does not fit the weight")
        sides = [
            (side + 2 * margin - width) // self.stride + 1
            for side, margin, width in zip(x.places, self.padding, kernel, strict=True)
        ]
        self._need(min(sides) >= 1, "the kernel is larger than its input")
        self._need(self.way != "event" or self.takes_events(x, weight), "no kernel runs this layer by events")
        sums = Value(height=sides[0], width=sides[1], channels=out, static=x.static)
        return self._fired(sums, values)

    def real_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight as float32."""
        weight = tensors[self.weight].float()
        return weight if self.scale is None else weight * tensors[self.scale].view(-1, 1, 1, 1)

    def depthwise(self, weight: Tensor) -> bool:
        """Whether every channel has one filter of its own."""
        return self.groups > 1 and self.groups == weight.shape[0] and weight.shape[1] == 1

    def takes_events(self, x: Value, weight: Tensor) -> bool:
        """Whether the event kernels can run it."""
        return x.spikes and not x.static and (self.groups == 1 or self.depthwise(weight))


class Fire(_Fired):
    """Neurons on a map that another step made."""

    op: Literal["fire"] = "fire"

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        self._need(not values[0].spikes, "neurons fire on real values here")
        return self._fired(values[0], values)


class _One(_Step):
    x: Index

    def reads(self) -> tuple[int, ...]:
        return (self.x,)


class Pool(_One):
    """Maximum or mean of windows; a mean takes real values, the maximum of spikes are spikes."""

    op: Literal["max_pool", "avg_pool"]
    kernel: Annotated[int, Field(ge=1, le=256)]
    stride: Annotated[int, Field(ge=1, le=256)]
    padding: Margin = 0
    ceil: bool = False
    count_padding: bool = True

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x = values[0]
        self._need(2 * self.padding <= self.kernel, "padding must be at most half the window")
        self._need(not (self.ceil and self.op == "max_pool"), "a maximum over windows that hang over")
        up = self.stride - 1 if self.ceil else 0
        sides = [(side + 2 * self.padding - self.kernel + up) // self.stride + 1 for side in x.places]
        if self.ceil:  # no window starts behind the input
            sides = [
                n - ((n - 1) * self.stride >= side + self.padding) for n, side in zip(sides, x.places, strict=True)
            ]
        self._need(min(sides) >= 1, "the window is larger than its input")
        keeps = self.op == "max_pool" or self.kernel == 1
        update = {"height": sides[0], "width": sides[1], "most": x.most if keeps else None}
        return [x.model_copy(update=update)]


class PadChannels(_One):
    """Channels of zeros before and behind."""

    op: Literal["pad_channels"] = "pad_channels"
    before: Annotated[int, Field(ge=0, le=1 << 16)]
    behind: Annotated[int, Field(ge=0, le=1 << 16)]

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        return [values[0].model_copy(update={"channels": values[0].channels + self.before + self.behind})]


class Mean(_One):
    """The mean over all places."""

    op: Literal["mean"] = "mean"

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        return [values[0].model_copy(update={"height": 1, "width": 1, "most": None})]


class Flatten(_One):
    """A map as features, places first: weights behind it are ordered so."""

    op: Literal["flatten"] = "flatten"

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x = values[0]
        self._need(x.size <= 1 << 20, "more features than a layer can have")
        return [x.model_copy(update={"height": 1, "width": 1, "channels": x.size})]


class Map(_One):
    """A function of every element of real values, or `1 - x` of 0/1 spikes."""

    op: Literal["relu", "sigmoid", "clamp", "scale", "shift", "complement"]
    low: float = 0.0
    high: float = 0.0

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x = values[0]
        if self.op == "complement":
            self._need(x.most == 1, "the complement of what is not 0 or 1")
            return [x]
        return [x.model_copy(update={"most": None})]


class Affine(_One):
    """`x weight + bias` or `x / weight` with constants of [H or 1, W or 1, C or 1]; real.

    Attributes:
        weight, bias: None for 1 and 0.
    """

    op: Literal["affine", "divide"]
    weight: str | None = None
    bias: str | None = None

    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x = values[0]
        self._need(self.op == "affine" or (self.weight is not None and self.bias is None), "a division by nothing")
        constants = [tensors[name] for name in self.tensors()]
        self._need(
            all(k.dtype == torch.float32 and k.dim() == 3 for k in constants), "its constants are no float32 maps"
        )
        sides = [_spread([side, *(k.shape[i] for k in constants)]) for i, side in enumerate((*x.places, x.channels))]
        self._need(None not in sides, "its constants do not fit the map")
        return [
            Value.model_validate({**dict(zip(("height", "width", "channels"), sides, strict=True)), "static": x.static})
        ]


class Time(_One):
    """The mean, sum or last of all steps: the same at every step from there on."""

    op: Literal["time_mean", "time_sum", "time_last"]

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        x = values[0]
        self._need(not x.static, "there are no steps to join")
        return [x.model_copy(update={"static": True, "most": x.most if self.op == "time_last" else None})]


class Join(_Step):
    """Two values element by element, where axes of one are spread, or more side by side along the channels."""

    op: Literal["add", "mul", "or", "cat"]
    xs: Annotated[tuple[Index, ...], Field(min_length=2, max_length=64)]

    def reads(self) -> tuple[int, ...]:
        return self.xs

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        height, width = (_spread([value.places[i] for value in values]) for i in range(2))
        alike = None not in (height, width) and (self.op != "cat" or len({value.places for value in values}) == 1)
        self._need(alike, "places differ")
        most = [value.most for value in values if value.most is not None]
        spikes = len(most) == len(values)
        bound = max(most, default=0)
        if self.op == "cat":
            channels = sum(value.channels for value in values)
        else:
            channels = _spread([value.channels for value in values])
            self._need(len(values) == 2 and channels is not None, "channels differ")
            if spikes:
                bound = {"add": sum(most), "mul": most[0] * most[1], "or": 1}[self.op]
        self._need(self.op != "or" or (spikes and max(most) == 1), "`or` of what is not 0 or 1")
        kind = bound if spikes and bound <= MOST else None
        static = all(value.static for value in values)
        sides = {"height": height, "width": width, "channels": channels}
        return [Value.model_validate({**sides, "most": kind, "static": static})]


class Attention(_Step):
    """`Q (K^T V) scale` in every head, places as tokens (Spikformer, Eqs. 7-9); q, k, v spikes of one shape."""

    op: Literal["attention"] = "attention"
    q: Index
    k: Index
    v: Index
    heads: Size
    scale: float

    def reads(self) -> tuple[int, ...]:
        return self.q, self.k, self.v

    def infer(self, values: Sequence[Value], tensors: Mapping[str, Tensor]) -> list[Value]:
        q = values[0]
        shapes = {(*value.places, value.channels, value.spikes, value.static) for value in values}
        self._need(shapes == {(*q.places, q.channels, True, False)}, "q, k and v must be spikes of one shape")
        self._need(q.channels % self.heads == 0, "channels are no multiple of the heads")
        return [q.model_copy(update={"most": None})]


def _spread(sides: Sequence[int]) -> int | None:
    """The side of which all others are, or 1."""
    longest = max(sides)
    return longest if all(side in (1, longest) for side in sides) else None


Step = Annotated[
    Conv | Fire | Pool | PadChannels | Mean | Flatten | Map | Affine | Time | Join | Attention,
    Field(discriminator="op"),
]


class Plan(_Strict):
    """A network as steps. Value 0 is the input, values are numbered as steps make them, the last step makes logits.

    Attributes:
        input: of the input: real, static where an image is repeated.
        T: how often a static image is repeated; of a sequence, the steps of the example.
        per_step: logits are [T, N, classes]; else the network joins its steps, and they are [N, classes].
        fixed_T: the network takes sequences of T steps alone.
    """

    input: Value
    T: Annotated[int, Field(ge=1, le=1 << 16)]
    per_step: bool = True
    fixed_T: bool = False
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=1 << 14)]

    def values(self, tensors: Mapping[str, Tensor]) -> list[Value]:
        """All values, from the input on.

        Raises:
            PlanError: a step reads what is not there, writes in another order, or does not fit its inputs.
        """
        values, elements = [self.input], self.input.size
        for step in self.steps:
            for name in step.tensors():
                if name not in tensors:
                    raise PlanError(f"{step.layer}: the weight {name!r} is missing")
            if any(index >= len(values) for index in step.reads()):
                raise PlanError(f"{step.layer}: reads what no step before it makes")
            made = step.infer([values[index] for index in step.reads()], tensors)
            if step.out != tuple(range(len(values), len(values) + len(made))):
                raise PlanError(f"{step.layer}: its results must be values {len(values)} and on, got {step.out}")
            values += made
            elements += sum(value.size for value in made)
            if self.T * elements > MOST_ELEMENTS:
                raise PlanError(f"{step.layer}: more than {MOST_ELEMENTS} elements for one image")
        if values[-1].places != (1, 1):
            raise PlanError("the last step must make logits, a map of one place")
        if not (self.per_step or values[-1].static):
            raise PlanError("the last step must join the steps in time")
        return values

    def in_place(self, values: Sequence[Value]) -> list[tuple[int, int]]:
        """Sums that can be written over their shortcut, which no step reads later: (sum, shortcut)."""
        last = {index: i for i, step in enumerate(self.steps) for index in step.reads()}
        # Zeros around channels are written once, and wanted at every call.
        kept = {step.out[0] for step in self.steps if isinstance(step, PadChannels)}

        def moves(index: int) -> bool:
            return values[index].most is None and not values[index].static and index not in kept

        return [
            (step.out[0], step.residual)
            for i, step in enumerate(self.steps)
            if isinstance(step, Conv | Fire) and step.keep_sum and step.residual is not None
            if last[step.residual] == i and moves(step.residual) and moves(step.out[0])
        ]
