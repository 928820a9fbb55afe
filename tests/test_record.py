"""The recorder: names, values, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import Conv2d, Flatten, Linear, NormSpike
from spikeloom.models import create_model
from spikeloom.neurons import IF, LIF
from spikeloom.record import RateMeter, Recorder, summary
from spikeloom.stream import Stream, checkpoint


def net() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("conv", Conv2d(2, 3, 3, padding=1))
    model.add_module("unit", NormSpike(3, LIF))
    model.add_module("flatten", Flatten())
    model.add_module("head", Linear(48, 5))
    model.add_module("last", IF())
    return model.eval()


def test_names_and_values() -> None:
    model, x = net(), torch.randn(4, 2, 2, 4, 4) * 3
    with Recorder(model, potentials=True, inputs=True) as record:
        out = model(x)
    assert list(record.spikes) == list(record.potentials) == ["unit.neuron", "last"]
    assert list(record.inputs) == ["conv", "head"]
    assert torch.equal(record.spikes["last"][0], out)
    assert torch.equal(record.inputs["conv"][0], x)
    assert torch.equal(record.inputs["head"][0], record.spikes["unit.neuron"][0].flatten(2))
    for name, spikes in record.spikes.items():
        assert len(spikes) == 1
        assert not spikes[0].requires_grad
        assert torch.equal((record.potentials[name][0] >= 1).float(), spikes[0])


def test_only_what_is_asked_for() -> None:
    model, x = net(), torch.randn(2, 2, 2, 4, 4)
    with Recorder(model, spikes=False, inputs=True) as record:
        model(x)
    assert record.spikes == record.potentials == {}
    with Recorder(model, inputs=True, only={"last", "conv"}) as record:
        model(x)
    assert list(record.spikes) == ["last"]
    assert list(record.inputs) == ["conv"]
    with pytest.raises(ValueError, match="no layer named 'lost'"):
        Recorder(model, only={"lost"})


def test_rates() -> None:
    model = nn.Sequential(IF())
    with Recorder(model) as record:
        model(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        assert record.rates() == {"0": 0.5}
        model(torch.zeros(8, 1))
        assert record.rates() == {"0": 0.25}
        assert [s.shape for s in record.spikes["0"]] == [(4, 2), (8, 1)]
        record.clear()
        assert record.rates() == {}


def test_potentials_under_a_stream() -> None:
    # The second call's potentials start from the state that the first one left.
    neuron = LIF(decay_input=False)
    x = torch.full((4, 1), 0.625)
    whole = neuron.potentials(x)
    assert whole.flatten().tolist() == [0.625, 0.9375, 1.09375, 0.625]
    stream = Stream(nn.Sequential(neuron))
    with Recorder(stream.model, potentials=True) as record:
        stream(x[:1])
        stream(x[1:3])
        stream(x[3:])
    assert torch.equal(torch.cat(record.potentials["0"]), whole)


def test_hooks_are_removed() -> None:
    model, x = net(), torch.randn(1, 1, 2, 4, 4)
    expected = model(x)
    with pytest.raises(ArithmeticError), Recorder(model, potentials=True, inputs=True) as record:  # noqa: PT012
        assert torch.equal(model(x), expected)
        raise ArithmeticError
    model(x)
    assert all(len(calls) == 1 for calls in record.spikes.values())
    assert not any(m._forward_hooks for m in model.modules())
    with record:
        model(x)
    assert all(len(calls) == 2 for calls in record.spikes.values())


def test_recording_does_not_change_gradients() -> None:
    model, grads = net().train(), []
    x = torch.randn(3, 2, 2, 4, 4, requires_grad=True)
    for potentials in (False, True):
        with Recorder(model, potentials=potentials, inputs=potentials):
            (grad,) = torch.autograd.grad(model(x).sum(), x)
        grads.append(grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("streams", [False, True])
def test_nothing_is_recorded_twice_under_checkpoint(streams: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x)

    model, x = Checkpointed(), torch.randn(3, 2, 2, 4, 4, requires_grad=True)
    call = Stream(model) if streams else model
    with Recorder(model, potentials=True, inputs=True) as record:
        call(x).sum().backward()
    assert x.grad is not None
    assert set(record.spikes) == {"inner.unit.neuron", "inner.last"}
    for store in (record.spikes, record.potentials, record.inputs):
        assert all(len(calls) == 1 for calls in store.values())


@pytest.mark.parametrize("streams", [False, True])
def test_rate_meter_agrees_with_the_recorder(streams: bool) -> None:
    model, x = net(), torch.randn(4, 2, 2, 4, 4) * 3
    call = Stream(model) if streams else model
    with Recorder(model) as record, RateMeter(model) as meter:
        call(x)
        call(x * 2)
    assert meter.rates() == pytest.approx(record.rates(), rel=1e-6)
    assert list(meter.rates()) == list(record.rates())
    assert max(meter.rates().values()) > 0
    model(x)
    assert meter.rates() == pytest.approx(record.rates(), rel=1e-6)


def test_rate_meter_counts_once_under_checkpoint() -> None:
    model, x = nn.Sequential(IF()), torch.tensor([[1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    with RateMeter(model) as meter:
        checkpoint(model, x).sum().backward()
    assert meter.rates() == {"0": 0.25}
    assert meter._sums["0"] == (1.0, 4)


def test_bfloat16_spikes_are_counted_exactly() -> None:
    # A sum kept in bfloat16 would stop at 256.
    model = nn.Sequential(IF())
    with RateMeter(model) as meter, Recorder(model) as record:
        model(torch.ones(1, 5000, dtype=torch.bfloat16))
    assert meter.rates() == record.rates() == {"0": 1.0}


# --- what would record nothing ----------------------------------------------------------------------------------------


def test_one_name_is_one_layer() -> None:
    model, x = net(), torch.randn(2, 2, 2, 4, 4)
    for only in ("unit.neuron", ["unit.neuron"], ("unit.neuron",)):
        with Recorder(model, only=only) as record:
            model(x)
        assert list(record.spikes) == ["unit.neuron"]
    # A string is no set of letters: "1" is a layer of this one, and so is "2".
    chain = nn.Sequential(*(IF() for _ in range(13)))
    with Recorder(chain, only="12") as record:
        chain(torch.ones(2, 3))
    assert list(record.spikes) == ["12"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"only": {"unit"}},
            r"nothing of 'unit', a NormSpike, is recorded with spikes=True, .*: it holds unit.neuron$",
        ),
        ({"only": {"conv"}}, r"nothing of 'conv', a Conv2d, is recorded with .*inputs=False$"),
        ({"only": "last", "spikes": False, "inputs": True}, r"nothing of 'last', a IF, is recorded with spikes=False"),
        ({"only": "unit.neurons"}, "the model has no layer named 'unit.neurons'"),
    ],
)
def test_a_recorder_of_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(net(), **options)
    # A network without neurons has nothing to record, which is no mistake.
    with Recorder(Linear(2, 2)) as record:
        assert record.rates() == {}


@pytest.mark.parametrize("kind", [Recorder, RateMeter, lambda model: summary(model, torch.zeros(1, 1, 2, 4, 4))])
def test_compiled_networks_are_refused(kind: Callable[[nn.Module], object]) -> None:
    with pytest.raises(TypeError, match=r"sees nothing of what torch.compile has made \(module 'model'\)"):
        kind(torch.compile(net(), backend="eager"))  # pyright: ignore
    model = net()
    model.unit.compile(backend="eager")
    with pytest.raises(TypeError, match=r"\(module 'unit'\)"):
        kind(model)


def test_a_block_without_a_call_ends_with_a_warning() -> None:
    model, x = net(), torch.randn(1, 1, 2, 4, 4)
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="a Recorder saw no call of its Sequential"), Recorder(model):
        twin(x)
    with pytest.raises(RuntimeError, match="other"), Recorder(model):  # and says nothing more than what went wrong
        raise RuntimeError("other")
    with Recorder(model) as record:
        model(x)
        record.clear()


# --- summary, and what is shown ---------------------------------------------------------------------------------------


def test_summary() -> None:
    model, x = net().train(), torch.randn(4, 2, 2, 4, 4) * 3
    found = summary(model, x)
    with torch.no_grad(), RateMeter(model.eval()) as meter:
        out = model(x)
    rates = meter.rates()
    assert [(row.name, row.kind, row.output, row.parameters, row.rate) for row in found.layers] == [
        ("conv", "Conv2d", (4, 2, 3, 4, 4), 3 * 2 * 9 + 3, None),
        ("unit.norm", "BatchNorm", (4, 2, 3, 4, 4), 6, None),
        ("unit.neuron", "LIF", (4, 2, 3, 4, 4), 0, pytest.approx(rates["unit.neuron"])),
        ("flatten", "Flatten", (4, 2, 48), 0, None),
        ("head", "Linear", (4, 2, 5), 48 * 5 + 5, None),
        ("last", "IF", (4, 2, 5), 0, pytest.approx(rates["last"])),
    ]
    assert rates["unit.neuron"] > 0.01
    assert (found.parameters, found.output) == (57 + 6 + 245, tuple(out.shape))
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "rate", "%"]
    assert lines[3].split()[-1] == f"{100 * rates['unit.neuron']:.2f}"
    assert lines[-1] == "Sequential: 308 parameters, output [4, 2, 5]"


def test_a_summary_leaves_the_model_as_it_was() -> None:
    model = net().train()
    model.unit.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary(model, torch.randn(4, 2, 2, 4, 4))
    assert model.training
    assert not model.unit.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="Conv2d takes a sequence"):
        summary(model, torch.randn(2, 2, 4, 4))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_shown_is_short() -> None:
    model, x = net(), torch.randn(4, 2, 2, 4, 4) * 3
    with Recorder(model, inputs=True) as record:
        assert repr(record) == "Recorder(Sequential: nothing)"
        model(x)
        model(x)
    assert repr(record) == "Recorder(Sequential: spikes of 2 layers in 2 calls, inputs of 2 layers in 2 calls)"
    stream = Stream(model)
    assert repr(stream) == "Stream(Sequential, at rest)"
    stream(x)
    assert repr(stream) == "Stream(Sequential, 2 layers of neurons remember)"


def test_a_readout_has_no_firing_rate() -> None:
    """Its output is a potential, which can be negative."""
    model = create_model("paralif_shd", in_channels=8, num_classes=4)
    x = torch.randn(20, 2, 8)
    with RateMeter(model) as meter:
        model(x)
    assert list(meter.rates()) == ["layers.1", "layers.3", "layers.5"]
    rates = {layer.name: layer.rate for layer in summary(model, x).layers}
    assert rates["layers.7"] is None
    assert all(rates[name] is not None for name in meter.rates())
