"""Transforms of `torch.func`, forward-mode and second derivatives, `torch.jit.trace` and ONNX through every neuron."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.neuron_variants import STOCHASTIC, VARIANTS, C, N, T, inputs, make, seeded
from torch import Tensor, nn
from torch.autograd import forward_ad

from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv2d, MaxPool2d, NormSpike, PadShortcut
from spikeloom.neurons import IF, LIF, PLIF
from spikeloom.ops import backend
from spikeloom.ops.conv import takes
from spikeloom.surrogates import ATan

DETERMINISTIC = [v for v in VARIANTS if v not in STOCHASTIC]


def weighted(out: Tensor) -> Tensor:
    """A loss with another weight for every element."""
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def gradient(neuron: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The reference's gradient by ordinary backpropagation."""
    x = x.detach().clone().requires_grad_()
    with backend("reference"):
        (grad,) = torch.autograd.grad(seeded(lambda: weighted(neuron(x))), x)
    return grad


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_is_that_of_backpropagation(variant: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    got = seeded(lambda: torch.func.grad(lambda y: weighted(neuron(y)))(x))
    expected = gradient(neuron, x)
    assert expected.any()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_grad_by_hand() -> None:
    """One step of IF: the surrogate's derivative at x - 1."""
    x = inputs(1, N, C)
    got = torch.func.grad(lambda y: IF()(y).sum())(x)
    torch.testing.assert_close(got, ATan().derivative(x - 1))


@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_vmap_is_a_loop(variant: str) -> None:
    neuron, xs = make(variant), inputs(3, T, N, C)
    with torch.no_grad():
        expected = torch.stack([neuron(x) for x in xs])
        torch.testing.assert_close(torch.func.vmap(neuron)(xs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", sorted(STOCHASTIC))
def test_vmap_of_random_neurons(variant: str) -> None:
    neuron, xs = make(variant), inputs(3, T, N, C)
    out = torch.func.vmap(neuron, randomness="different")(xs)
    assert torch.equal(out, out.round().clamp(0, 1))
    assert 0 < out.sum() < out.numel()


@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_gradients_of_each_sample(variant: str) -> None:
    """`vmap(grad(...))` over samples, parameters given from outside."""
    neuron, x = make(variant), inputs(T, N, C)
    values = {name: p.detach() for name, p in neuron.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return weighted(torch.func.functional_call(neuron, parameters, (sample[:, None],)))

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 1))(values, x)
    for n in range(N):
        sample = x[:, n].clone().requires_grad_()
        neuron.zero_grad()
        with backend("reference"):
            weighted(neuron(sample[:, None])).backward()
        torch.testing.assert_close(got[1][n], sample.grad, rtol=1e-4, atol=1e-6)
        for name, p in neuron.named_parameters():
            torch.testing.assert_close(got[0][name][n], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", DETERMINISTIC)
def test_an_ensemble_in_one_call(variant: str) -> None:
    neurons, x = [make(variant), make(variant)], inputs(T, N, C)
    for p in neurons[1].parameters():
        p.data += 0.25
    parameters, buffers = torch.func.stack_module_state(neurons)  # pyright: ignore[reportArgumentType]

    def call(own: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(neurons[0], (own, buffers), (x,))

    with torch.no_grad():
        expected = torch.stack([neuron(x) for neuron in neurons])
        if not parameters and not buffers:
            pytest.skip("nothing to stack")
        got = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode_is_reverse_mode(variant: str, grads: bool) -> None:
    """By `torch.func.jvp` and by dual numbers, with and without a graph: never a tangent of zeros."""
    neuron, x = make(variant), inputs(T, N, C)
    tangent = torch.randn_like(x)
    with torch.set_grad_enabled(grads):
        out, by_func = seeded_pair(lambda: torch.func.jvp(neuron, (x,), (tangent,)))
        with forward_ad.dual_level():
            dual = seeded(lambda: neuron(forward_ad.make_dual(x, tangent)))
            by_dual = forward_ad.unpack_dual(dual).tangent
    with backend("reference"):
        assert torch.equal(out, seeded(lambda: neuron(x)))
    expected = (gradient(neuron, x) * tangent).sum()
    for got in (by_func, by_dual):
        torch.testing.assert_close(weighted(got), expected, rtol=2e-4, atol=1e-5)


def seeded_pair(function: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return function()


def test_a_unit_and_a_network_are_transformed() -> None:
    net = nn.Sequential(Conv2d(3, 4, 3), NormSpike(4, LIF), MaxPool2d(2), PadShortcut(4, 6), LIF()).eval()
    x = inputs(T, 2, 3, 8, 8)
    got = torch.func.grad(lambda y: weighted(net(y)))(x)
    torch.testing.assert_close(got, gradient(net, x), rtol=1e-4, atol=1e-6)


def test_kernels_that_were_asked_for_by_name_say_so() -> None:
    x = inputs(T, N, C)
    for name in ("native", "compiled"):
        with backend(name), pytest.raises(UsageError, match=rf"scan: torch\.func .*leave out backend\('{name}'\)"):
            torch.func.grad(lambda y: LIF()(y).sum())(x)


# --- second derivatives -----------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "NormSpike": lambda: NormSpike(8, LIF),
    "NormSpike-eval": lambda: NormSpike(8, LIF).eval(),
    "MaxPool2d": lambda: MaxPool2d(2),
    "depthwise": lambda: Conv2d(8, 8, 3, groups=8),
    "PadShortcut": lambda: PadShortcut(8, 12),
    "Conv2d": lambda: Conv2d(64, 64, 3, padding=1, bias=False),
}


def layer(name: str) -> tuple[nn.Module, Tensor]:
    """A layer or neuron, and an input on which it has a native kernel."""
    if name in VARIANTS:
        return make(name), inputs(T, N, C)
    images, channels, side = (8, 64, 16) if name == "Conv2d" else (2, 8, 6)
    x = inputs(T, images, side, side, channels).movedim(-1, 2)  # channels-last memory
    return LAYERS[name](), (x > 1).float() if name == "Conv2d" else x


def test_the_convolution_is_ours() -> None:
    conv, x = layer("Conv2d")
    assert isinstance(conv, Conv2d)
    assert takes(x.flatten(0, 1), conv.weight, 1, 1)


ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": Tensor.sum,
    "weighted": weighted,
    "square": lambda out: out.square().sum(),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", [*VARIANTS, *LAYERS])
def test_second_derivatives_of_kernels_are_refused(native: Any, name: str, end: str) -> None:
    """Whatever the loss, and whichever way they are asked for; the gradient itself is right."""
    module, x = layer(name)
    if name == "LeakyIntegrator" and end != "square":
        pytest.skip("linear: its gradient is a constant")
    if name in ("MaxPool2d", "depthwise", "Conv2d", "PadShortcut") and end != "square":
        pytest.skip("the gradient of a linear loss does not depend on the input")
    x.requires_grad_()
    values = [x, *module.parameters()]

    def grads() -> list[Tensor]:
        found = torch.autograd.grad(seeded(lambda: ENDS[end](module(x))), values, create_graph=True, allow_unused=True)
        return [g for g in found if g is not None]

    first = grads()
    plain = torch.autograd.grad(seeded(lambda: ENDS[end](module(x))), values, allow_unused=True)
    for a, b in zip(first, [g for g in plain if g is not None], strict=True):
        assert torch.equal(a, b)
    message = r"no second derivative.*`with spikeloom\.backend\('reference'\):`"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(sum(g.square().sum() for g in first), values, allow_unused=True)
    with pytest.raises(RuntimeError, match=message):
        sum((g.square().sum() for g in grads()), torch.zeros(())).backward()


@pytest.mark.parametrize("name", ["depthwise", "Conv2d"])
def test_second_derivatives_of_kernels_with_weights(native: Any, name: str) -> None:
    """The weights' gradient depends on the input even where the loss is linear."""
    module, x = layer(name)
    x.requires_grad_()
    grads = torch.autograd.grad(weighted(module(x)), list(module.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].sum(), x)


def test_second_derivatives_under_the_profiler(native: Any) -> None:
    """There the op is a custom op."""
    x = inputs(T, N, C).requires_grad_()
    with torch.profiler.profile():
        (grad,) = torch.autograd.grad(LIF()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backend\('reference'\)"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.slow
def test_second_derivatives_of_compiled_code() -> None:
    x = inputs(12, N, C).requires_grad_()
    with backend("compiled"):
        (grad,) = torch.autograd.grad(LIF()(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"backend\('reference'\)"):
            torch.autograd.grad(grad.sum(), x)
    loss = torch.compile(LIF())(x).sum()

    def twice() -> None:
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)

    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):  # PyTorch's own
        twice()


@pytest.mark.parametrize("variant", ["IF", "LIF", "PLIF", "KLIF", "PSN", "SlidingPSN", "PSU", "RPSU", "SynapticLIF"])
def test_second_derivatives_of_the_reference(variant: str) -> None:
    """Against differences of the gradient, in float64, by `torch.autograd` and by `torch.func`."""
    neuron, x = make(variant).double(), inputs(T, 1, C, dtype=torch.float64)
    direction = torch.randn_like(x)

    def slope(y: Tensor) -> Tensor:
        """The derivative of a loss in a direction."""
        (grad,) = torch.autograd.grad(weighted(neuron(y)), y, create_graph=True)
        return (grad * direction).sum()

    y = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(slope(y), y)  # float64 takes the reference
    product = torch.func.jvp(torch.func.grad(lambda y: weighted(neuron(y))), (x,), (direction,))[1]
    torch.testing.assert_close(product, got, rtol=1e-9, atol=1e-12)
    assert got.any()
    step = 1e-6
    for index in ((0, 0, 0), (T // 2, 0, 1), (T - 1, 0, C - 1)):
        shift = torch.zeros_like(x)
        shift[index] = step
        beyond, before = ((x + sign * shift).requires_grad_() for sign in (1, -1))
        expected = (slope(beyond) - slope(before)) / (2 * step)
        torch.testing.assert_close(got[index], expected.detach(), rtol=1e-4, atol=1e-6)


# --- torch.jit.trace and ONNX -----------------------------------------------------------------------------------------

# PyTorch warns that both are deprecated, and of every shape that a trace fixes.
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trace_computes_on_other_inputs(dirty_memory: None, variant: str, grads: bool) -> None:
    neuron, x, other = make(variant), inputs(T, N, C), inputs(T, N, C).flip(0)
    with torch.set_grad_enabled(grads):
        traced: Any = torch.jit.trace(neuron, x, check_trace=False)
    if not grads:  # with a graph, RecurrentLIF's surrogate is a function of Python
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        traced = torch.jit.load(file)
    with backend("reference" if VARIANTS[variant][0] == "RecurrentLIF" else "native"):
        assert torch.equal(seeded(lambda: traced(other)), seeded(lambda: neuron(other)))
    if grads:
        got, expected = (other.clone().requires_grad_() for _ in range(2))
        seeded(lambda: weighted(traced(got))).backward()
        seeded(lambda: weighted(neuron(expected))).backward()
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)


@quiet
@pytest.mark.parametrize("training", [False, True])
def test_a_trace_of_a_network(dirty_memory: None, training: bool) -> None:
    net = nn.Sequential(Conv2d(3, 4, 3), NormSpike(4, PLIF), MaxPool2d(2), PadShortcut(4, 6), BatchNorm(6), LIF())
    net.train(training)
    x = inputs(T, 2, 8, 8, 3).movedim(-1, 2)
    with torch.no_grad():
        traced: Any = torch.jit.trace(net, x, check_trace=False)
        assert torch.equal(traced(-x), net(-x))


@quiet
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v in ("LIF", "PSN") else pytest.mark.slow) for v in DETERMINISTIC]
)
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_by_torch(tmp_path: Path, variant: str, dynamo: bool) -> None:
    """Both of PyTorch's exporters write the steps in ONNX's own operators."""
    runtime: Any = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    neuron, x = make(variant), inputs(T, N, C)
    torch.onnx.export(neuron, (x,), str(tmp_path / "net.onnx"), dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: (-x).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, neuron(-x).numpy(), rtol=1e-5, atol=1e-6)
