"""Two leaky filters in a row: the recurrence, the paper's transforms and the kernel are one function."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers.pairwise import pairwise
from torch import Tensor

from spikeloom.ops import backend, leaky_filter, leaky_filter_fft, leaky_filter_reference

filter_module = sys.modules[leaky_filter.__module__]
combined_kernel = filter_module.combined_kernel

DECAY = 0.951229424500714  # exp(-1 / 20): 20 ms in steps of 1 ms


def constants(kind: str, step: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """alpha and beta: scalars, one value a feature (the last axis), one of each kind, one a neuron."""
    alpha, beta = torch.tensor(0.7), torch.tensor(0.9)
    features = torch.linspace(0.0, 0.95, step[-1]), torch.linspace(0.99, 0.2, step[-1])
    return {
        "scalar": (alpha, beta),
        "none": (torch.tensor(0.0), beta),
        "feature": features,
        "mixed": (alpha, features[1]),
        "neuron": (torch.rand(step), torch.rand(step)),
    }[kind]


def run(
    name: str, x: Tensor, decays: tuple[Tensor, Tensor], state: Tensor | None, grad: Tensor, grad_last: Tensor | None
) -> dict[str, Tensor]:
    """Outputs and every gradient of one backend."""
    x = x.detach().requires_grad_()
    state = None if state is None else state.detach().requires_grad_()
    alpha, beta = (d.detach().clone().requires_grad_() for d in decays)
    with backend(name):  # pyright: ignore[reportArgumentType]
        m, last = leaky_filter(x, alpha, beta, state, grad_last is not None)
    outputs, grads = [m], [grad]
    if grad_last is not None:
        assert last is not None
        outputs, grads = [m, last], [grad, grad_last]
    torch.autograd.backward(outputs, grads)
    out: dict[str, Tensor | None] = {"m": m, "x": x.grad, "alpha": alpha.grad, "beta": beta.grad}
    if grad_last is not None:
        out["last"] = last
    if state is not None:
        out["state"] = state.grad
    return {key: value.detach() for key, value in out.items() if value is not None}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Currents, initial state, and gradients on membranes and last state."""
    return (
        torch.randn(shape).to(dtype),
        torch.randn(2, *shape[1:]),
        torch.randn(shape).to(dtype),
        torch.randn(2, *shape[1:]),
    )


def terms(x: Tensor, state: Tensor | None, grad: Tensor, grad_last: Tensor | None, alpha: Tensor, beta: Tensor) -> Any:
    """What the gradients of learned constants sum: their terms' sizes, from the same filters on absolute values."""
    m, last = leaky_filter_reference(x.float().abs(), alpha, beta, None if state is None else state.abs())
    g = leaky_filter_reference(
        grad.float().abs().flip(0), alpha, beta, None if grad_last is None else grad_last.abs().flip(0)
    )[0]
    size = m.abs().amax() + last.abs().amax() + x.float().abs().amax() / (1 - alpha.max().clamp_max(0.99))
    return (g.sum() + 1 + (0 if grad_last is None else grad_last.abs().sum())) * size


def same(fast: dict[str, Tensor], slow: dict[str, Tensor], tracks: Any, size: float) -> None:
    assert fast.keys() == slow.keys()
    low = fast["m"].dtype == torch.bfloat16
    assert fast["m"].dtype == slow["m"].dtype == fast["x"].dtype
    assert torch.equal(fast["m"], slow["m"])
    if "last" in fast:
        assert torch.equal(fast["last"], slow["last"])
    # bfloat16 gradients are rounded once more, on either side of a tie perhaps.
    assert tracks(fast["x"], slow["x"]) < (2**-7 if low else 1e-5)
    if "state" in fast:
        assert tracks(fast["state"], slow["state"]) < 1e-5
    for key in ("alpha", "beta"):
        # Sums over all elements and steps, whose terms cancel: rounding is relative to the terms.
        assert fast[key].shape == slow[key].shape
        assert (fast[key] - slow[key]).abs().max() <= 1e-6 * size if fast[key].numel() else True, key


def compare(
    tracks: Any, x: Tensor, decays: tuple[Tensor, Tensor], state: Tensor | None, grad: Tensor, grad_last: Tensor | None
) -> None:
    arguments = x, decays, state, grad, grad_last
    size = float(terms(x, state, grad, grad_last, *decays)) if x.numel() else 0.0
    same(run("native", *arguments), run("reference", *arguments), tracks, size)


DTYPES = (torch.float32, torch.bfloat16)
KINDS = ["scalar", "none", "feature", "mixed", "neuron"]


@pytest.mark.parametrize(*pairwise(kind=KINDS, dtype=DTYPES, carried=(False, True), T=(1, 2, 7, 33)))
def test_native_equals_reference(
    native: Any, tracks: Any, kind: str, dtype: torch.dtype, carried: bool, T: int
) -> None:
    x, state, grad, grad_last = inputs((T, 3, 5, 7), dtype)
    decays = constants(kind, (3, 5, 7))
    compare(tracks, x, decays, state if carried else None, grad, grad_last if carried else None)


LAYOUTS = {
    "channels_last": lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "time_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every_second_channel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "repeated": lambda x: x[0].expand(x.shape),
    "repeated_channels_last": lambda x: x[0].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "broadcast_over_batch": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("kind", ["scalar", "feature", "neuron"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(native: Any, tracks: Any, name: str, kind: str, T: int) -> None:
    x, state, grad, grad_last = inputs((T, 2, 3, 5, 7))
    decays = constants(kind, (2, 3, 5, 7))
    x = LAYOUTS[name](x)
    for other in ("channels_last", "time_last"):
        compare(tracks, x, decays, LAYOUTS[other](state), LAYOUTS[other](grad), LAYOUTS[other](grad_last))


def test_channels_last_stays(native: Any) -> None:
    x = LAYOUTS["channels_last"](torch.randn(4, 2, 3, 5, 7)).requires_grad_()
    m, last = leaky_filter(x, 0.5, 0.9, None, True)
    assert last is not None
    assert m.stride() == x.stride()
    assert last[0].stride() == x.stride()[1:]
    m.sum().backward()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("size", [1, 63, 511, 512, 513, 1025, 40_009])
@pytest.mark.parametrize("T", [1, 5, 33])
def test_any_size(native: Any, tracks: Any, size: int, T: int) -> None:
    x, state, grad, grad_last = inputs((T, size))
    compare(tracks, x, constants("scalar", (size,)), state, grad, grad_last)


def test_long_sequence_with_learned_constants(native: Any, tracks: Any) -> None:
    x, state, grad, grad_last = inputs((1100, 131))
    compare(tracks, x, constants("feature", (131,)), state, grad, grad_last)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("shape", [(4, 2, 0, 5), (3, 0), (1, 0, 2)], ids=str)
def test_empty_space(native: Any, name: str, shape: tuple[int, ...]) -> None:
    x, state, grad, grad_last = inputs(shape)
    got = run(name, x, constants("scalar", (1,)), state, grad, grad_last)
    assert got["m"].shape == got["x"].shape == shape
    assert got["last"].shape == got["state"].shape == (2, *shape[1:])
    assert got["alpha"] == got["beta"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_instruction_level(native: Any, tracks: Any, dtype: torch.dtype) -> None:
    x, state, grad, grad_last = inputs((7, 20_011), dtype)
    for level in native.levels():
        native.set_level(level)
        compare(tracks, x, constants("neuron", (20_011,)), state, grad, grad_last)


@pytest.mark.parametrize("kind", ["scalar", "neuron"])
def test_number_of_threads_changes_nothing(native: Any, kind: str) -> None:
    x, state, grad, grad_last = inputs((6, 50_021))
    decays = constants(kind, (50_021,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("native", x, decays, state, grad, grad_last))
    for other in results[1:]:
        for key, value in results[0].items():
            if key in ("alpha", "beta") and kind == "scalar":
                # PyTorch's own sum over the neurons, in double precision before it is rounded.
                torch.testing.assert_close(value, other[key], rtol=1e-6, atol=0)
            else:
                assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("shape", [(5, 3, 1), (3, 2, 3, 5, 7), (4, 20_011)], ids=str)
@pytest.mark.parametrize("kind", ["scalar", "feature"])
def test_every_output_is_written(
    native: Any, dirty_memory: None, tracks: Any, kind: str, shape: tuple[int, ...]
) -> None:
    assert torch.empty(3).isnan().all()
    x, state, grad, grad_last = inputs(shape)
    compare(tracks, x, constants(kind, shape[1:]), state, grad, grad_last)
    compare(tracks, x, constants(kind, shape[1:]), None, grad, None)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_last_state_alone(native: Any, tracks: Any, name: str) -> None:
    x, state, _, grad_last = inputs((5, 40))
    a, b = x.clone().requires_grad_(), state.clone().requires_grad_()
    with backend(name):  # pyright: ignore[reportArgumentType]
        m, last = leaky_filter(a, 0.6, 0.8, b, True)
    assert last is not None
    assert tracks(m[-1], last[1]) == 0
    last.backward(grad_last)
    assert a.grad is not None
    assert b.grad is not None
    # By hand: I[T] = alpha^T I0 + ..., M[T] = beta^T M0 + (combined kernel) alpha I0 + ...
    kernel = combined_kernel(0.6, 0.8, 5).float()
    powers = 0.6 ** torch.arange(5)
    for t in range(5):
        expected = powers[4 - t] * grad_last[0] + kernel[4 - t] * grad_last[1]
        torch.testing.assert_close(a.grad[t], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.grad[0], 0.6 * a.grad[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.grad[1], 0.8**5 * grad_last[1], rtol=1e-5, atol=1e-6)


def test_a_state_of_another_batch_is_refused(native: Any) -> None:
    # A kernel that trusted it would read other memory.
    for name in ("native", "reference"):
        with backend(name), pytest.raises((ValueError, RuntimeError)):
            leaky_filter(torch.zeros(3, 50, 4), 0.5, 0.5, torch.zeros(2, 3, 4), True)


# --- three forms of one function --------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(DECAY, DECAY), (0.0, DECAY), (0.3679, 0.6065), (0.951, 0.95)],
    ids=["20ms", "no_synapse", "fast", "close"],
)
def test_scan_is_the_transform_is_the_definition(native: Any, alpha: float, beta: float, T: int) -> None:
    x = torch.rand(T, 4, 6)
    exact, _ = leaky_filter_reference(x.double(), alpha, beta)
    bound = 2e-6 * exact.abs().max()
    with backend("native"):
        fast, _ = leaky_filter(x, alpha, beta)
    for m in (fast, leaky_filter_fft(x, alpha, beta), leaky_filter_reference(x, alpha, beta)[0]):
        assert m.shape == x.shape
        assert (m.double() - exact).abs().max() <= bound
    double = leaky_filter_fft(x.double(), alpha, beta)
    assert (double - exact).abs().max() <= 1e-13 * max(1.0, exact.abs().max().item())


def test_transform_of_twice_the_length_wraps() -> None:
    """The released padding, in double precision on uniform inputs: the errors of the documents' table."""
    measured = {}
    for T in (10, 50, 100, 200, 500):
        x = torch.rand(T, 200, dtype=torch.float64)
        exact, _ = leaky_filter_reference(x, DECAY, DECAY)
        wrapped = leaky_filter_fft(x, DECAY, DECAY, padding=2 * T)
        measured[T] = ((wrapped - exact).abs().max() / exact.abs().max()).item()
        assert (leaky_filter_fft(x, DECAY, DECAY) - exact).abs().max() < 1e-12
        assert (leaky_filter_fft(x, DECAY, DECAY, padding=3 * T - 2) - exact).abs().max() < 1e-12
        assert (leaky_filter_fft(x, DECAY, DECAY, padding=3 * T + 5) - exact).abs().max() < 1e-12
    assert measured[50] > 0.05
    assert measured[10] > 0.1
    assert measured[100] > 1e-3
    assert 1e-12 < measured[500] < 1e-6


@pytest.mark.parametrize("padding", [None, "2T"])
def test_a_wrong_padding_is_not_causal(padding: str | None) -> None:
    T = 50
    x = torch.rand(T, 3, dtype=torch.float64)
    later = x.clone()
    later[T // 2 :] += 1
    length = None if padding is None else 2 * T
    change = (leaky_filter_fft(later, DECAY, DECAY, length) - leaky_filter_fft(x, DECAY, DECAY, length))[: T // 2]
    assert (change.abs().max() > 1e-2) if padding else (change.abs().max() < 1e-12)


@pytest.mark.parametrize("path", ["native", "reference"])
def test_causality(native: Any, path: str) -> None:
    x = torch.randn(9, 30, requires_grad=True)
    with backend(path):  # pyright: ignore[reportArgumentType]
        m, _ = leaky_filter(x, 0.6, 0.8)
        for t in range(9):
            (grad,) = torch.autograd.grad(m[t].sum(), x, retain_graph=True)
            assert not grad[t + 1 :].any()
            assert grad[: t + 1].all()
            later = x.detach().clone()
            later[t + 1 :] = 7.0
            assert torch.equal(leaky_filter(later, 0.6, 0.8)[0][: t + 1], m[: t + 1])


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.9, 0.5), (0.5, 0.9), (0.7, 0.7), (0.0, 0.8), (0.8, 0.0), (DECAY, DECAY)]
)
def test_combined_kernel(alpha: float, beta: float) -> None:
    T = 40
    impulse = torch.zeros(T, 1, dtype=torch.float64)
    impulse[0] = 1
    response, _ = leaky_filter_reference(impulse, alpha, beta)
    torch.testing.assert_close(combined_kernel(alpha, beta, T), response[:, 0], rtol=1e-12, atol=1e-15)
    if alpha == 0:
        single = (1 - beta) * beta ** torch.arange(T, dtype=torch.float64)
        torch.testing.assert_close(response[:, 0], single, rtol=1e-12, atol=0)


def test_without_a_synapse_it_is_one_filter(native: Any) -> None:
    x = torch.randn(20, 40)
    m, membrane = torch.empty_like(x), torch.zeros(40)
    for t in range(20):
        membrane = 0.75 * membrane + 0.25 * x[t]
        m[t] = membrane
    for name in ("native", "reference"):
        with backend(name):
            torch.testing.assert_close(leaky_filter(x, 0.0, 0.75)[0], m, rtol=1e-6, atol=1e-7)


def test_constants_of_features(native: Any) -> None:
    """A value a feature is what as many filters of one value give; so are the gradients."""
    x, grad = torch.randn(12, 3, 4), torch.randn(12, 3, 4)
    alpha, beta = torch.tensor([0.0, 0.3, 0.9, 0.7]), torch.tensor([0.5, 0.99, 0.9, 0.0])
    for name in ("native", "reference"):
        together = run(name, x, (alpha, beta), None, grad, None)
        for f in range(4):
            alone = run(name, x[..., f], (alpha[f], beta[f]), None, grad[..., f], None)
            torch.testing.assert_close(together["m"][..., f], alone["m"], rtol=1e-6, atol=1e-7)
            for key in ("alpha", "beta"):
                torch.testing.assert_close(together[key][f], alone[key], rtol=1e-4, atol=1e-5)
    fft = leaky_filter_fft(x, alpha, beta)
    torch.testing.assert_close(fft, together["m"], rtol=1e-5, atol=1e-5)


def test_gradients_of_the_definition() -> None:
    x, state = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    alpha, beta = torch.rand(3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    arguments = [t.requires_grad_() for t in (x, alpha, beta, state)]
    assert torch.autograd.gradcheck(leaky_filter_reference, arguments)
    assert torch.autograd.gradcheck(leaky_filter_fft, arguments[:3])


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "channels_last", "repeated"])
@pytest.mark.parametrize("carried", [True, False], ids=["state", "rest"])
def test_custom_ops_obey_the_rules(native: Any, carried: bool, how: str) -> None:
    x, state, grad, grad_last = inputs((3, 2, 3, 4, 5))
    if how != "plain":
        x = LAYOUTS[how](x)
    ops = torch.ops.spikeloom
    for kind in ("scalar", "neuron"):
        alpha, beta = (d.clone().requires_grad_() for d in constants(kind, (2, 3, 4, 5)))
        x = x.detach().requires_grad_()
        start = state.clone().requires_grad_() if carried else None
        torch.library.opcheck(ops.leaky_filter.default, (x, alpha, beta, start, carried))
        fixed = x.detach(), alpha.detach(), beta.detach(), state if carried else None
        for learn in (True, False):
            torch.library.opcheck(
                ops.leaky_filter_backward.default, (grad, grad_last if carried else None, *fixed, learn)
            )
