"""The recorder: names, values, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import Conv2d, Flatten, Linear, NormSpike
from spikeloom.neurons import IF, LIF
from spikeloom.record import RateMeter, Recorder
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
