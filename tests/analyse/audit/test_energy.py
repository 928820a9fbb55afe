"""Energy rules: the published figures from the published rates, and what must hold for any network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spikeloom.analyse import RULES, Costs, Layer, Operand, audit, report_readings
from spikeloom.analyse.audit.attention_products import attentions
from spikeloom.errors import UsageError
from spikeloom.models import create_model

# Rates in percent of Spikingformer (energy.md, section 5): stem units 1-4; then a block's q/k/v input, Q, K, V, proj,
# fc1 and fc2 inputs.
STEM_512 = (25.831, 15.336, 13.107, 12.956)
BLOCKS_512 = (
    (17.660, 17.230, 3.626, 6.958, 29.780, 26.768, 3.289),
    (33.795, 11.627, 4.030, 7.173, 30.958, 33.019, 2.965),
    (34.222, 10.669, 4.441, 7.525, 31.419, 34.730, 2.560),
    (34.426, 8.189, 5.000, 7.688, 29.089, 34.661, 1.929),
    (34.327, 6.365, 4.325, 7.054, 20.989, 36.039, 1.421),
    (35.929, 7.711, 3.113, 7.322, 16.569, 35.950, 0.953),
    (34.229, 7.024, 2.420, 7.349, 10.683, 32.270, 0.569),
    (31.767, 9.728, 2.812, 7.955, 9.477, 29.923, 1.377),
)
STEM_768 = (19.797, 13.190, 12.085, 13.008)
BLOCKS_768 = (
    (14.749, 13.505, 2.981, 5.937, 26.517, 22.752, 2.350),
    (29.875, 10.502, 3.767, 6.063, 28.011, 29.201, 1.826),
    (29.063, 8.326, 3.776, 6.863, 28.583, 29.764, 1.556),
    (30.840, 5.633, 3.519, 6.847, 23.447, 31.473, 1.019),
    (31.186, 6.755, 3.175, 5.899, 18.023, 31.287, 0.563),
    (30.693, 5.022, 2.240, 4.205, 12.603, 29.968, 0.315),
    (29.206, 7.546, 3.070, 4.039, 8.090, 26.951, 0.289),
    (27.381, 8.323, 2.933, 7.041, 7.155, 26.967, 0.558),
)


def spikes(percent: float) -> Operand:
    return Operand("binary", rate=percent / 100, mean=percent / 100, density=percent / 100)


REAL = Operand("real", minimum=-2.0, maximum=2.0, mean=0.4, rate=1.0, density=1.0)


def spikingformer(
    D: int, heads: int, stem: tuple[float, ...], blocks: tuple[tuple[float, ...], ...], first: int = 4
) -> list[Layer]:
    """Spikingformer on 224x224 at T = 4; its attention as Q K^T first, as its model runs it."""
    T, N, d = 4, 196, D // heads

    def conv(name: str, rate: float, fan_in: int, out: int, side: int, bias: bool = False) -> Layer:
        outputs = T * out * side**2
        return Layer(name, "conv", (spikes(rate),), "body", outputs * fan_in, outputs * bias, outputs, T)

    outputs = first * D // 8 * 224**2
    layers = [Layer("stem.0", "conv", (REAL,), "encoder", 27 * outputs, 0, outputs, first)]
    widths = (D // 8, D // 4, D // 2, D, D)
    for unit in range(1, 5):
        side = (112, 56, 28, 14)[unit - 1]
        layers.append(conv(f"stem.{unit}", stem[unit - 1], 9 * widths[unit - 1], widths[unit], side))
    for block, (x, q, k, v, proj, fc1, fc2) in enumerate(blocks):
        layers += [conv(f"{block}.attn.{name}", x, D, D, 14) for name in "qkv"]
        pairs = T * heads * N * N
        layers += [
            Layer(
                f"{block}.attn:matmul",
                "matmul",
                (spikes(q), spikes(k)),
                "body",
                pairs * d,
                0,
                pairs,
                T,
                shape=(heads, N, d, N),
            ),
            Layer(
                f"{block}.attn:matmul2",
                "matmul",
                (Operand("scaled", 0.125, 0, 9, 1.0, 1.0, 0.5), spikes(v)),
                "body",
                pairs * d,
                0,
                T * N * D,
                T,
                shape=(heads, N, N, d),
            ),
            conv(f"{block}.attn.proj", proj, D, D, 14, True),
            conv(f"{block}.mlp.fc1", fc1, D, 4 * D, 14, True),
            conv(f"{block}.mlp.fc2", fc2, 4 * D, D, 14, True),
        ]
    pooled = Operand("scaled", 1 / 196, 0, 1, 0.2, 0.2, 0.9)
    return [*layers, Layer("head", "linear", (pooled,), "classifier", T * D * 1000, T * 1000, T * 1000, T)]


NETWORKS = {512: spikingformer(512, 8, STEM_512, BLOCKS_512), 768: spikingformer(768, 12, STEM_768, BLOCKS_768)}


@pytest.mark.parametrize(
    ("D", "acs", "convs", "ssa", "macs", "mj"),
    [
        (512, 6.51754094e9, 6.48971541e9, 0.02782553e9, 347_329_512, 7.4635026),
        (768, 12.51365958e9, 12.47856415e9, 0.03509542e9, 520_993_768, 13.6588650),
    ],
)
def test_spikingformer_from_published_rates(D: int, acs: float, convs: float, ssa: float, macs: int, mj: float) -> None:
    energy = RULES["spikingformer"](NETWORKS[D], 4, Costs())
    products = sum(layer.acs for layer in energy.layers if ":matmul" in layer.name)
    assert energy.acs == pytest.approx(acs, rel=1e-4)
    assert energy.acs - products == pytest.approx(convs, rel=1e-4)
    assert products == pytest.approx(ssa, rel=1e-4)
    assert energy.macs == macs
    assert energy.pj / 1e9 == pytest.approx(mj, abs=1e-3)


def test_spikingformer_as_printed() -> None:
    energy = RULES["spikingformer"](NETWORKS[512], 4, Costs())
    assert f"{energy.pj / 1e9:.4f}" == "7.4635"  # printed 7.463
    assert f"{energy.acs / 1e9:.2f}" == "6.52"
    operations = {layer.name: layer.operations + layer.bias for layer in NETWORKS[512]}
    assert operations["stem.0"] == 346_816_512
    assert {operations[f"stem.{unit}"] for unit in (1, 2, 3)} == {3_699_376_128}
    assert operations["stem.4"] == 1_849_688_064
    assert operations["0.attn.q"] == 205_520_896
    assert operations["0.attn.proj"] == 205_922_304
    assert operations["0.mlp.fc1"] == 823_689_216
    assert operations["0.mlp.fc2"] == 822_484_992


@pytest.mark.parametrize(("D", "ops", "mj"), [(384, 3.88, 4.690), (512, 6.52, 7.466), (768, 12.535, 13.678)])
def test_spikingformer_rows_from_their_printed_operations(D: int, ops: float, mj: float) -> None:
    layers = spikingformer(D, D // 64, (0.0,) * 4, ((0.0,) * 7,) * 8)
    energy = RULES["spikingformer"](layers, 4, Costs())
    assert energy.acs == 0
    assert energy.macs == 27 * (D // 8) * 224**2 * 4 + (D + 1) * 1000
    assert 0.9 * ops + energy.pj / 1e9 == pytest.approx(mj, abs=6e-4)


def test_a_stem_computed_once_counts_as_the_rule_says() -> None:
    once = spikingformer(512, 8, STEM_512, BLOCKS_512, first=1)
    for rule in ("spikingformer", "spikformer", "syna", "report000"):
        assert RULES[rule](once, 4, Costs()).pj == pytest.approx(RULES[rule](NETWORKS[512], 4, Costs()).pj)
    option = RULES["spikingformer"](once, 4, Costs(), encoder_once=True)
    assert RULES["spikingformer"](once, 4, Costs()).macs - option.macs == 346_816_512 * 3 / 4


@pytest.mark.parametrize(
    ("ops", "mj"), [(6.82, 7.734), (8.69, 9.417), (11.09, 11.577), (13.67, 13.899), (22.09, 21.477)]
)
def test_spikformer_rows(ops: float, mj: float) -> None:
    # Its table adds the first convolution of the 512 model to every size.
    layers = [
        Layer("stem", "conv", (REAL,), "encoder", 27 * 48 * 224**2, 0, 48 * 224**2, 1),
        Layer("rest", "conv", (spikes(10.0),), "body", ops * 1e10, 0, 1e7, 4),
    ]
    energy = RULES["spikformer"](layers, 4, Costs(), paper_constant_first_conv=True)
    assert f"{energy.pj / 1e9:.3f}" == f"{mj:.3f}"
    own = RULES["spikformer"](layers, 4, Costs())
    assert own.macs == 260_112_384


@pytest.mark.parametrize(("ops", "mj"), [(3.88, 4.035), (4.83, 4.890), (9.30, 8.913), (13.72, 12.891), (6.50, 6.393)])
def test_residual_rows_count_their_stem_once(ops: float, mj: float) -> None:
    stem = 147 * 64 * 112**2
    layers = [
        Layer("stem", "conv", (REAL,), "encoder", 4 * stem, 0, 4 * 64 * 112**2, 4),
        Layer("rest", "conv", (spikes(10.0),), "body", ops * 1e10, 0, 1e7, 4),
    ]
    assert RULES["spikformer"](layers, 4, Costs(), encoder_once=True).pj / 1e9 == pytest.approx(mj, abs=6e-4)


# SynA-ResNet (energy.md, section 7): percent of the input of each convolution, and its channels, outputs and map.
def syna(true_inputs: bool) -> list[Layer]:
    rates = iter(
        (
            0.0784,
            0.0446,
            0.0630,
            0.0728,
            0.0929,
            0.0493,
            0.0567,
            0.0764,
            0.0668,
            0.0788,
            0.0489,
            0.0623,
            0.0406,
            0.0490,
            0.0500,
            0.0454,
            0.0607,
            0.0207,
            0.0572,
            0.0431,
        )
    )
    merged = iter((0.0824, 0.0627, 0.0612))
    T = 16

    def conv(name: str, rate: float, c_in: int, out: int, side: int, kernel: int = 9) -> Layer:
        outputs = T * out * side**2
        return Layer(name, "conv", (spikes(100 * rate),), "body", kernel * c_in * outputs, 0, outputs, T)

    layers = [Layer("stem", "conv", (REAL,), "encoder", T * 27 * 64 * 1024, 0, T * 64 * 1024, T)]
    last = next(rates)
    for block in range(4):
        layers.append(conv(f"1.{block}", last, 64, 64, 32))
        last = next(rates)
    for stage, (width, side) in enumerate(((128, 16), (256, 8), (512, 4)), start=2):
        first, second, shortcut, third, fourth = (next(rates) for _ in range(5))
        layers += [
            conv(f"{stage}.1", last, width // 2, width, side),
            conv(f"{stage}.2", first, width, width, side),
            conv(f"{stage}.shortcut", last if true_inputs else second, width // 2, width, side, 1),
            conv(f"{stage}.3", next(merged), width, width, side),
            conv(f"{stage}.4", third, width, width, side),
        ]
        assert shortcut > 0
        last = fourth
    return [*layers, Layer("head", "linear", (spikes(100 * last),), "classifier", T * 5120, 0, T * 10, T)]


@pytest.mark.parametrize(
    ("true_inputs", "released", "acs", "mj"),
    [
        (False, True, 544.543, 0.664796),
        (False, False, None, 0.661095),
        (True, True, 545.930, 0.666045),
        (True, False, None, 0.662344),
    ],
)
def test_syna(true_inputs: bool, released: bool, acs: float | None, mj: float) -> None:
    energy = RULES["syna"](syna(true_inputs), 16, Costs(), released_script=released)
    assert energy.pj / 1e9 == pytest.approx(mj, abs=1e-6)
    assert energy.macs / 1e6 == pytest.approx(37.093, abs=1e-3)
    if acs is not None:
        assert sum(layer.acs for layer in energy.layers if layer.name != "head") / 1e6 == pytest.approx(acs, abs=5e-3)


def test_syna_prunes_what_received_nothing() -> None:
    silent = replace(syna(True)[3], operands=(Operand("silent", maximum=0.0),))
    assert RULES["syna"]([silent], 16, Costs()).pj == 0


# --- what must hold for every network ---------------------------------------------------------------------------------


def small(rate: float, T: int, first: Operand = REAL) -> list[Layer]:
    body = Operand("silent", maximum=0.0) if rate == 0 else spikes(100 * rate)
    return [
        Layer("a", "conv", (first,), "encoder", T * 1000, 0, T * 10, T),
        Layer("b", "conv", (body,), "body", T * 5000, T * 50, T * 50, T),
        Layer("c", "linear", (body,), "body", T * 700, 0, T * 10, T),
    ]


@pytest.mark.parametrize("rule", RULES)
def test_costs_are_linear_in_rates_and_additive(rule: str) -> None:
    acs = [RULES[rule](small(rate, 4), 4, Costs()).acs for rate in (0.0, 0.1, 0.2, 0.4)]
    assert acs[2] - acs[0] == pytest.approx(2 * (acs[1] - acs[0]))
    assert acs[3] - acs[0] == pytest.approx(4 * (acs[1] - acs[0]))
    energy = RULES[rule](small(0.2, 4), 4, Costs())
    assert energy.pj == pytest.approx(sum(layer.energy_pj for layer in energy.layers))
    assert energy.pj == pytest.approx(4.6 * energy.macs + 0.9 * energy.acs)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "spikingformer_neuro_printed"])
def test_a_silent_network_costs_its_first_layer(rule: str) -> None:
    energy = RULES[rule](small(0.0, 4), 4, Costs())
    assert energy.acs == 0
    assert [layer.name for layer in energy.layers if layer.energy_pj] == ["a"]


@pytest.mark.parametrize("rule", ["measured", "spikingformer", "appendixG_1", "spikformer"])
def test_one_step_of_all_ones(rule: str) -> None:
    assert RULES[rule](small(1.0, 1), 1, Costs()).pj == pytest.approx(4.6 * 1000 + 0.9 * (5050 + 700))
    # Twice the steps, twice the synaptic operations.
    assert RULES[rule](small(1.0, 2), 2, Costs()).acs == 2 * (5050 + 700)


def test_integers_by_both_ways_of_appendix_g() -> None:
    integer = Operand("integer", maximum=3.0, mean=0.8, rate=0.8, density=0.5)
    layers = [small(0.1, 4)[0], replace(small(0.1, 4)[1], operands=(integer,))]
    one, two = (RULES[f"appendixG_{way}"](layers, 4, Costs()) for way in (1, 2))
    assert (one.layers[1].acs, two.layers[1].macs) == (pytest.approx(0.8 * 20200), 20200)
    assert two.layers[1].energy_pj / one.layers[1].energy_pj == pytest.approx(4.6 / 0.9 / 0.8)
    plain = small(0.3, 4)
    assert RULES["appendixG_1"](plain, 4, Costs()) == replace(
        RULES["appendixG_2"](plain, 4, Costs()), rule="appendixG_1"
    )
    too_large = [replace(layers[1], operands=(replace(integer, maximum=31.0),))]
    assert RULES["appendixG_1"](too_large, 4, Costs()).acs == 0


def test_events_by_equation_20_as_printed_and_corrected() -> None:
    counts = Operand("integer", maximum=5.0, mean=0.5, rate=0.5, density=0.2)
    layers = small(0.1, 4, counts)
    printed = RULES["spikingformer_neuro_printed"](layers, 4, Costs())
    corrected = RULES["spikingformer"](layers, 4, Costs())
    assert (printed.layers[0].macs, printed.layers[0].acs) == (0, 2000)
    assert (corrected.layers[0].macs, corrected.layers[0].acs) == (4000, 0)
    assert printed.layers[1:] == corrected.layers[1:]


@pytest.mark.parametrize("features_first", [False, True])
def test_attention_counts_alike_in_either_order(features_first: bool) -> None:
    q, k, v = spikes(10), spikes(4), spikes(7)
    T, H, N, d = 4, 2, 20, 8
    scores, state = Operand("integer", rate=0.03), Operand("integer", rate=0.9)

    def pair(
        n: int,
        inner: int,
        m: int,
        first: tuple[Operand, Operand],
        second: tuple[Operand, Operand],
        shape: tuple[int, int, int],
    ) -> list[Layer]:
        return [
            Layer("a:matmul", "matmul", first, "body", T * H * n * inner * m, 0, 0, T, shape=(H, n, inner, m)),
            Layer(
                "a:matmul2",
                "matmul",
                second,
                "body",
                T * H * shape[0] * shape[1] * shape[2],
                0,
                0,
                T,
                shape=(H, *shape),
            ),
        ]

    if features_first:  # [d, N] in place of [N, d]: every product transposed
        scores_first = pair(N, d, N, (k, q), (v, scores), (d, N, N))
        state_first = pair(d, N, d, (v, k), (state, q), (d, d, N))
    else:
        scores_first = pair(N, d, N, (q, k), (scores, v), (N, N, d))
        state_first = pair(d, N, d, (k, v), (q, state), (N, d, d))
    for layers in (scores_first, state_first):
        [found] = attentions(layers).values()
        assert (found.queries, found.keys, found.values) == (q, k, v)
        assert found.scores_first is (layers is scores_first)
        assert RULES["spikingformer"](layers, T, Costs()).acs == pytest.approx(T * H * N * d**2 * (0.04 + 0.1))
    as_run = RULES["spikingformer"](scores_first, T, Costs(), kv_first=False).acs
    assert as_run == pytest.approx(T * H * N**2 * d * (0.04 + 0.07))


@pytest.mark.slow
def test_operations_of_the_model_are_those_of_the_published_counter() -> None:
    found = audit(create_model("spikingformer_8_512"), [torch.rand(1, 3, 224, 224)])
    assert [row.operations + row.bias for row in found.rows if row.kind == "conv"][1:] == [
        layer.operations + layer.bias for layer in NETWORKS[512] if layer.kind == "conv"
    ][1:]
    energy = found.energy("spikingformer")
    assert energy.macs == 347_329_512
    assert {row.role for row in found.rows if row.input == "real"} <= {"encoder", "classifier"}


def test_readings_of_the_report() -> None:
    layers = small(0.2, 6)
    readings = list(report_readings(layers, 6, Costs(), 10_000).values())
    assert readings == pytest.approx([4.6 * 1000 + 0.9 * 6 * 0.2 * 5700, 0.9 * 0.2 * 6 * 10_000, 0.9 * 0.2 * 10_000])


def test_costs_can_be_others() -> None:
    costs = Costs(mac=2.0, ac=0.5)
    energy = RULES["measured"](small(0.5, 2), 2, costs)
    assert energy.pj == 2.0 * energy.macs + 0.5 * energy.acs


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown energy rule 'spikformr'; did you mean spikformer"):
        RULES["spikformr"]
