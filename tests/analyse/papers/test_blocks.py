"""Analyses of residual blocks, loss landscapes, spike trains and confusions, against cases that can be known."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeloom import analyse, create_model
from spikeloom.analyse.audit.attention_products import attentions
from spikeloom.analyse.load import open_target
from spikeloom.analyse.papers.landscape import directions
from spikeloom.analyse.papers.similarity import listed_blocks
from spikeloom.errors import UsageError
from spikeloom.layers import MembraneBlock, NormSpike
from spikeloom.neurons import IF, LIF, PSU, ParaLIF
from spikeloom.train.losses import sdt


def residual(name: str, gain: float | None = None, T: int = 1) -> nn.Module:
    """A 34-layer network; with a gain, the last norm of every branch has that weight and no bias."""
    model = create_model(name, T=T)
    if gain is not None:
        for block in model.blocks:
            nn.init.constant_(block.spike.norm.weight, gain)
    return model


# --- similarity -------------------------------------------------------------------------------------------------------


def test_ssim_by_hand() -> None:
    x, y = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    a, b = x[1].double(), y[1].double()
    cov = ((a - a.mean()) * (b - b.mean())).mean()
    expected = (2 * a.mean() * b.mean() + 1e-4) * (2 * cov + 9e-4)
    expected /= (a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (a.var(correction=0) + b.var(correction=0) + 9e-4)
    assert analyse.ssim(x, y)[1].item() == pytest.approx(expected.item())
    assert analyse.ssim(x, x) == pytest.approx([1.0] * 3)
    assert analyse.ssim(x, 1 - x)[0] < 0


def test_idle_blocks_have_similarity_one() -> None:
    model = residual("report_sew_resnet34", gain=0.0, T=3)
    with torch.no_grad():
        model.stem_spike.norm.bias.fill_(0.4)
    found = analyse.block_similarity(model.eval(), torch.rand(2, 3, 32, 32))
    assert [row.block for row in found] == [f"blocks.{n}" for n in range(1, 15)]
    for row in found:
        assert row.resized == (row.block in ("blocks.5", "blocks.10"))
        if not row.resized:
            assert row.equal
            assert row.ssim == pytest.approx(1.0)
    busy = analyse.block_similarity(residual("report_ms_resnet34", 3.0, 3).eval(), torch.rand(2, 3, 32, 32))
    assert not all(row.equal for row in busy)
    assert len(analyse.draw_similarity({"idle": found, "busy": busy}).data) == 2


def test_networks_without_blocks_say_so() -> None:
    with pytest.raises(UsageError, match="SpikingVGG has no list `blocks`"):
        listed_blocks(create_model("report_vgg16"))


# --- isometry ---------------------------------------------------------------------------------------------------------


def test_a_membrane_block_whose_last_norm_is_zero_is_an_isometry() -> None:
    x = torch.rand(1, 3, 16, 16)
    found = analyse.block_isometry(residual("report_ms_resnet34", gain=0.0), x, probes=8)
    for row in found:
        if row.block not in ("blocks.5", "blocks.10"):  # those drop three of four positions
            assert abs(row.phi - 1) <= 5 * row.error + 1e-6
    # Of 2 C channels of a quarter of the positions, C carry a value: half of the dimensions.
    assert found[5].phi == pytest.approx(0.5, abs=5 * found[5].error)
    assert [row.block for row in found] == [f"blocks.{n}" for n in range(15)]


def test_a_vanilla_block_loses_gradient_where_it_is_outside_the_surrogate() -> None:
    x = torch.rand(1, 3, 16, 16)
    found = analyse.block_isometry(residual("report_vanilla_resnet34", gain=0.0), x, probes=4)
    assert all(row.phi < 1 for row in found)


def test_hutchinson_finds_the_trace() -> None:
    torch.manual_seed(3)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(12, 9, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.branch(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Linear()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    model = Net()
    weight = model.blocks[0].branch.weight
    exact = (weight @ weight.T).trace().item() / 9
    (row,) = analyse.block_isometry(model, torch.rand(1, 12), probes=2000)
    assert row.phi == pytest.approx(exact, abs=4 * row.error)
    assert row.error < 0.05 * exact
    with pytest.raises(UsageError, match="at least 2, got 1"):
        analyse.block_isometry(model, torch.rand(1, 12), probes=1)


def test_membrane_blocks_are_entered_through_their_neuron() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem_spike = NormSpike(4, LIF)
            self.blocks = nn.ModuleList([MembraneBlock(nn.Identity(), NormSpike(4, LIF), nn.Identity())])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](*self.stem_spike.with_sum(x))[1]

    # J = I + J_F, and F sees U through the spikes alone: without their surrogate phi would be 1.
    (row,) = analyse.block_isometry(Net(), torch.randn(1, 3, 4, 5, 5), probes=16)
    assert row.phi > 1.05


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.7])
def test_residual_influence(rate: float) -> None:
    assert analyse.residual_influence(rate) == pytest.approx(0.15866, abs=1e-5)
    assert analyse.simulate_influence(rate) == pytest.approx(0.15866, abs=2e-3)
    assert analyse.residual_influence(rate, 1.0, 0.5) == pytest.approx((1 - rate) * 0.02275 + rate * 0.5, abs=1e-5)
    assert analyse.simulate_influence(rate, 1.0, 0.5) == pytest.approx((1 - rate) * 0.02275 + rate * 0.5, abs=2e-3)


def test_the_figure_of_residual_influence() -> None:
    formula, drawn = analyse.draw_influence(1.0, 0.5).data
    assert formula.y[4] == analyse.residual_influence(0.2, 1.0, 0.5)
    assert drawn.y == pytest.approx(formula.y, abs=0.01)


def test_calibration_is_a_copy() -> None:
    model, x = residual("report_sew_resnet34"), torch.rand(4, 3, 16, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ready = analyse.calibrated(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not ready.training
    stem = ready.stem(x[None])[0]
    assert ready.stem_spike.norm.running_mean == pytest.approx(stem.mean((0, 2, 3)).detach(), abs=1e-5)
    assert ready.stem_spike.norm.momentum == 0.1


# --- landscape --------------------------------------------------------------------------------------------------------


def test_the_landscape_of_a_quadratic() -> None:
    model = nn.Linear(5, 3)
    x, y = torch.randn(16, 5), torch.zeros(16, dtype=torch.long)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.square().mean()

    found = analyse.loss_landscape(model, loss, [(x[:10], y[:10]), (x[10:], y[10:])], points=5, workers=2, seed=4)
    assert found.steps == pytest.approx([-1, -0.5, 0, 0.5, 1])
    d, e = directions(model, 4), directions(model, 5)
    assert torch.equal(d[1], torch.zeros(3))
    assert d[0].norm(dim=1) == pytest.approx(model.weight.detach().norm(dim=1))
    for row, b in enumerate(found.steps):
        for column, a in enumerate(found.steps):
            weight = model.weight + a * d[0] + b * e[0]
            assert found.losses[row][column] == pytest.approx(loss(F.linear(x, weight, model.bias), y).item(), rel=1e-5)
    assert found.roughness > 0
    assert analyse.draw_landscape(found).data[0].z[2][2] == found.losses[2][2]
    with pytest.raises(UsageError, match="odd and at least 3, got 4"):
        analyse.loss_landscape(model, loss, [(x, y)], points=4)


def test_workers_do_not_change_a_spiking_landscape() -> None:
    model, batch = residual("report_ms_resnet34"), (torch.rand(2, 3, 16, 16), torch.tensor([1, 2]))
    threads = torch.get_num_threads()
    one, two = (analyse.loss_landscape(model, sdt, [batch], 3, workers=n) for n in (1, 2))
    assert one == two
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        assert one.losses[1][1] == pytest.approx(sdt(model.eval()(batch[0]), batch[1]).item(), rel=1e-5)


# --- trains -----------------------------------------------------------------------------------------------------------


def test_spike_trains_and_their_pictures() -> None:
    model = residual("report_sew_resnet34", T=3)
    with torch.no_grad():
        model.stem_spike.norm.bias.fill_(0.6)
    name, spikes = analyse.spike_train(model, torch.rand(2, 3, 16, 16))
    assert (name, spikes.shape) == ("stem_spike.neuron", (3, 2, 16, 16, 16))
    assert model.training
    other, _ = analyse.spike_train(model, torch.rand(2, 3, 16, 16), "blocks.3.spike.neuron")
    assert other == "blocks.3.spike.neuron"
    with pytest.raises(UsageError, match="no layer of neurons named 'stem'"):
        analyse.spike_train(model, torch.rand(2, 3, 16, 16), "stem")
    figure = analyse.draw_spike_maps({"a": spikes[:, 0], "b": spikes[:, 1]}, channels=5)
    assert len(figure.data) == 10
    assert torch.tensor(figure.data[7].z).flip(0).equal(spikes[:, 1, 2].sum(0))
    raster = analyse.draw_raster(spikes[:, 0], neurons=50)
    assert len(raster.data[0].x) == spikes[:, 0].flatten(1)[:, :50].sum()


def test_responses_to_the_probe_current() -> None:
    current = analyse.probe_current(120)
    assert current.shape == (120,)
    assert torch.equal(current[:30], torch.zeros(30))
    assert torch.equal(current[30:60], torch.full((30,), 1.5))
    neurons = {"IF": IF(), "T": ParaLIF("t"), "D": ParaLIF("d"), "SB": ParaLIF("sb"), "TRB": ParaLIF("trb")}
    found = analyse.responses(neurons, current)
    assert {name: s[:30].sum().item() for name, s in found.items() if name != "SB"} == dict.fromkeys(
        ("IF", "T", "D", "TRB"), 0.0
    )
    assert found["SB"][:30].sum() > 0  # SB fires half the time at rest
    assert all(s.sum() > 0 for s in found.values())
    figure = analyse.draw_responses(current, found)
    assert [trace.name for trace in figure.data] == ["current", *neurons]


class Attention(nn.Module):
    """Spiking attention without layers around it, in either order."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        out = (q @ k.transpose(-2, -1)) @ v if self.first == "qk" else q @ (k.transpose(-2, -1) @ v)
        return out.mean((1, 3))


@pytest.mark.parametrize("first", ["qk", "kv"])
def test_rates_in_attention(first: str) -> None:
    q, k, v = ((torch.rand(2, 3, 10, 4) < rate).float() for rate in (0.1, 0.3, 0.6))
    found = analyse.audit(Attention(first), [torch.stack([q, k, v])], batch_axis=1)
    (row,) = analyse.attention_rates(found.rows)
    expected = [t.mean().item() for t in (q, k, v)]
    assert [row.queries, row.keys, row.values] == pytest.approx(expected, abs=1e-6)
    assert list(attentions(found.rows)) == [0]
    ssa = 3 * 10 * 16 * (min(expected[1], expected[2]) + expected[0])
    assert found.energy("spikingformer").acs == pytest.approx(ssa, rel=1e-5)
    assert len(analyse.draw_attention_rates([row]).data) == 3


# --- confusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_confusion(steps: int) -> None:
    truth, said = [0, 0, 1, 1, 1, 3], [0, 1, 1, 1, 0, 3]

    class Says(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = F.one_hot(x[:, 0].long(), 4).float()
            return logits.expand(steps, *logits.shape) if steps else logits

    batches = [(torch.tensor(said[a:b])[:, None], torch.tensor(truth[a:b])) for a, b in ((0, 4), (4, 6))]
    found = analyse.confusion(Says(), batches, ["a", "b", "c", "d"])
    assert found.counts == ((1, 1, 0, 0), (1, 2, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1))
    assert found.per_class[:2] == pytest.approx((50, 200 / 3))
    assert math.isnan(found.per_class[2])
    assert found.accuracy == pytest.approx(400 / 6)
    worse = analyse.Confusion(found.classes, ((1, 1, 0, 0), (2, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1)))
    assert found.improved(worse) == ("b",)
    assert analyse.draw_confusion(found).data[0].z[1] == pytest.approx((1 / 3, 2 / 3, 0, 0))
    with pytest.raises(UsageError, match="at least one batch"):
        analyse.confusion(Says(), [], ["a"])


# --- measurements and targets -----------------------------------------------------------------------------------------

DIGITS = {"name": "digits", "size": 16}
NETWORKS = ["report_vanilla_resnet34", "report_ms_resnet34"]
MEASURED: dict[str, dict[str, Any]] = {
    "energy": {"network": "report_sew_resnet34", "images": 4, "data": DIGITS},
    "spike_maps": {"networks": ["report_sew_resnet34"], "data": DIGITS, "image": 1, "channels": 3},
    "neuron_responses": {"neurons": ["LIF", "ParaLIF:trb"], "steps": 24},
    "residual_influence_probability": {},
    "similarity": {"networks": NETWORKS, "data": DIGITS, "images": 2},
    "isometry": {"networks": NETWORKS, "data": DIGITS, "images": 1, "probes": 2, "model": {"T": 1}},
    "landscape": {"networks": NETWORKS[:1], "data": DIGITS, "images": 2, "points": 3},
}


@pytest.mark.parametrize("name", MEASURED)
def test_measurements(name: str, tmp_path: Path) -> None:
    found = analyse.MEASUREMENTS[name](**MEASURED[name])
    assert found.values
    assert all(isinstance(value, bool | int | float | str) for value in found.values.values())
    for figure in found.figures.values():
        assert figure.data
        analyse.write_figure(tmp_path / "a.json", figure)
        assert analyse.figure_data(analyse.read_figure(tmp_path / "a.json")) == analyse.figure_data(figure)
        assert (tmp_path / "a.json").stat().st_size < 200_000
    if name == "energy":
        assert found.values["images"] == 4
        assert found.values["spike_driven"] is False
        assert len(next(iter(found.tables.values()))) == 32
        stem, with_t, without = (found.values[key] for key in found.values if key.startswith("energy_uJ: "))
        assert with_t == pytest.approx(6 * without)
        assert stem == found.values["energy_uJ_report000"]


def test_shortcuts_of_named_models_are_compared_and_runs_stay_as_they_are() -> None:
    networks, shortcuts = ["ms_resnet14", "weights:report_sew_resnet34/digits"], ["vanilla", "membrane"]
    options = {"T": 1, "zero_init": False}
    found = analyse.MEASUREMENTS["similarity"](networks, {"name": "digits"}, 2, model=options, shortcuts=shortcuts)
    *named, run = found.tables
    assert named == ["ms_resnet14, vanilla", "ms_resnet14, membrane"]
    assert "ms_resnet14" not in run
    assert found.tables[named[0]] != found.tables[named[1]]
    assert (len(found.tables[named[0]]), len(found.tables[run])) == (5, 14)


def test_the_paper_s_initialisation_is_isometric() -> None:
    options: dict[str, Any] = {"probes": 8, "model": {"T": 1}, "shortcuts": ["vanilla", "membrane"]}
    found = analyse.MEASUREMENTS["isometry"](["ms_resnet14"], {"name": "digits", "size": 32}, 1, **options)
    vanilla, membrane = ([row["phi"] for row in rows] for rows in found.tables.values())
    same_shape = [0, 1, 3, 5]  # of two blocks a stage, the first of the second and third stage change it
    assert [membrane[i] for i in same_shape] == pytest.approx([1] * 4, abs=0.05)
    assert all(vanilla[i] < 0.9 for i in same_shape)


def test_isometry_of_a_trained_network_has_its_own_statistics() -> None:
    model = residual("report_ms_resnet34")
    x = torch.rand(1, 3, 16, 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(100.0)  # a branch ten times smaller than with those of x
    trained, fresh = (analyse.block_isometry(m, x, probes=4) for m in (model.eval(), copy.deepcopy(model).train()))
    assert all(abs(row.phi - 1) < 0.1 for row in trained[1:5])
    assert any(abs(row.phi - 1) > 0.1 for row in fresh[1:5])


def test_targets() -> None:
    target = open_target("report_ms_resnet34", {"images": 5, "batch": 2, "data": DIGITS, "model": {"T": 2}})
    assert [len(y) for _, y in target.batches()] == [2, 2, 1]
    assert (target.images, target.trained, len(target.classes)) == (5, False, 10)
    noise = open_target("report_ms_resnet34", {"input": "1x20x20", "images": 3})
    assert next(noise.batches())[0].shape == (3, 1, 20, 20)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("report_resnet", {}, "neither a run's folder nor a model; did you mean"),
        ("report_vgg16", {"image": 3}, "unknown key 'image'; did you mean images"),
        ("report_vgg16", {"images": 0}, "images must be a whole number from 1, got 0"),
        ("report_vgg16", {"input": "3*32"}, "a shape such as 3x32x32, got '3\\*32'"),
        ("report_vgg16", {"input": "3x32x32", "data": "digits"}, "leave out data="),
        ("report_vgg16", {"model": "x"}, "model.KEY=VALUE, got model='x'"),
        ("report_vgg16", {"neuron": "LIFE"}, "unknown neuron 'LIFE'"),
        ("runs/none", {}, "is not a run"),
    ],
)
def test_wrong_targets(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_target(name, values)


def test_a_trace_is_what_the_neuron_does() -> None:
    current = torch.tensor([0.5, 0.5, 0.5, 0.0, 2.0])
    found = analyse.neuron_trace(IF(), current)
    assert found.potentials.tolist() == [0.5, 1.0, 0.5, 0.5, 2.5]
    assert found.spikes.tolist() == [0, 1, 0, 0, 1]
    figure = analyse.draw_traces({"IF": found, "PSU": analyse.neuron_trace(PSU(), current)})
    drawn = [(trace.name, list(trace.x or []), list(trace.y)) for trace in figure.data]
    assert drawn[:3] == [
        ("IF", [], current.tolist()),
        ("IF", [], found.potentials.tolist()),
        ("IF: spike", [1, 4], [1.0, 2.5]),
    ]
    assert [name for name, _, _ in drawn[3:]] == ["PSU", "PSU: spike"]  # its current is drawn already
    assert [line.y0 for line in figure.layout.shapes] == [1.0]


def test_a_trace_is_of_one_neuron() -> None:
    with pytest.raises(UsageError, match=r"takes a current \[T\], got shape \(5, 1\)"):
        analyse.neuron_trace(IF(), torch.zeros(5, 1))
    with pytest.raises(UsageError, match=r"takes a tensor of currents \[T\], got a list"):
        analyse.neuron_trace(IF(), [1.0] * 5)  # pyright: ignore
