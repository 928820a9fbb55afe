"""What an audit hands to the rules of energy: layers with what entered them, and what operations cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Input = Literal["silent", "binary", "ternary", "integer", "scaled", "real"]
Kind = Literal["conv", "linear", "matmul"]
Role = Literal["encoder", "body", "classifier"]
Json = dict[str, Any]

SPIKES: tuple[Input, ...] = ("silent", "binary", "ternary")


@dataclass(frozen=True)
class Costs:
    """Energy of one 32-bit operation, in picojoules: 45 nm CMOS at 0.9 V (Horowitz 2014, ISSCC, Fig. 1.1.9).

    Attributes:
        mac: a multiplication and an addition.
        ac: an addition.
        multiply: a multiplication.
    """

    mac: float = 4.6
    ac: float = 0.9
    multiply: float = 3.7


@dataclass(frozen=True)
class Operand:
    """What was seen in one input of a layer, over all images and steps.

    Attributes:
        input: "silent"; "binary" (0 and 1); "ternary" (-1, 0, 1); "integer"; "scaled" (one of these times a common
            factor: spikes after average pooling or dropout); "real".
        scale: the factor of a scaled input, otherwise 1; of spikes that were averaged over windows of different sizes
            what one adds to the mean, on average.
        minimum, maximum: the smallest and the largest value.
        mean: the mean value.
        rate: the mean absolute value: the firing rate of spikes; an integer N counts N. For a real input its density.
        density: the share of elements that are not 0.
    """

    input: Input = "binary"
    scale: float = 1.0
    minimum: float = 0.0
    maximum: float = 1.0
    mean: float = 0.0
    rate: float = 0.0
    density: float = 0.0


@dataclass(frozen=True)
class Layer:
    """A convolution, linear layer or matrix product, for one image. The first nine fields are of the driving operand.

    Attributes:
        name: of the module or weight; products without a weight are `module:matmul`, the second one `module:matmul2`.
        kind: "conv", "linear" or "matmul" (both operands computed).
        input, max, rate, density, mean, scale, min: as `Operand`. Of a product, those of the operand whose spikes
            save the multiplications.
        operands: the input of a layer with a weight; of a product both.
        role: "encoder" receives the data themselves, "classifier" is the last linear layer, "body" all else.
        operations: multiply-accumulates of all steps that were computed, without biases, as if all inputs were dense.
        bias: additions of the layer's own bias in these steps.
        outputs: output elements of these steps.
        steps: the steps that were computed: 1 for a repeated image in a layer without memory.
        rates: of the driving operand, at each step; empty where steps cannot be told apart.
        shape: of a product, (products per image and step, n, k, m) of [n, k] x [k, m].
        channels, dead, saturated: input channels, those that were 0 everywhere, and those that were never 0.
        why: where an input that is not made of spikes comes from; empty for spikes.
        breaks: whether this layer keeps the network from being spike-driven.
        macs, acs, energy_pj: by the rule "measured".
        effective: operations whose weight and input are both not 0, neither padding nor bias: NeuroBench's count.
    """

    name: str
    kind: Kind
    operands: tuple[Operand, ...]
    role: Role = "body"
    operations: float = 0.0
    bias: float = 0.0
    outputs: float = 0.0
    steps: float = 1.0
    rates: tuple[float, ...] = ()
    shape: tuple[float, int, int, int] | None = None
    channels: int = 0
    dead: int = 0
    saturated: int = 0
    why: str = ""
    breaks: bool = False
    energy_pj: float = 0.0
    effective: float = 0.0

    @property
    def driving(self) -> Operand:
        """The operand that decides what a multiplication becomes: spikes before integers before real values."""
        order = (SPIKES, ("integer", "scaled"), ("real",))
        for kinds in order:
            found = [o for o in self.operands if o.input in kinds]
            if found:
                return min(found, key=lambda o: o.rate)
        raise ValueError(f"layer {self.name} has no operand")

    @property
    def input(self) -> Input:
        return self.driving.input

    @property
    def max(self) -> float:
        return self.driving.maximum

    @property
    def min(self) -> float:
        return self.driving.minimum

    @property
    def scale(self) -> float:
        return self.driving.scale

    @property
    def mean(self) -> float:
        return self.driving.mean

    @property
    def rate(self) -> float:
        return self.driving.rate

    @property
    def density(self) -> float:
        return self.driving.density

    @property
    def sops(self) -> float:
        """Synaptic operations: rate x T x FLOPs (Spikformer, Eq. 21; Spikingformer, Eq. 18).

        A scaled input counts in units of its scale, a pooled spike as the spikes that were pooled.
        """
        return self.rate / self.scale * (self.operations + self.bias)

    @property
    def fr(self) -> float:
        """The firing rate of the published rules: the mean of the (absolute) input."""
        return abs(self.mean) if self.input == "real" else self.rate

    @property
    def macs(self) -> float:
        return 0.0 if self.input != "real" else self.operations + self.bias

    @property
    def acs(self) -> float:
        return 0.0 if self.input == "real" else self.sops

    def to_json(self) -> Json:
        """Plain values of all fields."""
        shown = ("input", "max", "min", "scale", "mean", "rate", "density", "sops", "macs", "acs")
        return {**asdict(self), **{name: getattr(self, name) for name in shown}}

    @classmethod
    def from_json(cls, values: Json) -> Layer:
        """The layer of which these are the `to_json`."""
        shape, own = values["shape"], {f.name: values[f.name] for f in fields(cls) if f.name in values}
        own |= {
            "operands": tuple(Operand(**operand) for operand in values["operands"]),
            "rates": tuple(values["rates"]),
            "shape": None if shape is None else tuple(shape),
        }
        return cls(**own)
