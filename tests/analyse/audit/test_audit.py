"""Audits: what is seen in tensors, which products are found and named, and the verdict, for any PyTorch network."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import spikeloom
from spikeloom.analyse import RULES, Audit, Costs, Layer, audit
from spikeloom.analyse.audit import value_types
from spikeloom.analyse.audit.value_types import TensorSummary, merge_summaries, summarise
from spikeloom.errors import UsageError
from spikeloom.neurons import LIF

SPIKES = ("silent", "binary", "ternary")


def spikes(*shape: int, rate: float = 0.3) -> Tensor:
    return (torch.rand(*shape) < rate).float()


# --- what is in a tensor ----------------------------------------------------------------------------------------------

TENSORS: list[tuple[Tensor, str, float, float]] = [
    (torch.zeros(4, 3, 5, 5), "silent", 0.0, 1.0),
    (spikes(4, 3, 5, 5), "binary", 1.0, 1.0),
    (torch.ones(4, 3), "binary", 1.0, 1.0),
    (spikes(4, 3, 5, 5) - spikes(4, 3, 5, 5), "ternary", 1.0, 1.0),
    (spikes(4, 3, 5, 5) + spikes(4, 3, 5, 5) + spikes(4, 3, 5, 5), "integer", 3.0, 1.0),
    (-3 * spikes(40, 3), "integer", 0.0, 1.0),
    (F.avg_pool2d(spikes(4, 8, 16, 16), 2), "scaled", 1.0, 0.25),
    (spikes(4, 8, 7, 7).mean((2, 3)), "scaled", 1.0, 1 / 49),
    (F.dropout(spikes(8, 100), 0.4), "scaled", 1 / 0.6, 1 / 0.6),
    (torch.randn(4, 3, 5, 5), "real", 0.0, 1.0),
    (torch.rand(2, 3), "real", 0.0, 1.0),
    (torch.tensor([[0.0, 1.0], [0.7312345, 0.2718281]]), "real", 1.0, 1.0),
    (torch.tensor([[0.0, float("nan")]]), "real", float("nan"), 1.0),
    (torch.tensor([[0.0, float("inf")]]), "real", float("inf"), 1.0),
]


@pytest.mark.parametrize("form", ["plain", "channels_last", "strided", "float64", "chunks"])
@pytest.mark.parametrize(("x", "kind", "maximum", "scale"), TENSORS)
def test_looking(
    x: Tensor, kind: str, maximum: float, scale: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "strided":
        x = x.repeat_interleave(2, 0)[::2]
    elif form == "float64":
        x = x.double()
    elif form == "chunks":
        monkeypatch.setattr(value_types, "_CHUNK", 7)
    found = summarise(x, True, True)
    operand = found.operand()
    assert operand.input == kind
    assert operand.scale == pytest.approx(scale, rel=1e-3 if form != "float64" else 1e-5)
    if maximum == maximum and abs(maximum) != float("inf"):
        if kind in ("binary", "ternary", "integer"):
            assert operand.maximum == maximum
        assert operand.mean == pytest.approx(x.mean().item(), abs=1e-6)
        assert operand.density == pytest.approx((x != 0).float().mean().item())
        assert operand.rate == pytest.approx(operand.density if kind == "real" else x.abs().mean().item(), abs=1e-6)
        assert found.channels is not None
        assert torch.equal(found.channels.long(), (x != 0).transpose(0, 1).flatten(1).sum(1))


def test_one_odd_value_among_many_is_found() -> None:
    x = spikes(64, 16, 33, 33)
    x[37, 5, 11, 12] = 0.5
    assert summarise(x, True, False).operand().input == "real"
    x[37, 5, 11, 12] = 2.0
    assert (summarise(x, True, True).operand().input, summarise(x, True, True).operand().maximum) == ("integer", 2.0)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16])
def test_other_types(kind: torch.dtype) -> None:
    operand = summarise(spikes(8, 5).to(kind), True, True).operand()
    assert operand.input == "binary"


def test_the_worst_of_several_batches_counts() -> None:
    def kinds(*tensors: Tensor) -> str:
        summaries: list[TensorSummary] = [summarise(x, True, True) for x in tensors]
        return merge_summaries(summaries).operand().input

    a, b = spikes(4, 6), torch.zeros(4, 6)
    assert kinds(b, b) == "silent"
    assert kinds(b, a) == "binary"
    assert kinds(a, -a) == "ternary"
    assert kinds(a, 2 * a) == "integer"
    assert kinds(a / 2, b, a) == "scaled"
    assert kinds(a, torch.rand(4, 6)) == "real"
    assert merge_summaries([summarise(a / 4, True, True), summarise(a / 2, True, True)]).operand().scale == 0.25


# --- which products are found, and how they are named -----------------------------------------------------------------


class Functional(nn.Module):
    """Every way to multiply, none of them a layer of `torch.nn`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.matrix = nn.Parameter(torch.randn(6, 5))
        self.last = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, padding=1)  # [N, 6, 8, 8]
        y = y.flatten(2).transpose(1, 2)  # [N, 64, 6]
        z = (y > 0).float() @ self.matrix  # [N, 64, 5]
        s = (z > 1).float()
        scores = torch.einsum("nid,njd->nij", s, s)
        a = torch.bmm(scores, s) + torch.matmul(scores, s)
        a = a + F.scaled_dot_product_attention(s, s, s)
        return F.linear(a.mean(1), self.last)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="there attention is a single operation")
def test_functional_products() -> None:
    found = audit(Functional(), [spikes(2, 3, 8, 8)])
    names = [(row.name, row.kind, row.operations) for row in found.rows]
    pair = 64 * 64 * 5
    assert names == [
        ("kernel", "conv", 64 * 6 * 27),
        ("matrix", "linear", 64 * 30),
        (":matmul", "matmul", pair),
        (":matmul2", "matmul", pair),
        (":matmul3", "matmul", pair),
        (":matmul4", "matmul", pair),
        (":matmul5", "matmul", pair),
        ("last", "linear", 20),
    ]
    assert [row.input for row in found.rows[2:7]] == ["binary"] * 5
    assert [row.role for row in found.rows] == ["encoder", *["body"] * 6, "classifier"]
    softmax = found.rows[6]
    assert [operand.input for operand in softmax.operands] == ["real", "binary"]
    assert not found.rows[6].breaks


@pytest.mark.parametrize("inference", [False, True])
def test_operations_of_layers(inference: bool) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 8, 3, padding=1, groups=2)
            self.b = nn.ConvTranspose2d(8, 6, 2, stride=2)
            self.c = nn.Conv1d(6, 5, 3, bias=False)
            self.d = nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode(inference):
                return self.d(self.c(self.b(self.a(x)).flatten(2)[..., :16])).mean(1)

    found = audit(Layers(), [spikes(3, 4, 6, 6)])
    assert [(row.name, row.operations, row.bias) for row in found.rows] == [
        ("a", 8 * 36 * 2 * 9, 8 * 36),
        ("b", 8 * 36 * 6 * 4, 6 * 144),
        ("c", 5 * 14 * 18, 0),
        ("d", 5 * 14 * 3, 15),
    ]
    assert [row.steps for row in found.rows] == [1, 1, 1, 1]
    folded = audit(Layers(), [spikes(3, 4, 6, 6)], folded_biases=["a"])
    assert [row.bias for row in folded.rows[:2]] == [0, 6 * 144]
    with pytest.raises(UsageError, match="'e', which is no layer"):
        audit(Layers(), [spikes(3, 4, 6, 6)], folded_biases=["e"])


class Loop(nn.Module):
    """Steps in a loop, as SpikingJelly's and snnTorch's users write it, with one layer used at every step."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.first, self.second = T, nn.Linear(6, 10), nn.Linear(10, 3)
        self.state = nn.Parameter(torch.ones(1, 10))

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(len(x), 10), []
        for _ in range(self.T):
            v = 0.5 * v + self.first(x)
            s = (v > 0.3).float()
            gate = s[:, None] @ s[:, :, None]
            out.append(self.second(s) * gate[:, 0])
        return torch.stack(out)


@pytest.mark.parametrize("T", [1, 3])
def test_a_loop_over_time_is_one_row_a_layer(T: int) -> None:
    found = audit(Loop(T), [(torch.rand(4, 6), torch.zeros(4, dtype=torch.long))])
    assert [row.name for row in found.rows] == ["first", ":matmul", "second"]
    assert [row.operations for row in found.rows] == [T * 60, T * 10, T * 30]
    if T == 3:
        assert audit(Loop(T), [torch.rand(4, 6)], batch_axis=0).images == 4


def test_layers_used_twice_and_shared_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    found = audit(Tied(), [spikes(2, 5)])
    assert [(row.name, row.operations) for row in found.rows] == [("a", 50), ("b", 25)]


def test_recurrent_weights_count_and_a_neurons_own_products_do_not() -> None:
    recurrent = spikeloom.create_model("paralif_shd", recurrent=True, T=6)
    found = audit(recurrent, [spikes(6, 2, 700)])
    assert [row.name for row in found.rows] == ["layers.0", "layers.1.recurrent", "layers.2"]
    assert found.rows[1].operations == 6 * 256 * 256
    assert (found.images, found.steps, found.spike_driven) == (2, 6, True)
    lif = nn.Sequential(spikeloom.layers.Linear(5, 8), spikeloom.neurons.RecurrentLIF(8))
    assert [row.name for row in audit(lif, [spikes(4, 3, 5)]).rows] == ["0", "1.recurrent"]
    parallel = spikeloom.create_model("psn_cifar_net", T=2)
    assert all(row.kind != "matmul" for row in audit(parallel, [torch.rand(1, 3, 32, 32)]).rows)


# --- the numbers ------------------------------------------------------------------------------------------------------


def net(T: int = 2) -> nn.Module:
    model = spikeloom.create_model("report_sew_resnet34", T=T)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
    return model


def test_per_image_never_per_batch() -> None:
    model, x = net(), torch.rand(6, 3, 16, 16)
    whole, parts = audit(model, [x]), audit(model, [x[:1], x[1:3], x[3:]])
    assert (whole.images, parts.images) == (6, 6)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert (a.name, a.input, a.operations, a.steps) == (b.name, b.input, b.operations, b.steps)
        assert (a.dead, a.saturated, a.channels) == (b.dead, b.saturated, b.channels)
        assert a.energy_pj == pytest.approx(b.energy_pj)
        assert a.rates == pytest.approx(b.rates)


def test_rates_are_those_of_the_inputs() -> None:
    model, x = net(T=3), torch.rand(2, 3, 16, 16)
    rows = {row.name: row for row in audit(model, [x]).rows}
    with spikeloom.Recorder(model.eval(), spikes=False, inputs=True) as record, torch.no_grad():
        model(x)
    assert list(rows) == list(record.inputs)
    for name, (s,) in record.inputs.items():
        assert rows[name].mean == pytest.approx(s.mean().item(), abs=1e-6)
        assert rows[name].max == s.max()
        if rows[name].input != "real":
            assert rows[name].rates == pytest.approx(s.flatten(1).mean(1).tolist(), abs=1e-6)
        counts = s.transpose(2, 0).flatten(1)
        assert rows[name].dead == int((counts == 0).all(1).sum())
        assert rows[name].saturated == int((counts != 0).all(1).sum())


def test_the_stem_of_a_static_image_ran_once() -> None:
    model, x = net(T=4), torch.rand(2, 3, 16, 16)
    once, each = audit(model, [x]), audit(model, [x.repeat(4, 1, 1, 1, 1)])
    stem = 16 * 16 * 16 * 27
    assert [a.rows[0].steps for a in (once, each)] == [1, 4]
    assert [a.rows[0].operations for a in (once, each)] == [stem, 4 * stem]
    for rule in ("spikingformer", "spikformer", "report000"):  # these say how a stem counts, however it ran
        assert once.energy(rule).pj == pytest.approx(each.energy(rule).pj)
    assert each.energy_pj - once.energy_pj == pytest.approx(4.6 * 3 * stem)


def test_energies_by_name_and_option() -> None:
    found = audit(net(), [torch.rand(1, 3, 16, 16)], costs=Costs(mac=1.0, ac=1.0))
    assert found.energy_pj == pytest.approx(found.macs + found.acs)
    assert found.energy("measured").pj == pytest.approx(found.energy_pj)
    assert set(found.energies()) == set(RULES)
    once = found.energy("spikingformer", encoder_once=True)
    assert found.energy("spikingformer").macs - once.macs == found.rows[0].operations
    with pytest.raises(UsageError, match="unknown energy rule"):
        found.energy("guess")
    with pytest.raises(UsageError, match="no option 'stem'; it takes largest"):
        found.energy("spikingformer", stem=1)


def test_json() -> None:
    found = audit(net(), [torch.rand(1, 3, 16, 16)])
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert {"name", "kind", "input", "max", "rate", "macs", "acs", "energy_pj"} <= set(values["rows"][1])
    assert values["spike_driven"] is found.spike_driven
    assert values["energies"]["measured"]["pj"] == pytest.approx(sum(row["energy_pj"] for row in values["rows"]))


@pytest.mark.parametrize(
    "name", ["report_vgg16", "report_sew_resnet34", "report_ms_resnet34", "report_vanilla_resnet34"]
)
def test_operations_are_those_of_the_published_tables(name: str) -> None:
    model = spikeloom.create_model(name, T=1)
    found = audit(model, [torch.rand(1, 3, 32, 32)])
    assert sum(row.operations for row in found.rows) == spikeloom.analyse.count_cost(model, (3, 32, 32), 1).macs
    assert found.parameters == sum(p.numel() for p in model.parameters())


# --- the verdict ------------------------------------------------------------------------------------------------------


def causes(found: Audit) -> dict[str, str]:
    return {row.name: row.why for row in found.breaking}


def test_verdicts_of_the_three_shortcuts() -> None:
    x = [torch.rand(2, 3, 16, 16)]
    sew = audit(net(), x)
    assert not sew.spike_driven
    # The stem's spikes enter the first block; each later block receives the sum of the one before, which the unit
    # `spike` forms itself where the shortcut is the identity.
    assert {name: why.removesuffix(".spike") for name, why in causes(sew).items()} == {
        f"blocks.{n}.branch.0": f"a sum (ADD shortcut) in blocks.{n - 1}" for n in range(1, 15)
    }
    for name in ("report_ms_resnet34", "report_vanilla_resnet34"):
        assert audit(spikeloom.create_model(name, T=2), x, calibrate=True).spike_driven is True


class Broken(nn.Module):
    """Conv - neuron - `between` - conv - neuron - pool - linear."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        L = spikeloom.layers
        self.one, self.spike = L.Conv2d(2, 8, 3, padding=1), LIF(v_threshold=0.1)
        self.two, self.last = L.Conv2d(8, 8, 3, padding=1), LIF(v_threshold=0.1)
        self.pool, self.head = L.GlobalAvgPool(), L.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.last(self.two(self.between(self.spike(self.one(x)))))))


@pytest.mark.parametrize(
    ("between", "kind", "why"),
    [
        (lambda s: s, "binary", ""),
        (lambda s: F.max_pool2d(s[0], 2)[None].repeat(2, 1, 1, 1, 1), "binary", ""),
        (lambda s: F.avg_pool2d(s.flatten(0, 1), 2).unflatten(0, (2, -1)), "scaled", "average pooling"),
        (lambda s: s * torch.sigmoid(s.mean((0, 3, 4), keepdim=True)), "real", "a product with real values"),
        (lambda s: s + s.flip(2), "integer", "a sum (ADD shortcut)"),
        (
            lambda s: torch.stack([a + b for a, b in zip(s, s, strict=True)]).flatten(0, 1).unflatten(0, (2, -1)),
            "integer",
            "a sum (ADD shortcut)",
        ),
        (lambda s: s + 0.3 * torch.randn_like(s), "real", "a sum (membrane shortcut)"),
        (lambda s: F.relu(s * 1.3 - torch.rand_like(s)), "real", "an activation"),
        (lambda s: F.layer_norm(s, s.shape[2:]), "real", "a norm without a neuron"),
    ],
)
def test_what_breaks_it_and_why(between: Callable[[Tensor], Tensor], kind: str, why: str) -> None:
    found = audit(Broken(between), [spikes(2, 3, 2, 8, 8)])
    row = found.rows[1]
    assert row.input == kind
    assert row.why.startswith(why)
    assert row.breaks is not found.spike_driven
    assert found.spike_driven is (kind == "binary")
    assert not found.rows[2].breaks  # a pooled classifier folds its mean into its weights
    assert found.rows[2].why.startswith("average pooling in pool")


def test_causes_inside_a_fused_unit() -> None:
    L = spikeloom.layers
    x = spikes(2, 3, 4, 8, 8)

    class Unit(nn.Module):
        def __init__(self, neuron: Callable[[], nn.Module], with_sum: bool, residual: bool) -> None:
            super().__init__()
            self.one, self.unit = L.Conv2d(4, 4, 3, padding=1), L.NormSpike(4, neuron)
            self.two, self.head = L.Conv2d(4, 4, 3), L.Linear(144, 3)
            self.with_sum, self.residual = with_sum, residual
            nn.init.constant_(self.unit.norm.weight, 4.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            s, u = self.unit.with_sum(y, y if self.residual else None)
            return self.head(L.Flatten()(self.two(u if self.with_sum else s)))

    # Whether norm, sum and neuron ran as one operation or as three.
    for backend in ("reference", "native") if spikeloom.ops._dispatch.native else ("reference",):
        with spikeloom.backend(backend):  # type: ignore[arg-type]
            whys = [
                audit(Unit(*options), [x]).rows[1].why
                for options in ((LIF, True, False), (LIF, True, True), (LIF, False, True))
            ]
            levels = audit(Unit(spikeloom.neurons.MLF, False, False), [x]).rows[1]
        assert whys == [
            "a norm without a neuron behind it in the model",
            "a sum (membrane shortcut) in the model",
            "",
        ]
        assert levels.input == "integer"


def test_an_ordinary_resnet_is_not_spike_driven() -> None:
    found = audit(torchvision.models.resnet18(num_classes=10), [torch.rand(2, 3, 32, 32)])
    assert len(found.rows) == 21
    assert not found.spike_driven
    assert len(found.breaking) == 20
    assert found.acs == 0
    assert found.steps == 1
    assert {row.why.split(" in ")[0] for row in found.breaking} == {
        "an activation that does not spike",
        "average pooling",
    }


def test_attention_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    found = audit(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), [torch.rand(2, 5, 16)])
    assert (found.images, found.steps) == (2, 1)
    kinds = [row.kind for row in found.rows]
    assert kinds == ["linear", "matmul", "matmul", "linear", "linear", "linear"] * 2
    assert sum(row.operations for row in found.rows if row.kind == "matmul") == 2 * 2 * 5 * 5 * 16


# --- other libraries --------------------------------------------------------------------------------------------------


def awake(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, 3.0)
            nn.init.normal_(module.bias, 0.5, 1.5)
    return model


def spikingjelly(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "SpikingJelly is not installed: audits of its networks are NOT tested"
        pytest.importorskip("spikingjelly", reason=reason)
        from spikingjelly.activation_based import functional, neuron, surrogate
        from spikingjelly.activation_based.model import sew_resnet, spikformer

        if name == "sew":
            model = sew_resnet.sew_resnet18(
                pretrained=False,
                spiking_neuron=neuron.IFNode,
                surrogate_function=surrogate.ATan(),
                detach_reset=True,
                **options,
            )
            functional.set_step_mode(model, "m")
        else:
            model = spikformer.Spikformer(
                T=4, img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=64, num_heads=4, depths=4
            )
    return awake(model)


def not_binary(rows: tuple[Layer, ...], *kinds: str) -> tuple[int, int]:
    rows = tuple(row for row in rows if row.kind in kinds)
    return sum(row.input not in ("silent", "binary") for row in rows), len(rows)


def test_sew_resnet_of_spikingjelly() -> None:
    x = torch.rand(2, 3, 64, 64).expand(4, 2, 3, 64, 64).clone()
    added = audit(spikingjelly("sew", cnf="ADD"), [x])
    assert not_binary(added.rows, "conv") == (11, 20)
    assert set(causes(added).values()) == {
        f"a sum (ADD shortcut) in layer{stage}.{block}" for stage in range(1, 5) for block in range(2)
    } - {"a sum (ADD shortcut) in layer4.1"}
    inhibited = audit(spikingjelly("sew", cnf="IAND"), [x])
    assert not_binary(inhibited.rows, "conv") == (1, 20)
    assert inhibited.spike_driven is True
    assert (added.images, added.steps) == (2, 4)


def test_spikformer_of_spikingjelly_is_reset_between_batches() -> None:
    model, x = spikingjelly("spikformer"), torch.rand(2, 3, 32, 32)
    found = audit(model, [x])
    assert not_binary(found.rows, "conv", "linear") == (10, 22)
    strict = {row.name for row in found.breaking}
    assert strict == {f"blocks.{n}.{part}" for n in range(4) for part in ("attn.qkv_conv_bn.0", "mlp.fc1.0")}
    assert sum(row.kind == "matmul" for row in found.rows) == 8
    again = audit(model, [x, x])
    assert [row.rate for row in again.rows] == pytest.approx([row.rate for row in found.rows])


def test_a_network_of_snntorch() -> None:
    snntorch = pytest.importorskip("snntorch", reason="SNNTORCH IS MISSING: install the extra bench")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.AvgPool2d(2)
            self.hidden, self.head = nn.Linear(64, 20), nn.Linear(20, 10)
            self.spikes = nn.ModuleList(snntorch.Leaky(beta=0.9) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            states, out = [spike.init_leaky() for spike in self.spikes], []
            for _ in range(3):
                a, states[0] = self.spikes[0](self.conv(x), states[0])
                b, states[1] = self.spikes[1](self.hidden(self.pool(a).flatten(1)), states[1])
                c, states[2] = self.spikes[2](self.head(b), states[2])
                out.append(c)
            return torch.stack(out)

    torch.manual_seed(0)
    found = audit(Net(), [8 * torch.rand(5, 1, 8, 8)])
    assert (found.images, found.steps) == (5, 3)
    assert [(row.name, row.input, row.scale) for row in found.rows] == [
        ("conv", "real", 1.0),
        ("hidden", "scaled", 0.25),
        ("head", "binary", 1.0),
    ]
    assert [row.operations for row in found.rows] == [3 * 9 * 4 * 64, 3 * 64 * 20, 3 * 20 * 10]
    assert [row.why for row in found.breaking] == ["average pooling in pool"]


# --- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = net().train(training)
    model.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    audit(model, [torch.rand(2, 3, 16, 16)])
    with pytest.raises(RuntimeError):
        audit(model, [torch.rand(2, 5, 16, 16)])
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() is fast


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(3, 2), [], "at least one batch"),
        (nn.ReLU(), [torch.rand(2, 3)], "ReLU ran no convolution"),
        (nn.Linear(3, 2), ["text"], "inputs and labels, got str"),
        (nn.Sequential(torch.compile(nn.Linear(3, 2))), [torch.rand(2, 3)], "before torch.compile"),
    ],
)
def test_mistakes(model: nn.Module, batches: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        audit(model, batches)


@pytest.mark.usefixtures("one_thread")
def test_an_audit_costs_little_more_than_inference() -> None:
    # Twice is the aim and what docs/measuring.md reports; here the machine may be busy. On one thread, because threads
    # that wait for each other count as computing.
    model, x = net(T=4).eval(), torch.rand(16, 3, 32, 32)

    def seconds(run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    with torch.no_grad():
        model(x)
        plain = min(seconds(lambda: model(x)) for _ in range(3))
    audited = min(seconds(lambda: audit(model, [x])) for _ in range(3))
    assert audited <= 3 * plain + 0.05


def test_what_is_shown_of_an_audit_is_short() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    found = audit(model, [torch.randn(4, 10)])
    # 4.6 pJ a multiply-accumulate, of which an image has 10 x 20 + 20 x 5.
    assert repr(found) == "Audit(Sequential: 2 layers, 4 images, T = 1, 0.00138 uJ an image)"
