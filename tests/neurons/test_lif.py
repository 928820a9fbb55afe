"""IF, LIF and PLIF: their published equations, and what every registered neuron promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.layers import COMBINE
from spikeloom.neurons import IF, LIF, PLIF, Neuron
from spikeloom.ops import backend, scan
from spikeloom.stream import Stream
from spikeloom.surrogates import SURROGATES, ATan, FastSigmoid, FlatATan, Rectangular, Surrogate, Triangle

SEQUENTIAL = {"IF": IF, "LIF": LIF, "PLIF": PLIF}

# --- the published rows, each written as its source writes it, in double precision ------------------------------------


def row_000(x: list[float], beta: float, u_th: float, v_reset: float = 0.0) -> list[float]:
    h, out = v_reset, []
    for x_t in x:
        u = h + x_t
        s = float(u >= u_th)
        h = v_reset * s + beta * u * (1 - s)
        out.append(s)
    return out


def row_001_if(x: list[float], v_th: float = 1.0) -> list[float]:
    v, out = 0.0, []
    for x_t in x:
        h = v + x_t
        s = float(h >= v_th)
        v = h * (1 - s)
        out.append(s)
    return out


def row_001_lif(x: list[float], tau: float, v_th: float = 1.0, v_reset: float = 0.0) -> list[float]:
    v, out = v_reset, []
    for x_t in x:
        h = v + (x_t - (v - v_reset)) / tau
        s = float(h >= v_th)
        v = h * (1 - s) + v_reset * s
        out.append(s)
    return out


def row_003(x: list[float], k_tau: float, v_th: float) -> list[float]:
    u, o, out = 0.0, 0.0, []
    for x_t in x:
        u = k_tau * u * (1 - o) + x_t
        o = float(u >= v_th)
        out.append(o)
    return out


def row_tet(x: list[float], decay: float = 0.5, threshold: float = 1.0) -> list[float]:
    mem, out = 0.0, []
    for x_t in x:
        mem = decay * mem + x_t
        spike = float(mem - threshold >= 0)
        mem = (1 - spike) * mem
        out.append(spike)
    return out


def row_sltt(x: list[float], tau: float) -> list[float]:
    v, out = 0.0, []
    for x_t in x:
        v = v * (1 - 1 / tau) + x_t
        s = float(v >= 1)
        v -= s
        out.append(s)
    return out


ROWS: dict[str, tuple[Callable[[], Neuron], Callable[[list[float]], list[float]]]] = {
    "000": (lambda: LIF(2.0, decay_input=False), lambda x: row_000(x, 0.5, 1.0)),
    "001_IF": (IF, row_001_if),
    "001_LIF": (lambda: LIF(2.0), lambda x: row_001_lif(x, 2.0)),
    "001_LIF_reset_below": (lambda: LIF(2.0, v_reset=-0.25), lambda x: row_001_lif(x, 2.0, v_reset=-0.25)),
    "001_PLIF": (lambda: PLIF(2.0), lambda x: row_001_lif(x, 2.0)),
    "003": (lambda: LIF(4 / 3, decay_input=False, v_threshold=0.6), lambda x: row_003(x, 0.25, 0.6)),
    "MS": (lambda: LIF(4 / 3, decay_input=False, v_threshold=0.5), lambda x: row_003(x, 0.25, 0.5)),
    "TET": (lambda: LIF(2.0, decay_input=False, detach_reset=False), row_tet),
    "SLTT": (lambda: LIF(1.1, decay_input=False, v_reset=None), lambda x: row_sltt(x, 1.1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", ROWS)
def test_published_rows(dyadic: Any, row: str, dtype: torch.dtype) -> None:
    neuron, loop = ROWS[row]
    # 4/3 is not a binary fraction: 1 - 1/tau then misses 1/4 by one rounding, and a tie could go either way.
    x = dyadic(8, 300, high=3.0, dtype=dtype)
    if row in ("003", "MS", "SLTT"):
        x = torch.randn(8, 300, dtype=dtype)
    spikes = neuron()(x)
    expected = torch.tensor([loop(x[:, n].tolist()) for n in range(300)], dtype=dtype).T
    assert 100 < expected.sum() < 2000
    assert torch.equal(spikes, expected)


# --- equivalences -----------------------------------------------------------------------------------------------------


def test_rows_000_and_003_are_one_recurrence(dyadic: Any) -> None:
    x = dyadic(12, 100)
    for n in range(100):
        assert row_000(x[:, n].tolist(), 0.5, 1.0) == row_003(x[:, n].tolist(), 0.5, 1.0)


@pytest.mark.parametrize("tau", [1.5, 2.0, 5.0])
def test_lif_is_row_000_on_a_scaled_input(tau: float) -> None:
    x = torch.randn(20, 200, dtype=torch.float64) + 0.5
    a, b = LIF(tau)(x), LIF(tau, decay_input=False)(x / tau)
    assert a.sum() > 20
    assert torch.equal(a, b)


def test_if_and_memoryless_limits(dyadic: Any) -> None:
    x = dyadic(12, 100)
    charge = {"v_threshold": 1.0, "v_reset": 0.0, "surrogate": ATan(), "detach_reset": True}
    assert torch.equal(IF()(x), scan(x, None, 1.0, 1.0, **charge)[0])
    assert torch.equal((x >= 1).float(), scan(x, None, 0.0, 1.0, **charge)[0])


def test_plif_starts_as_lif() -> None:
    x = torch.randn(9, 50, dtype=torch.float64)
    neuron = PLIF(2.0)
    assert neuron.w.item() == 0
    assert torch.equal(neuron(x), LIF(2.0)(x))
    for tau in (1.25, 2.0, 7.0):
        neuron = PLIF(tau)
        assert neuron.w.item() == pytest.approx(-math.log(tau - 1), rel=1e-6, abs=1e-7)
        assert 1 / torch.sigmoid(neuron.w).item() == pytest.approx(tau, rel=1e-5)
        assert torch.equal(neuron(x), LIF(tau)(x))
    assert sum(p.numel() for p in neuron.parameters()) == 1
    assert neuron.w.shape == ()


def test_plif_learns_its_time_constant() -> None:
    # The gradient of w through both decay and gain, against the soft scan's numeric derivative by hand.
    x = torch.randn(6, 40, dtype=torch.float64)
    neuron = PLIF(3.0, detach_reset=False).double()
    upstream = torch.randn_like(x)
    neuron(x).backward(upstream)
    rate = torch.sigmoid(neuron.w.detach()).requires_grad_()
    spikes, _ = scan(x, None, 1 - rate, rate, 1.0, 0.0, ATan(), False)
    (grad_rate,) = torch.autograd.grad(spikes, rate, upstream)
    assert neuron.w.grad is not None
    torch.testing.assert_close(neuron.w.grad, grad_rate * rate.detach() * (1 - rate.detach()))
    assert neuron.w.grad != 0


def test_constant_input_settles() -> None:
    x = torch.full((200, 1), 0.4, dtype=torch.float64)
    assert LIF(2.0).potentials(x)[-1].item() == pytest.approx(0.4)
    assert LIF(2.0, decay_input=False).potentials(x)[-1].item() == pytest.approx(0.8)
    # 001 never fires at or below its threshold; 000 does above u_th (1 - beta).
    below = torch.tensor([[0.5, 0.9, 1.0]], dtype=torch.float64).expand(16, 3)
    assert not LIF(2.0)(below).any()
    fires = LIF(2.0, decay_input=False)(torch.tensor([[0.45, 0.55]], dtype=torch.float64).expand(40, 2)).any(0)
    assert fires.tolist() == [False, True]


# --- identity transmission --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_threshold", [0.5, 1.0, 0.01])
def test_if_transmits_spikes_unchanged(v_threshold: float) -> None:
    s = torch.randint(0, 2, (50, 200)).float()
    assert torch.equal(IF(v_threshold)(s), s)


def test_if_above_one_does_not_transmit() -> None:
    s = torch.ones(4, 1)
    assert IF(1.25)(s).flatten().tolist() == [0, 1, 0, 1]


def test_lif_never_fires_on_the_all_ones_train() -> None:
    s = torch.ones(16, 3)
    assert not LIF(2.0)(s).any()
    assert LIF(2.0).potentials(s)[:4, 0].tolist() == [0.5, 0.75, 0.875, 0.9375]


def test_row_000_transmits_spikes_unchanged() -> None:
    s = torch.randint(0, 2, (50, 200)).float()
    assert torch.equal(LIF(2.0, decay_input=False)(s), s)


# --- reset ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("path", ["native", "reference"])
def test_gradient_of_the_reset(native: Any, name: str, v_reset: float | None, path: str) -> None:
    # IF at T = 1 from rest: H[0] = x, so dV/dx is dV/dH.
    surrogate = SURROGATES[name]()
    h = torch.randn(500) + 0.8
    s, slope = (h >= 1).float(), surrogate.derivative(h - 1)
    with backend(path):  # pyright: ignore[reportArgumentType]
        outs = []
        for detach in (True, False):
            x = h.clone()[None].requires_grad_()
            spikes, v = scan(x, None, 1.0, 1.0, 1.0, v_reset, surrogate, detach)
            assert v is not None
            (grad,) = torch.autograd.grad(v.sum(), x)
            outs.append((spikes, v, grad[0]))
    (s_d, v_d, detached), (s_a, v_a, attached) = outs
    assert torch.equal(s_d, s_a)
    assert torch.equal(v_d, v_a)
    if v_reset is None:
        assert torch.equal(v_d, h - s)
        assert torch.equal(detached, torch.ones(500))
        torch.testing.assert_close(attached, 1 - slope)
    else:
        assert torch.equal(v_d, h * (1 - s))
        assert torch.equal(detached, 1 - s)
        torch.testing.assert_close(attached, 1 - s - h * slope)


def test_soft_reset_keeps_the_excess() -> None:
    x = torch.tensor([[2.75], [0.0], [0.0], [0.0]])
    assert IF(v_reset=None)(x).flatten().tolist() == [1, 1, 0, 0]
    assert IF(v_reset=0.0)(x).flatten().tolist() == [1, 0, 0, 0]
    stream = Stream(neuron := IF(v_reset=None))
    stream(x)
    assert stream.state(neuron).item() == 0.75


# --- gradient facts ---------------------------------------------------------------------------------------------------


def chain_gradient(s: Tensor, k: int, v_threshold: float, surrogate: Surrogate) -> Tensor:
    """dO/dS through k IF neurons in the identity regime, step by step: the carried potential is cut off."""
    stream = Stream(nn.Sequential(*(IF(v_threshold, surrogate=surrogate) for _ in range(k))))
    s = s.clone().requires_grad_()
    outputs = []
    for s_t in s.split(1):
        outputs.append(stream(s_t))
        stream.detach()
    out = torch.cat(outputs)
    assert torch.equal(out, s)
    (grad,) = torch.autograd.grad(out, s, torch.ones_like(s))
    return grad


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize(("v_threshold", "alpha"), [(1.0, 2.0), (0.5, 2.0), (1.0, 3.0)])
def test_spiking_resnet_gradient_in_the_identity_regime(v_threshold: float, alpha: float, k: int) -> None:
    T, N = 5, 4000
    s = (torch.rand(T, N) < 0.3).float()
    grad = chain_gradient(s, k, v_threshold, ATan(alpha))
    at_one, at_zero = (1 / (1 + (math.pi / 2 * alpha * u) ** 2) * alpha / 2 for u in (1 - v_threshold, -v_threshold))
    torch.testing.assert_close(grad, torch.where(s > 0, at_one**k, at_zero**k), rtol=1e-5, atol=0)
    rate = s.mean().item()
    norm = math.sqrt(N * T * rate * at_one ** (2 * k) + N * T * (1 - rate) * at_zero ** (2 * k))
    assert grad.double().norm().item() == pytest.approx(norm, rel=1e-5)


def test_limits_of_the_gradient_norm() -> None:
    T, N, k = 2, 3000, 40
    s = (torch.rand(T, N) < 0.4).float()
    rate = s.mean().item()
    # 1 at both ends; 1 at the firing end alone; 1 at the silent end alone; below 1 at both; above 1 at one.
    both = chain_gradient(s, k, 0.5, FlatATan()).norm()
    assert both.item() == pytest.approx(math.sqrt(N * T), rel=1e-3)
    firing = chain_gradient(s, k, 1.0, ATan(2.0)).norm()
    assert firing.item() == pytest.approx(math.sqrt(N * T * rate), rel=1e-5)
    assert chain_gradient(s, k, 0.5, ATan(2.0)).norm() < 1e-12
    assert chain_gradient(s, k, 1.0, ATan(3.0)).norm() > 1e6
    # Threshold 1/2 on the edge of a unit window: nothing passes; the closed window passes everything.
    assert chain_gradient(s, 1, 0.5, Rectangular()).norm() == 0
    assert chain_gradient(s, k, 0.5, Rectangular(closed=True)).norm().item() == pytest.approx(math.sqrt(N * T))


@pytest.mark.parametrize("surrogate", [ATan(), ATan(50.0), Triangle(0.1)], ids=str)
@pytest.mark.parametrize(("combine", "a"), [("add", 0.0), ("and", 1.0), ("iand", 0.0)])
def test_sew_gradient_is_one_in_the_identity_regime(combine: str, a: float, surrogate: Surrogate) -> None:
    s = torch.randint(0, 2, (4, 300)).float().requires_grad_()
    # A branch that sends the same spikes whatever comes in.
    branch = IF(surrogate=surrogate)(s * 0 + (1.0 if a else -1.0))
    assert torch.equal(branch, torch.full_like(s, a))
    out = COMBINE[combine](branch, s)
    assert torch.equal(out, s)
    (grad,) = torch.autograd.grad(out.sum(), s)
    assert torch.equal(grad, torch.ones_like(s))


# --- what every neuron promises ---------------------------------------------------------------------------------------


def whole(neuron: nn.Module, x: Tensor, upstream: Tensor, cuts: tuple[int, ...] | None) -> list[Tensor]:
    """Spikes and every gradient of a run: whole (cuts None), or in chunks that end at `cuts`."""
    x = x.clone().requires_grad_()
    neuron.zero_grad()
    if cuts is None:
        out = neuron(x)
    else:
        stream = Stream(neuron)
        out = torch.cat([stream(x[a:b]) for a, b in pairwise((0, *cuts, x.shape[0]))])
    out.backward(upstream)
    return [out.detach(), x.grad, *(p.grad.clone() for p in neuron.parameters())]  # pyright: ignore


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("settings", [{}, {"v_reset": None, "detach_reset": False}, {"v_reset": -0.25}], ids=str)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_whole_is_stepwise_is_chunks(native: Any, tracks: Any, name: str, settings: dict[str, Any], path: str) -> None:
    neuron = SEQUENTIAL[name](**settings)
    x, upstream = torch.randn(12, 3, 4, 5) * 2, torch.randn(12, 3, 4, 5)
    with backend(path):  # pyright: ignore[reportArgumentType]
        expected = whole(neuron, x, upstream, None)
        assert 20 < expected[0].sum() < 600
        for cuts in (tuple(range(1, 12)), (5,), (1, 2, 11)):
            got = whole(neuron, x, upstream, cuts)
            assert torch.equal(got[0], expected[0])
            for a, b in zip(got[1:], expected[1:], strict=True):
                assert tracks(a, b) < 1e-5


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_second_call_gives_the_same_answer(name: str) -> None:
    neuron = SEQUENTIAL[name]()
    x = torch.randn(6, 4, 7) + 0.5
    first = neuron(x)
    assert torch.equal(neuron(x), first)
    neuron(torch.randn(3, 2, 7))
    neuron(torch.randn(6, 9, 2, 2))
    assert torch.equal(neuron(x), first)
    # Samples do not meet: a sample alone gives what it gave in company.
    assert torch.equal(neuron(x[:, 1:2]), first[:, 1:2])
    assert not [*neuron.buffers()]
    assert len(neuron.state_dict()) == len(list(neuron.parameters()))


def test_carried_state_makes_a_difference() -> None:
    # Sub-threshold charge: a neuron that was not reset fires in the second call.
    stream, x = Stream(IF()), torch.full((1, 1), 0.75)
    assert stream(x).item() == 0
    assert stream(x).item() == 1
    stream.reset()
    assert stream(x).item() == 0
    neuron = IF()
    assert neuron(x).item() == neuron(x).item() == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (4, 1, 3), (1, 5, 2, 3, 3), (2, 3, 4, 0, 0), (3, 0, 5)], ids=str)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_smallest_shapes(name: str, shape: tuple[int, ...]) -> None:
    neuron = SEQUENTIAL[name]()
    x = torch.randn(shape, requires_grad=True)
    out = neuron(x)
    assert out.shape == shape
    assert ((out == 0) | (out == 1)).all()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert Stream(neuron)(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_precision_of_the_output_is_that_of_the_input(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, dtype=dtype, requires_grad=True)
    neuron = SEQUENTIAL[name]()
    out = neuron(x)
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    stream = Stream(neuron)
    assert torch.equal(torch.cat([stream(x[:2]), stream(x[2:])]), out)
    assert stream.state(neuron).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_no_steps(name: str) -> None:
    with pytest.raises(ValueError, match=r"at least one step, got shape \(0, 2, 3\)"):
        SEQUENTIAL[name]()(torch.zeros(0, 2, 3))
    with pytest.raises(ValueError, match=r"\[T, N, \.\.\.\].*got shape \(3,\)"):
        SEQUENTIAL[name]()(torch.zeros(3))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_state_of_another_batch(name: str) -> None:
    stream = Stream(SEQUENTIAL[name]())
    stream(torch.zeros(1, 2, 3))
    message = rf"{name} carries the state of a batch of shape \(2, 3\).*now \(4, 3\).*stream\.reset"
    with pytest.raises(ValueError, match=message):
        stream(torch.zeros(1, 4, 3))


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.0, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("make", [LIF, PLIF])
def test_invalid_time_constant(make: Any, tau: float) -> None:
    with pytest.raises(ValueError, match=rf"tau must be greater than 1, got {tau}"):
        make(tau)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_reset_above_the_threshold(name: str) -> None:
    for v_reset in (1.0, 1.5):
        with pytest.raises(ValueError, match=rf"v_reset must be below v_threshold, got {v_reset} and 1\.0"):
            SEQUENTIAL[name](v_threshold=1.0, v_reset=v_reset)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_potentials_decide_the_spikes(name: str) -> None:
    for settings in ({}, {"v_reset": None}, {"v_reset": -0.5, "v_threshold": 0.3}):
        neuron = SEQUENTIAL[name](**settings)
        x = torch.randn(10, 3, 50)
        h = neuron.potentials(x)
        assert h.shape == x.shape
        assert not h.requires_grad
        assert torch.equal((h >= neuron.v_threshold).float(), neuron(x))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_settings_are_shown(name: str) -> None:
    text = repr(SEQUENTIAL[name](v_threshold=0.75, v_reset=None, surrogate=Triangle(0.5), detach_reset=False))
    for part in ("v_threshold=0.75", "v_reset=None", "Triangle(gamma=0.5)", "detach_reset=False"):
        assert part in text
    assert "tau=3.0" in repr(LIF(3.0))


def test_public_defaults() -> None:
    lif = LIF()
    assert (lif.tau, lif.decay_input, lif.v_threshold, lif.v_reset, lif.surrogate, lif.detach_reset) == (
        2.0,
        True,
        1.0,
        0.0,
        ATan(2.0),
        True,
    )


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_surrogate_of_ones_own(native: Any, tracks: Any, name: str) -> None:
    class Own(Surrogate):
        def primitive(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

        def derivative(self, x: Tensor) -> Tensor:
            return 1 - torch.tanh(x).square()

    neuron = SEQUENTIAL[name](surrogate=Own(), detach_reset=False)
    x, upstream = torch.randn(9, 4, 5) * 2, torch.randn(9, 4, 5)
    with backend("reference"):
        expected = whole(neuron, x, upstream, None)
    for cuts in (None, (3, 4)):
        got = whole(neuron, x, upstream, cuts)
        assert torch.equal(got[0], expected[0])
        for a, b in zip(got[1:], expected[1:], strict=True):
            assert tracks(a, b) < 1e-5


def test_norse_box_is_a_strict_lif() -> None:
    """`LIFBox`, as its documentation writes it: dv = dt / tau_mem (i - v), z = H(v - 1), v = (1 - z) v, SuperSpike."""
    theirs = torch.randn(12, 3, 5, dtype=torch.float64).mul_(8).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    surrogate, v, spikes = FastSigmoid(scale=100.0), torch.zeros(3, 5, dtype=torch.float64), list[Tensor]()
    for i in theirs:
        v = v + 0.001 * 100.0 * (i - v)
        spikes.append(surrogate(v - 1))
        v = (1 - spikes[-1]) * v
    neuron = LIF(tau=10.0, strict=True, surrogate=surrogate, detach_reset=False)
    found, weight = neuron(ours), torch.randn(12, 3, 5, dtype=torch.float64)
    assert 0.05 < found.mean() < 0.5
    torch.testing.assert_close(found, torch.stack(spikes))
    for out in (found, torch.stack(spikes)):
        (out * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
