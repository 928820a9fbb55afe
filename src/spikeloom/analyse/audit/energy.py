"""Energy of a network from what enters its layers, by each published rule.

The rules differ between papers, so every energy carries the name of its rule. All counts are for one image, summed
over its time steps; `FLOPs` of the papers are multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spikeloom.analyse.audit.attention_products import keys_values_first
from spikeloom.analyse.audit.layer import Costs, Layer
from spikeloom.registry import Registry

Json = dict[str, Any]


@dataclass(frozen=True)
class LayerEnergy:
    """One layer under a rule: multiply-accumulates, accumulates and picojoules for one image."""

    name: str
    macs: float
    acs: float
    energy_pj: float


@dataclass(frozen=True)
class Energy:
    """A network under a rule, for one image.

    Attributes:
        rule: its name in `RULES`.
        costs: the energies of the operations.
        layers: additive.
    """

    rule: str
    costs: Costs
    layers: tuple[LayerEnergy, ...]

    @property
    def macs(self) -> float:
        return sum(layer.macs for layer in self.layers)

    @property
    def acs(self) -> float:
        return sum(layer.acs for layer in self.layers)

    @property
    def pj(self) -> float:
        return sum(layer.energy_pj for layer in self.layers)

    def to_json(self) -> Json:
        """Totals and layers as plain values."""
        return {**asdict(self), "macs": self.macs, "acs": self.acs, "pj": self.pj}


Count = tuple[float, float]
"""Multiply-accumulates and accumulates of a layer."""

RULES: Registry[Callable[..., Energy]] = Registry("energy rule")
"""Functions `(layers, steps, costs, **options) -> Energy`; `steps` is T."""


def paper_rule(recipe: str, model: str) -> str:
    """The rule by which the paper of a recipe counts a model; `measured` where it states none."""
    document = recipe.split("/")[0]
    if document == "spikingformer" and model.startswith("spikformer_"):
        return "appendixG_1"  # the paper's recount of its rival
    own = {"report": "report000", "spikformer_v2": "spikformer"}.get(document, document)
    return own if own in RULES else "measured"


def _energy(rule: str, costs: Costs, layers: Sequence[Layer], count: Callable[[Layer], Count]) -> Energy:
    counted: list[LayerEnergy] = []
    for layer in layers:
        macs, acs = count(layer)
        counted.append(LayerEnergy(layer.name, macs, acs, costs.mac * macs + costs.ac * acs))
    return Energy(rule, costs, tuple(counted))


@RULES.register
def measured(layers: Sequence[Layer], steps: float, costs: Costs) -> Energy:
    """What ran, by what entered: real values multiply; spikes and integers add, N times for N; scales are folded."""
    return _energy("measured", costs, layers, lambda layer: (layer.macs, layer.acs))


@RULES.register
def spikingformer(
    layers: Sequence[Layer],
    steps: float,
    costs: Costs,
    largest: int = 1,
    encoder_once: bool = False,
    first_ac: bool = False,
    kv_first: bool = True,
    name: str = "spikingformer",
) -> Energy:
    """Spikingformer (Zhou et al. 2023), Eq. 19, as its released counter counts.

        E = E_MAC FLOP_conv^1 + E_AC ( sum_{i>=2} SOP_conv^i + sum_j SOP_SSA^j )

    A layer adds if all its inputs are integers in 0 ... `largest`; otherwise it multiplies, at rate 1. The first
    convolution counts at each of the T steps although its inputs are copies; the classifier counts once, as MAC. The
    products of attention count as K^T V first, `T H N d^2 (min(fr_K, fr_V) + fr_Q)`, in whatever order they ran. Eq. 20
    for event data was printed with the first convolution as AC, and corrected by the authors to MAC: the same rule.

    Args:
        layers, steps, costs: a network, its T, energies.
        largest: the largest integer that still adds.
        encoder_once: count the first convolution once for a repeated image, as it can be computed.
        first_ac: Eq. 20 as printed, every layer but the classifier AC.
        kv_first: False keeps the order in which attention ran.
        name: of the rule in the result.
    """

    def count(layer: Layer) -> Count:
        operations = layer.operations + layer.bias
        if layer.role == "classifier":
            return operations / layer.steps, 0.0
        if layer.role == "encoder":
            operations *= 1 / layer.steps if encoder_once else steps / layer.steps
        if first_ac or _adds(layer, largest):
            return 0.0, operations * layer.fr
        return operations, 0.0

    return _energy(name, costs, keys_values_first(layers) if kv_first else layers, count)


@RULES.register
def spikingformer_neuro_printed(layers: Sequence[Layer], steps: float, costs: Costs) -> Energy:
    """Eq. 20 of Spikingformer as it was printed: for event data every layer AC. Its authors correct it to Eq. 19."""
    return spikingformer(layers, steps, costs, first_ac=True, name="spikingformer_neuro_printed")


@RULES.register
def appendixG_1(layers: Sequence[Layer], steps: float, costs: Costs, encoder_once: bool = False) -> Energy:
    """Spikingformer's recount of Spikformer (App. G), way 1: an integer N is N accumulates, up to 30."""
    return spikingformer(layers, steps, costs, largest=30, encoder_once=encoder_once, name="appendixG_1")


@RULES.register
def appendixG_2(layers: Sequence[Layer], steps: float, costs: Costs, encoder_once: bool = False) -> Energy:
    """App. G, way 2: a layer whose input is not purely 0 and 1 multiplies. The rule of `spikingformer` itself."""
    return spikingformer(layers, steps, costs, largest=1, encoder_once=encoder_once, name="appendixG_2")


PAPER_FIRST_CONV = 0.347e9
"""MACs that Spikformer's table adds to every size: the 8-512 model's first convolution at T = 4, 346,816,512."""


@RULES.register
def spikformer(
    layers: Sequence[Layer],
    steps: float,
    costs: Costs,
    encoder_once: bool = False,
    paper_constant_first_conv: bool = False,
) -> Energy:
    """Spikformer (Zhou et al. 2023): all but the first convolution adds, whatever enters it.

        E = E_MAC FL_conv^1 + E_AC ( sum_{n>=2} SOP_conv^n + sum_m SOP_FC^m + sum_l SOP_SSA^l )

    Args:
        layers, steps, costs: a network, its T, energies.
        encoder_once: the first convolution once instead of T times; the residual rows of its table were counted so.
        paper_constant_first_conv: the first convolution of the 8-512 model for every size, as its table was printed.
    """

    def count(layer: Layer) -> Count:
        operations = layer.operations + layer.bias
        if layer.role == "encoder":
            if paper_constant_first_conv:
                return PAPER_FIRST_CONV, 0.0
            return operations * (1 / layer.steps if encoder_once else steps / layer.steps), 0.0
        return 0.0, operations * layer.fr

    return _energy("spikformer", costs, layers, count)


@RULES.register
def report000(layers: Sequence[Layer], steps: float, costs: Costs) -> Energy:
    """The course report, which prints energies but no rule: `4.6 MAC_stem + 0.9 T sum fr MAC` (pJ).

    The stem counts once: T times would be more than the whole published energy. Biases do not count.
    `report_readings` has the other ways to read it.
    """

    def count(layer: Layer) -> Count:
        once = layer.operations / layer.steps
        return (once, 0.0) if layer.role == "encoder" else (0.0, once * steps * layer.fr)

    return _energy("report000", costs, layers, count)


def report_readings(layers: Sequence[Layer], steps: float, costs: Costs, flops: float) -> dict[str, float]:
    """The course report's energy in picojoules as `report000`, and read off its FLOPs with T and without.

    Args:
        layers, steps, costs: a network, its T, energies.
        flops: by the report's rule, `count_cost(...).flops_s0`.
    """
    body = [layer for layer in layers if layer.role != "encoder"]
    dense = sum(layer.operations / layer.steps for layer in body)
    fr = sum(layer.fr * layer.operations / layer.steps for layer in body) / max(dense, 1.0)
    return {
        "4.6 MAC_stem + 0.9 T sum fr MAC": report000(layers, steps, costs).pj,
        "0.9 fr T FLOPs": costs.ac * fr * steps * flops,
        "0.9 fr FLOPs": costs.ac * fr * flops,
    }


@RULES.register
def syna(layers: Sequence[Layer], steps: float, costs: Costs, released_script: bool = False) -> Energy:
    """SynA-ResNet (Shan et al.): `(C_in k^2 - 1)` additions per output of a convolution, and its norm as one MAC.

    The first convolution and its gates (linear layers and convolutions on real values) are MACs. The classifier has
    `C_in C_out T` multiplications and as many additions; the released script adds `C_in C_in T` instead. A
    convolution that received nothing is pruned, with its norm.

    Args:
        layers, steps, costs: a network, its T, energies.
        released_script: count the classifier's additions as the script does.
    """
    counted: list[LayerEnergy] = []
    for layer in layers:
        again = steps / layer.steps if layer.role in ("encoder", "classifier") else 1.0
        operations, outputs = layer.operations * again, layer.outputs * again
        if layer.role == "classifier":
            inputs = layer.operations / max(layer.outputs, 1.0)
            acs = inputs * inputs * steps if released_script else operations
            counted.append(LayerEnergy(layer.name, 0.0, acs, costs.multiply * operations + costs.ac * acs))
            continue
        additions = operations - outputs
        gate = layer.role == "body" and layer.input == "real"
        norm = outputs if layer.kind == "conv" and not gate and layer.input != "silent" else 0.0
        multiplies = layer.role == "encoder" or gate
        macs, acs = (additions, 0.0) if multiplies else (0.0, additions * layer.rate)
        macs += norm
        counted.append(LayerEnergy(layer.name, macs, acs, costs.mac * macs + costs.ac * acs))
    return Energy("syna", costs, tuple(counted))


def _adds(layer: Layer, largest: int) -> bool:
    driving = layer.driving
    return driving.input in ("silent", "binary", "integer") and driving.minimum >= 0 and driving.maximum <= largest
