"""Streams carry state between calls; checkpoint() computes twice what happened once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import BatchNorm, Conv2d, Linear, NormSpike
from spikeloom.neurons import IF, LIF, PLIF, Neuron
from spikeloom.stream import Stream, checkpoint, recomputing, streaming


def small() -> nn.Sequential:
    return nn.Sequential(Linear(6, 16), PLIF(), Linear(16, 8), LIF(v_threshold=0.2, v_reset=None), Linear(8, 3))


def test_stepwise_equals_whole_through_layers() -> None:
    model = small().double()
    x = torch.randn(9, 4, 6, dtype=torch.float64) * 4
    whole = model(x)
    stream = Stream(model)
    steps = torch.cat([stream(x_t[None]) for x_t in x])
    torch.testing.assert_close(steps, whole, rtol=1e-12, atol=1e-12)
    whole.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(expected) == 7
    model.zero_grad()
    steps.square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


def test_two_streams_on_one_model_are_independent() -> None:
    model = small()
    a, b = torch.randn(5, 2, 6) * 4, torch.randn(5, 3, 6) * 4
    expected_a, expected_b = Stream(model), Stream(model)
    whole_a = [expected_a(a_t[None]) for a_t in a]
    whole_b = [expected_b(b_t[None]) for b_t in b]
    one, other = Stream(model), Stream(model)
    for t in range(5):
        assert torch.equal(one(a[t : t + 1]), whole_a[t])
        model(a)  # a plain call between does not touch them
        assert torch.equal(other(b[t : t + 1]), whole_b[t])


def test_streams_in_threads_are_independent() -> None:
    model = small().eval()
    xs = [torch.randn(30, 2, 6) * 4 for _ in range(2)]

    def steps(x: Tensor) -> Tensor:
        stream = Stream(model)
        with torch.no_grad():
            return torch.cat([stream(x_t[None]) for x_t in x])

    expected = [steps(x) for x in xs]
    barrier, results = threading.Barrier(2), [torch.zeros(0)] * 2

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            barrier.wait(timeout=30)
            return x

    waiting = nn.Sequential(model[0], Waits(), model[1], Waits(), model[2], model[3], model[4])

    def work(n: int) -> None:
        stream = Stream(waiting)
        with torch.no_grad():
            results[n] = torch.cat([stream(x_t[None]) for x_t in xs[n]])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


def test_other_threads_do_not_stream() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: seen.append(streaming()))
            thread.start()
            thread.join()
            seen.append(streaming())
            return x

    Stream(nn.Sequential(Asks(), IF()))(torch.zeros(1, 2))
    assert seen == [False, True]
    assert not streaming()


class Fails(nn.Module):
    failing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.failing:
            raise ArithmeticError("on purpose")
        return x


def test_a_call_that_raises_leaves_the_state() -> None:
    fails = Fails()
    model = nn.Sequential(first := IF(), fails, last := IF())
    stream, x = Stream(model), torch.full((1, 3), 0.75)
    stream(x)
    before = stream.state(first), stream.state(last)
    fails.failing = True
    with pytest.raises(ArithmeticError, match="on purpose"):
        stream(x)
    assert not streaming()
    fails.failing = False
    assert stream.state(first) is before[0]
    assert stream.state(last) is before[1]
    assert torch.equal(stream(x), torch.ones(1, 3))


def test_compiled_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"module 'model'.*before compile"):
        Stream(torch.compile(small()))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"module '1'"):
        Stream(nn.Sequential(Linear(2, 2), torch.compile(IF())))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("part", ["model", "neuron"])
def test_models_compiled_in_place_are_refused(part: str) -> None:
    # nn.Module.compile() leaves no wrapper; compiled code would start from rest at every call, silently.
    model = nn.Sequential(Linear(2, 2), neuron := IF())
    (model if part == "model" else neuron).compile(backend="eager")
    with pytest.raises(TypeError, match=r"through torch\.compile"):
        Stream(model)(torch.zeros(1, 1, 2))


def test_no_neuron_took_part() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = IF()

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(RuntimeError, match="none of the model's neurons"):
        Stream(Skips())(torch.zeros(1, 2))


def test_a_neuron_used_twice_is_refused() -> None:
    neuron = IF()
    model = nn.Sequential(neuron, nn.Identity(), neuron)
    model(torch.zeros(2, 3))  # without state this is harmless
    stream = Stream(model)
    with pytest.raises(RuntimeError, match=r"this IF ran twice.*its own neuron"):
        stream(torch.zeros(2, 3))
    assert stream.state(neuron) is None


@pytest.mark.parametrize("kind", [IF, LIF, PLIF])
def test_detach_cuts_the_graph(kind: type[Neuron]) -> None:
    neuron = kind()
    x = (torch.rand(4, 50) * 0.6).requires_grad_()
    kept, cut = Stream(neuron), Stream(neuron)
    kept(x[:2])
    cut(x[:2])
    assert kept.state(neuron).requires_grad
    cut.detach()
    assert not cut.state(neuron).requires_grad
    assert torch.equal(cut.state(neuron), kept.state(neuron))
    y_kept, y_cut = kept(x[2:]), cut(x[2:])
    assert torch.equal(y_kept, y_cut)
    (through,) = torch.autograd.grad(y_kept.sum(), x)
    (stopped,) = torch.autograd.grad(y_cut.sum(), x)
    assert (through[:2] != 0).any()
    assert not stopped[:2].any()
    assert torch.equal(through[2:], stopped[2:])


def test_reset_forgets() -> None:
    model = small()
    stream, x = Stream(model), torch.randn(3, 2, 6) * 4
    first = stream(x)
    assert model[3](model[:3](x)).any()
    assert not torch.equal(stream(x), first)
    stream.reset()
    assert all(stream.state(m) is None for m in model)
    assert torch.equal(stream(x), first)
    stream.reset()
    stream(torch.randn(3, 5, 6))  # another batch


def test_reading_the_state() -> None:
    model = nn.Sequential(IF(), nn.Identity())
    stream = Stream(model)
    assert stream.state(model[0]) is None
    stream(torch.full((1, 2), 0.25))
    assert stream.state(model[0]).tolist() == [0.25, 0.25]
    assert stream.state(model[1]) is None


def test_keyword_arguments_pass() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = IF()

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
            return self.neuron(x * scale), "extra"

    out, extra = Stream(Model())(torch.ones(1, 2) * 0.5, scale=2.0)
    assert out.tolist() == [[1, 1]]
    assert extra == "extra"


# --- checkpoint -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A unit with everything that remembers: batch statistics, dropout, neurons."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = Conv2d(2, 4, 3, padding=1)
        self.spike = NormSpike(4, PLIF)
        self.dropout = nn.Dropout(dropout)
        self.last = LIF(v_reset=None, detach_reset=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.spike(self.conv(x))) * 3)


class Net(nn.Module):
    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.before, self.block, self.after, self.call = IF(), block, LIF(v_threshold=0.4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self.block, self.before(x)))


def measure(call: Callable[..., Any], x: Tensor, streams: bool, detach_every: int = 0, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    net = Net(Block(dropout), call).train()
    x = x.clone().requires_grad_()
    if streams:
        stream, outputs = Stream(net), []
        for t, x_t in enumerate(x):
            outputs.append(stream(x_t[None]))
            if detach_every and (t + 1) % detach_every == 0:
                stream.detach()
        out = torch.cat(outputs)
    else:
        out = net(x)
    (out * torch.linspace(1, 2, out.numel()).view_as(out)).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    return out.detach(), x.grad, grads, buffers


def plain(module: nn.Module, *args: Any) -> Any:
    return module(*args)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("streams", "detach_every"), [(False, 0), (True, 0), (True, 2)])
def test_checkpoint_changes_nothing(streams: bool, detach_every: int, dropout: float) -> None:
    x = torch.randn(5, 3, 2, 4, 4) * 3
    expected = measure(plain, x, streams, detach_every, dropout)
    got = measure(checkpoint, x, streams, detach_every, dropout)
    assert expected[0].sum() > 20
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    tracked = got[3]["block.spike.norm.num_batches_tracked"]
    assert tracked == (5 if streams else 1)


def test_gradients_flow_through_the_carried_state() -> None:
    # Without the state's gradient the early steps would get nothing from a loss on the last one.
    net = Net(Block(), checkpoint).eval()
    x = (torch.rand(4, 2, 2, 4, 4) * 2).requires_grad_()
    stream = Stream(net)
    outputs = [stream(x_t[None]) for x_t in x]
    (grad,) = torch.autograd.grad(outputs[-1].sum(), x)
    assert (grad[0] != 0).any()


def test_recomputation_is_announced() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(recomputing())
            return x.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(Asks(), x).sum().backward()
    assert seen == [False, True]
    assert not recomputing()


def test_checkpoint_without_gradients() -> None:
    net = Net(Block(), checkpoint).eval()
    x = torch.rand(3, 2, 2, 4, 4) * 2
    with torch.no_grad():
        stream = Stream(net)
        steps = torch.cat([stream(x_t[None]) for x_t in x])
        torch.testing.assert_close(steps, net(x))


def test_a_neuron_used_twice_is_refused_across_checkpoint() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron = IF()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.neuron, self.neuron(x))

    with pytest.raises(RuntimeError, match="ran twice"):
        Stream(Twice())(torch.zeros(1, 2, requires_grad=True))


def test_nested_checkpoints() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.neuron = nn.Sequential(BatchNorm(2), IF()), LIF()

        def forward(self, x: Tensor) -> Tensor:
            return self.neuron(checkpoint(self.inner, x) * 2)

    results = []
    x = torch.randn(4, 3, 2, 2, 2)
    for nested in (False, True):
        torch.manual_seed(2)
        outer = Outer().train()
        stream, y = Stream(outer if not nested else Net(outer, checkpoint)), x.clone().requires_grad_()
        if not nested:
            stream = Stream(Net(outer, plain))
        out = torch.cat([stream(y_t[None]) for y_t in y])
        out.sum().backward()
        results.append((out.detach(), y.grad, outer.inner[0].running_var.clone()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
