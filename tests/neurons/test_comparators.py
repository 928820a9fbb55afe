"""KLIF, GLIF and the LIF with a synaptic current: the neurons that the parallel ones are compared with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.neurons import GLIF, KLIF, LIF, SynapticLIF
from spikeloom.ops import backend
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, FastSigmoid, Rectangular


def grads(neuron: nn.Module, x: Tensor, upstream: Tensor, sizes: list[int] | None = None) -> dict[str, Tensor]:
    """The output and every gradient: whole, or in chunks of a Stream."""
    x = x.detach().clone().requires_grad_()
    neuron.zero_grad()
    stream = Stream(neuron)
    out = neuron(x) if sizes is None else torch.cat([stream(part) for part in x.split(sizes)])
    out.backward(upstream)
    assert x.grad is not None
    results = {"out": out.detach(), "x": x.grad}
    for name, parameter in neuron.named_parameters():
        assert parameter.grad is not None, name
        results[name] = parameter.grad.clone()
    return results


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- KLIF -------------------------------------------------------------------------------------------------------------


def test_klif_starts_with_k_of_one() -> None:
    neuron = KLIF()
    assert [(name, p.shape, p.item()) for name, p in neuron.named_parameters()] == [("k", (), 1.0)]
    assert (neuron.tau, neuron.v_threshold, neuron.v_reset, neuron.surrogate) == (2.0, 1.0, 0.0, ATan())


@pytest.mark.parametrize("v_reset", [0.0, None, -0.25])
@pytest.mark.parametrize(("tau", "decay_input"), [(2.0, True), (3.0, False)])
@pytest.mark.parametrize("k", [1.0, 1.5, 0.5])
def test_klif_by_hand(k: float, tau: float, decay_input: bool, v_reset: float | None) -> None:
    """F = relu(k H), S = Theta(F - V_th), V = F - V_th S or F (1 - S) + V_reset S, in Python's double precision."""
    neuron = KLIF(tau, decay_input, 0.75, v_reset).double()
    neuron.k.data.fill_(k)
    x = torch.randn(20, 150, dtype=torch.float64) * 2 + 0.3
    out, potentials = neuron(x), neuron.potentials(x)
    rest = v_reset or 0.0
    for n in range(150):
        v = rest
        for t in range(20):
            h = rest + (1 - 1 / tau) * (v - rest) + x[t, n].item() / (tau if decay_input else 1)
            f = max(0.0, k * h)
            s = f >= 0.75
            assert potentials[t, n].item() == pytest.approx(f, rel=1e-9, abs=1e-12)
            assert out[t, n] == s
            v = (f - 0.75 * s) if v_reset is None else (v_reset if s else f)


def test_klif_is_lif_on_positive_inputs(dyadic: Any) -> None:
    x = dyadic(12, 3, 100, low=0.0)
    for v_reset in (0.0, None):
        assert torch.equal(KLIF(v_reset=v_reset)(x), LIF(v_reset=v_reset)(x))
    # The rectifier forgets negative charge, which a LIF has to make up for.
    low = torch.tensor([[-4.0], [2.0]])
    assert KLIF()(low).flatten().tolist() == [0, 1]
    assert LIF()(low).flatten().tolist() == [0, 0]


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("detach", [True, False])
def test_klif_steps(native: Any, tracks: Any, detach: bool, path: str) -> None:
    neuron = KLIF(v_reset=None, detach_reset=detach)
    neuron.k.data.fill_(1.25)
    x, upstream = torch.randn(12, 3, 40) * 2, torch.randn(12, 3, 40)
    with backend(path):  # pyright: ignore[reportArgumentType]
        whole = grads(neuron, x, upstream)
        assert whole["out"].sum() > 100
        for sizes in ([1] * 12, [5, 7]):
            parts = grads(neuron, x, upstream, sizes)
            assert torch.equal(parts["out"], whole["out"])
            assert tracks(parts["x"], whole["x"]) < 1e-5
            assert tracks(parts["k"], whole["k"]) < 1e-4


# --- GLIF -------------------------------------------------------------------------------------------------------------

STARTS = {"tau": 0.25, "v_threshold": 0.5, "leak": 0.0625, "v_drop": 0.5, "alpha": 0.55, "beta": 0.65, "gamma": 0.55}


@pytest.mark.parametrize(("C", "T"), [(1, 1), (3, 4), (128, 32)])
def test_glif_parameters(C: int, T: int) -> None:
    neuron = GLIF(C, T)
    assert sum(p.numel() for p in neuron.parameters()) == 7 * C + T * C
    for name, start in STARTS.items():
        values = torch.sigmoid(getattr(neuron, name))
        assert values.shape == (C,)
        torch.testing.assert_close(values, torch.full((C,), start))
    assert torch.sigmoid(neuron.conduct).eq(0.5).all()
    assert neuron.conduct.shape == (T, C)
    assert neuron.surrogate == Rectangular()
    assert neuron.hard_gates
    assert neuron.strict


def glif_by_hand(neuron: GLIF, x: Tensor, hard: bool, strict: bool) -> Tensor:
    """The equation of the documents, one neuron at a time, in Python's double precision. x: [T, N, C]."""
    out = torch.zeros_like(x)
    for c in range(x.shape[2]):
        raw = {name: getattr(neuron, name)[c].item() for name in STARTS}
        value = {name: sigmoid(r) for name, r in raw.items()}
        a, b, g = (float(value[n] > 0.5) if hard else value[n] for n in ("alpha", "beta", "gamma"))
        for n in range(x.shape[1]):
            u = s = 0.0
            for t in range(x.shape[0]):
                cond = sigmoid(neuron.conduct[t, c].item())
                u = (
                    (1 - a * (1 - value["tau"])) * u * (1 - g * s)
                    - (1 - a) * value["leak"]
                    + x[t, n, c].item() * (1 - b * (1 - cond))
                    - (1 - g) * value["v_drop"] * s
                )
                s = float(u > value["v_threshold"] if strict else u >= value["v_threshold"])
                out[t, n, c] = s
    return out


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_glif_by_hand(hard: bool, strict: bool) -> None:
    for start in (True, False):
        neuron = GLIF(5, 9, hard_gates=hard, strict=strict).double()
        if not start:
            for parameter in neuron.parameters():
                parameter.data += torch.randn_like(parameter)
        x = torch.randn(9, 12, 5, dtype=torch.float64) * 2 + 0.3
        out = neuron(x)
        assert 30 < out.sum() < 500
        assert torch.equal(out, glif_by_hand(neuron, x, hard, strict))


def test_glif_ties() -> None:
    """All gates open, decay 1/4: at T = 1, U = x / 2, and the threshold is 1/2."""
    x = torch.tensor([[[1.0], [1.25]]])
    assert GLIF(1, 1)(x).flatten().tolist() == [0, 1]
    assert GLIF(1, 1, strict=False)(x).flatten().tolist() == [1, 1]


def test_hard_gates_pass_the_gradient_straight_through() -> None:
    """Values are 0 or 1; gradients are those of the sigmoid."""
    neuron = GLIF(4, 3).double()
    raw = torch.tensor([-1.0, -0.1, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    gate = neuron._gate(raw)
    assert gate.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-12)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(gate, raw, upstream)
    s = torch.sigmoid(raw.detach())
    torch.testing.assert_close(grad, upstream * s * (1 - s))


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("hard", [True, False])
def test_glif_steps(native: Any, tracks: Any, hard: bool, path: str) -> None:
    neuron = GLIF(4, 12, hard_gates=hard)
    for parameter in neuron.parameters():
        parameter.data += torch.randn_like(parameter) * 0.5
    x, upstream = torch.randn(12, 3, 4, 2, 5) * 2, torch.randn(12, 3, 4, 2, 5)
    with backend(path):  # pyright: ignore[reportArgumentType]
        whole = grads(neuron, x, upstream)
        assert whole["out"].sum() > 100
        for sizes in ([1] * 12, [5, 7]):
            parts = grads(neuron, x, upstream, sizes)
            assert torch.equal(parts["out"], whole["out"])
            for key in whole.keys() - {"out"}:
                assert tracks(parts[key], whole[key]) < 1e-4, key


def test_glif_takes_fewer_steps_and_no_more() -> None:
    neuron = GLIF(2, 4)
    x = torch.randn(4, 3, 2)
    assert torch.equal(neuron(x[:2]), neuron(x)[:2])
    with pytest.raises(ValueError, match="made for T = 4 steps, got 5"):
        neuron(torch.zeros(5, 3, 2))
    stream = Stream(neuron)
    stream(x)
    with pytest.raises(ValueError, match="made for T = 4 steps, got 5"):
        stream(x[:1])
    for shape in ((4, 3), (4, 3, 5), (4, 2, 3, 3)):
        with pytest.raises(ValueError, match=r"made for \[T, N, 2, \.\.\.\], got"):
            neuron(torch.zeros(shape))
    for C, T, name in ((0, 3, "channels"), (3, 0, "T")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            GLIF(C, T)


def test_glif_channels_do_not_meet() -> None:
    neuron = GLIF(3, 5)
    for parameter in neuron.parameters():
        parameter.data += torch.randn_like(parameter)
    x = torch.randn(5, 2, 3, 4)
    out = neuron(x)
    changed = x.clone()
    changed[:, :, 1] += 1
    assert torch.equal(neuron(changed)[:, :, [0, 2]], out[:, :, [0, 2]])


# --- LIF with a synaptic current --------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"tau_mem": 0.004, "tau_syn": 0.002, "v_threshold": 0.5}


def test_synaptic_lif_defaults() -> None:
    neuron = SynapticLIF()
    assert (neuron.v_threshold, neuron.surrogate, neuron.strict) == (1.0, FastSigmoid(100.0), True)
    assert [d.item() for d in neuron.decays()] == pytest.approx([math.exp(-1 / 20)] * 2)
    assert not list(neuron.parameters())
    assert len(list(SynapticLIF(learn_tau=True).parameters())) == 2
    assert len(list(SynapticLIF(tau_syn=None, learn_tau=True).parameters())) == 1


@pytest.mark.parametrize("tau_syn", [0.002, None])
def test_synaptic_lif_by_hand(tau_syn: float | None) -> None:
    neuron = SynapticLIF(**{**QUICK, "tau_syn": tau_syn}).double()
    alpha, beta = (d.item() for d in neuron.decays())
    assert alpha == (0 if tau_syn is None else pytest.approx(math.exp(-0.5)))
    x = torch.randn(25, 150, dtype=torch.float64) * 2 + 0.4
    out, potentials = neuron(x), neuron.potentials(x)
    assert out.sum() > 100
    for n in range(150):
        synapse = m = 0.0
        for t in range(25):
            synapse = alpha * synapse + x[t, n].item()
            m = beta * m + (1 - beta) * synapse
            s = m > 0.5
            assert potentials[t, n].item() == pytest.approx(m, rel=1e-9, abs=1e-12)
            assert out[t, n] == s
            m = m * (1 - s)


def test_synaptic_lif_reset_has_no_gradient() -> None:
    """Two steps, no synapse: dS[1]/dx[0] passes the membrane where it did not fire, and nothing where it did."""
    neuron = SynapticLIF(0.004, None, v_threshold=0.5, surrogate=ATan()).double()
    beta = neuron.decays()[1].item()
    for first, kept in ((0.1, True), (10.0, False)):
        x = torch.tensor([[first], [0.2]], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(neuron(x)[1].sum(), x)
        u = neuron.potentials(x)[1].item() - 0.5
        slope = 1 / (1 + (math.pi * u) ** 2)
        assert grad[1].item() == pytest.approx(slope * (1 - beta))
        assert grad[0].item() == pytest.approx(slope * beta * (1 - beta) if kept else 0)


def test_synaptic_lif_ties() -> None:
    neuron = SynapticLIF(0.004, None, v_threshold=0.25)
    neuron.beta = torch.tensor(0.5)
    loose = SynapticLIF(0.004, None, v_threshold=0.25, strict=False)
    loose.beta = torch.tensor(0.5)
    x = torch.tensor([[0.5, 0.625]])
    assert neuron(x).flatten().tolist() == [0, 1]
    assert loose(x).flatten().tolist() == [1, 1]


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("tau_syn", [0.002, None])
@pytest.mark.parametrize("learn", [True, False])
def test_synaptic_lif_steps(native: Any, tracks: Any, learn: bool, tau_syn: float | None, path: str) -> None:
    neuron = SynapticLIF(**{**QUICK, "tau_syn": tau_syn}, learn_tau=learn, surrogate=ATan())
    x, upstream = torch.randn(14, 3, 40) * 2 + 0.4, torch.randn(14, 3, 40)
    with backend(path):  # pyright: ignore[reportArgumentType]
        whole = grads(neuron, x, upstream)
        assert whole["out"].sum() > 100
        for sizes in ([1] * 14, [5, 9]):
            parts = grads(neuron, x, upstream, sizes)
            assert torch.equal(parts["out"], whole["out"])
            for key in whole.keys() - {"out"}:
                assert tracks(parts[key], whole[key]) < 1e-4, key


def test_synaptic_lif_gradients_native_and_reference(native: Any, tracks: Any) -> None:
    neuron = SynapticLIF(**QUICK, learn_tau=True, surrogate=ATan())
    x, upstream = torch.randn(14, 3, 40) * 2 + 0.4, torch.randn(14, 3, 40)
    results = []
    for path in ("native", "reference"):
        with backend(path):
            results.append(grads(neuron, x, upstream))
    assert torch.equal(results[0]["out"], results[1]["out"])
    for key in results[1].keys() - {"out"}:
        assert tracks(results[0][key], results[1][key]) < 1e-4, key


@pytest.mark.parametrize("kind", ["klif", "glif", "synaptic"])
def test_causality(kind: str) -> None:
    neuron: nn.Module = {
        "klif": KLIF(),
        "glif": GLIF(10, 6),
        "synaptic": SynapticLIF(**QUICK, surrogate=ATan()),
    }[kind]
    x = (torch.randn(6, 4, 10) * 2).requires_grad_()
    out = neuron(x)
    for t in range(6):
        (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
        assert not grad[t + 1 :].any()
        assert grad[t].any()
        later = x.detach().clone()
        later[t + 1 :] += 10
        assert torch.equal(neuron(later)[: t + 1], out[: t + 1])
