"""The models that take images: counts, shapes, state, and PyTorch's exporters; and the names of all."""

from __future__ import annotations

import functools
import itertools
from functools import lru_cache
from typing import Any

import pytest
import torch
from helpers.small_networks import in_order, shortened
from torch import Tensor, nn

import spikeloom
from spikeloom.errors import UsageError
from spikeloom.layers import SEWBlock, VanillaBlock
from spikeloom.models import create_model, list_models
from spikeloom.models.course_report import report_lif
from spikeloom.neurons import IF, LIF, PLIF, Neuron
from spikeloom.record import Recorder
from spikeloom.stream import Stream

INPUT = {
    "colored_mnist_net": (3, 28, 28),
    "spikformer_2_256_dvs": (2, 32, 32),
    "spikingformer_2_256_dvs": (2, 32, 32),
    "ds_resnet14_dvs": (2, 13, 13),
    "syna_resnet18": (3, 9, 9),
    "tdbn_resnet19": (3, 8, 8),
    "vggsnn": (2, 16, 16),
    "plif_net": (2, 16, 16),
    **dict.fromkeys(("ms_resnet20", *list_models("report_*resnet34*")), (3, 16, 16)),
    # Not 32x32: one element a channel has no deviation, and a norm's weight then no gradient.
    "ghostnet_dfc": (3, 33, 33),
    "ghostnet_channel_mlp": (3, 33, 33),
}
# Narrower or smaller here than their names say, and livelier than with the weights they start from.
SMALL: dict[str, dict[str, Any]] = {
    name: {"channels": 32, "heads": 4, "depth": 1, "scale": 2.0}
    for name in (
        "spikformer_2_384",
        "spikformer_2_256_dvs",
        "spikformer_v2_2_64",
        "spikingformer_2_384",
        "spikingformer_2_256_dvs",
    )
}
# Time attention, the default of SynA-ResNet, has one length and cannot step: test_attentive_models.
SMALL |= {
    "ds_resnet14_dvs": {"sam": True},
    "syna_resnet18": {"attention": None},
    "vggsnn": {"image_size": 16},
    # Its linear layers have no norm before their neurons.
    "plif_net": {
        "convs": 2,
        "channels": 16,
        "hidden": 32,
        "image_size": 16,
        "dropout": 0.0,
        "neuron": functools.partial(LIF, decay_input=False, v_threshold=0.1),
    },
    # The neurons between its linear layers have no norm before them.
    "tdbn_resnet19": {"neuron": functools.partial(LIF, decay_input=False, v_threshold=0.25)},
}
IMAGE_MODELS = [
    *list_models("report_*"),
    "colored_mnist_net",
    "sew_resnet18",
    "sew_probe",
    "ms_resnet20",
    "ghostnet_dfc",
    "ghostnet_channel_mlp",
    *SMALL,
]
RESNETS = ["report_vanilla_resnet34", "report_sew_resnet34", "report_ms_resnet34"]


def build(name: str, **overrides: object) -> nn.Module:
    torch.manual_seed(1)
    return create_model(name, **{**SMALL.get(name, {}), **overrides})


@lru_cache
def warm(name: str) -> dict[str, Tensor]:
    """Weights with which neurons fire in eval mode too: norms have seen data; without norms, weights are larger."""
    model = build(name).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 0.5
            norm.weight.mul_(2.5 if name in SMALL else 1.0)
        for p in model.parameters():
            p.mul_(1.0 if norms else 4.0)
        for _ in range(6):
            model(batch(name, 2, T=2))
    return model.state_dict()


def batch(name: str, n: int, T: int | None = None) -> Tensor:
    """A batch of images, or with T a sequence of frames."""
    return torch.rand(*([] if T is None else [T]), n, *INPUT.get(name, (3, 32, 32))) * 2


def loaded(name: str, **overrides: object) -> nn.Module:
    model = build(name, **overrides)
    model.load_state_dict(warm(name))
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("report_vgg16", {}, 14_790_090),
        ("report_vgg16", {"in_channels": 1}, 14_788_938),
        *((name, {}, 464_154) for name in RESNETS),
        *((name, {"in_channels": 1}, 463_866) for name in RESNETS),
        *((name, {"block_bias": True}, 465_274) for name in RESNETS),
        *((name, {"block_bias": True, "in_channels": 1}, 464_986) for name in RESNETS),
        ("colored_mnist_net", {"in_channels": 3, "num_classes": 2}, 428_072),
    ],
)
def test_published_parameter_counts(name: str, overrides: dict[str, int], count: int) -> None:
    with torch.device("meta"):
        assert parameters(create_model(name, **overrides)) == count


def test_a_narrow_vgg() -> None:
    convolutions = sum(9 * i * o + o for i, o in itertools.pairwise((1, 8, 8, 16, 16, 32, 32, 32, *(64,) * 6)))
    with torch.device("meta"):
        model = create_model("report_vgg16", in_channels=1, width=8)
    assert parameters(model) == convolutions + 2 * (2 * 8 + 2 * 16 + 3 * 32 + 6 * 64) + 65 * 128 + 129 * 10
    with pytest.raises(ValueError, match=r"^width must be at least 1, got 0$"):
        create_model("report_vgg16", width=0)


@pytest.mark.parametrize(
    ("name", "count"), [("report_vgg16", 14), ("colored_mnist_net", 3), *((name, 31) for name in RESNETS)]
)
def test_number_of_neuron_layers(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name)
        assert sum(isinstance(m, Neuron) for m in model.modules()) == count
        # One more parameter for every PLIF.
        assert parameters(create_model(name, neuron=PLIF)) == parameters(model) + count
    assert len({id(m) for m in model.modules() if isinstance(m, Neuron)}) == count


@pytest.mark.parametrize("name", [*list_models("report_*"), *list_models("ghostnet_*"), "colored_mnist_net"])
def test_spiking_output_adds_the_neurons_of_the_classes(name: str) -> None:
    torch.manual_seed(1)
    plain, spiking = create_model(name), create_model(name, spiking_output=True)
    count = [sum(isinstance(m, Neuron) for m in model.modules()) for model in (plain, spiking)]
    assert count[1] == count[0] + 1
    out = spiking(batch(name, 2, T=2))
    assert out.shape == (2, 2, 2 if name == "colored_mnist_net" else 10)
    assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_spiking_output_is_the_spikes_of_the_logits() -> None:
    plain, spiking = loaded("report_sew_resnet34").eval(), build("report_sew_resnet34", spiking_output=True).eval()
    spiking.load_state_dict({key.replace("head.", "head.0."): t for key, t in plain.state_dict().items()})
    x = batch("report_sew_resnet34", 2, T=4) * 4
    spikes = spiking(x)
    assert spikes.any()
    assert torch.equal(spikes, report_lif()(plain(x)))


def test_number_of_weighted_layers() -> None:
    with torch.device("meta"):
        for name, count in (("report_vgg16", 15), ("report_sew_resnet34", 32)):
            model = create_model(name)
            assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == count


# --- every model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_forward_and_backward(name: str, T: int) -> None:
    model = build(name, T=T, num_classes=7).train()
    x = batch(name, 1).requires_grad_()
    out = model(x)
    assert out.shape == (T, 1, 7)
    assert out.isfinite().all()
    out.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_frames_and_images(name: str) -> None:
    model = loaded(name, T=3).eval()
    x = batch(name, 2)
    with torch.no_grad():
        repeated = model(x)
        torch.testing.assert_close(model(x.expand(3, *x.shape).contiguous()), repeated, rtol=1e-3, atol=1e-3)
        assert model(batch(name, 2, T=2)).shape[0] == 2, "a sequence has its own length"
    with pytest.raises(ValueError, match=r"a batch of 4 axes or a sequence of 5, got shape \(32,\)"):
        model(torch.zeros(32))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_second_call_gives_the_same_answer(name: str) -> None:
    model = loaded(name, T=2).eval()
    x = batch(name, 2)
    with torch.no_grad():
        first = model(x)
        assert first.std() > 0
        assert torch.equal(model(x), first)
        assert model(batch(name, 1)).shape[1] == 1
        assert model(batch(name, 3)).shape[1] == 3
        assert torch.equal(model(x), first)
    # Two trainings from one seed are one training.
    outs, grads = [], []
    for _ in range(2):
        trained = build(name, T=2).train()
        outs.append(trained(x[:1]))
        outs[-1].sum().backward()
        grads.append([p.grad for p in trained.parameters()])
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_whole_is_stepwise(name: str) -> None:
    # In double precision: a convolution of one step may round unlike that of four, and one rounding can flip a spike.
    model = loaded(name).double().eval()
    x = batch(name, 2, T=4).double()
    with torch.no_grad():
        whole = model(x)
        stream = Stream(model)
        steps = torch.cat([stream(x_t[None]) for x_t in x])
        chunks = Stream(model)
        torch.testing.assert_close(torch.cat([chunks(x[:3]), chunks(x[3:])]), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_neuron_takes_part(name: str) -> None:
    model = loaded(name, T=2).eval()
    with Recorder(model) as record, torch.no_grad():
        model(batch(name, 2))
    neurons = [key for key, m in model.named_modules() if isinstance(m, Neuron)]
    assert sorted(record.spikes) == sorted(neurons)
    for spikes in itertools.chain(*record.spikes.values()):
        assert ((spikes >= 0) & (spikes <= (3 if name.startswith("ds_") else 1)) & (spikes == spikes.round())).all()
    assert max(record.rates().values()) > 0


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_autocast_to_bfloat16(name: str) -> None:
    model = loaded(name, T=2).train()
    with torch.autocast("cpu", dtype=torch.bfloat16), Recorder(model) as record:
        out = model(batch(name, 2))
    out.float().sum().backward()
    assert out.shape == (2, 2, out.shape[-1])
    assert {s.dtype for calls in record.spikes.values() for s in calls} == {torch.bfloat16}
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_channels_last_gives_the_same(name: str) -> None:
    model = loaded(name, T=2).double().eval()
    x = batch(name, 2).double()
    with torch.no_grad():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_state_dict_is_weights_only(name: str) -> None:
    model = build(name, T=2)
    before = set(model.state_dict())
    model(batch(name, 2))
    assert set(model.state_dict()) == before
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert all(key.rsplit(".", 1)[-1] in kinds for key in before)
    build(name, T=5).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_neuron_factory_is_used(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, neuron=lambda: IF(0.5))
    neurons = [m for m in model.modules() if isinstance(m, Neuron)]
    assert neurons
    assert all(type(m) is IF and m.v_threshold == 0.5 for m in neurons)


# --- the report's networks --------------------------------------------------------------------------------------------


def outputs_of(model: nn.Module, kind: type[nn.Module], x: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out: found.append(out)) for m in model.modules() if isinstance(m, kind)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_vanilla_blocks_are_binary() -> None:
    blocks = outputs_of(loaded(RESNETS[0], T=2).train(), VanillaBlock, batch(RESNETS[0], 2))
    assert len(blocks) == 15
    assert set(torch.cat([b.flatten() for b in blocks]).unique().tolist()) == {0.0, 1.0}


def test_sew_blocks_count_spikes() -> None:
    blocks = outputs_of(loaded(RESNETS[1], T=2).train(), SEWBlock, batch(RESNETS[1], 2))
    assert len(blocks) == 15
    for b, out in enumerate(blocks, start=1):
        assert torch.equal(out, out.round())
        assert out.min() >= 0
        assert out.max() <= b + 1
    assert blocks[4].max() > 1


def test_membrane_network_ends_in_spikes() -> None:
    model, seen = loaded(RESNETS[2], T=2).train(), []
    model.pool.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))  # pyright: ignore
    model(batch(RESNETS[2], 2))
    assert ((seen[0] == 0) | (seen[0] == 1)).all()


def test_first_convolution_runs_once() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("report_sew_resnet34", "report_vgg16"):
        model, x = build(name, T=4).eval(), torch.rand(1, 3, 32, 32)
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        with torch.no_grad(), FlopCounterMode(display=False) as image:
            model(x)
        with torch.no_grad(), FlopCounterMode(display=False) as frames:
            model(x.expand(4, *x.shape).contiguous())
        once = 2 * first.weight.numel() * 32 * 32
        assert frames.get_total_flops() - image.get_total_flops() == 3 * once


def test_macs_of_the_report() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for in_channels, macs in ((3, 68_862_592), (1, 68_862_592 - 2 * 9 * 16 * 1024)):
        model = build("report_sew_resnet34", T=1, in_channels=in_channels).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, in_channels, 32, 32))
        assert counter.get_total_flops() == 2 * macs
        assert macs / 1e6 == pytest.approx(68.863 if in_channels == 3 else 68.568, abs=1e-3)


def test_colored_mnist_sizes() -> None:
    assert create_model("colored_mnist_net", image_size=16)(torch.zeros(2, 3, 16, 16)).shape == (8, 2, 2)
    with pytest.raises(ValueError, match="image_size must be at least 16, got 15"):
        create_model("colored_mnist_net", image_size=15)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert spikeloom.list_models is list_models
    assert list_models() == sorted(list_models())
    assert set(RESNETS) <= set(list_models("report_*_resnet34"))
    assert list_models("no such") == []


def test_unknown_model() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'report_vgg61'; did you mean report_vgg16"):
        create_model("report_vgg61")


def test_unknown_argument() -> None:
    with pytest.raises(UsageError, match=r"model report_vgg16 has no argument 'classes'; did you mean num_classes\?"):
        create_model("report_vgg16", classes=3)
    with pytest.raises(UsageError, match=r"has no argument 'block_bias'"):
        create_model("report_vgg16", block_bias=True)


@pytest.mark.parametrize("name", list_models())
def test_common_arguments(name: str) -> None:
    import inspect

    known = inspect.signature(spikeloom.models.MODELS[name]).parameters
    assert {"in_channels", "num_classes", "neuron", "T"} <= set(known)
    assert all(p.default is not p.empty for p in known.values()), "defaults are the paper's main row"


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_export(name: str) -> None:
    # One block of each kind is exported like more of them, and `torch.export` takes its time for each layer.
    model, x = shortened(loaded(name, T=2), 1).eval(), batch(name, 2)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        expected = model(x)
        assert expected.abs().max() > 0
        assert torch.equal(program.module()(in_order(x)), expected)


def compiled_equals_eager(name: str, backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()  # it compiles at most eight networks of one class in a process
    model, x = shortened(loaded(name, T=2)).to(dtype).eval(), batch(name, 2).to(dtype)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        # A plain call starts from rest, compiled or not.
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [n if n == "colored_mnist_net" else pytest.param(n, marks=pytest.mark.slow) for n in IMAGE_MODELS]
)
def test_compile_to_one_graph(name: str) -> None:
    compiled_equals_eager(name, "inductor", torch.float32)


@pytest.mark.parametrize("name", ["report_ms_resnet34"])
def test_capture_of_one_graph(name: str) -> None:
    compiled_equals_eager(name, "aot_eager", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["colored_mnist_net", "report_sew_resnet34"])
def test_compile_the_reference(name: str) -> None:
    # In float64 there is no kernel: the reference itself is traced and fused with its neighbours.
    compiled_equals_eager(name, "inductor", torch.float64)


@pytest.mark.slow
def test_compiled_training_step() -> None:
    model, x = loaded("colored_mnist_net", T=2).train(), batch("colored_mnist_net", 2)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.compile(model, fullgraph=True)(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
