"""PSU, IPSU, RPSU and SPSN: what their documents demand of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.custom_surrogate import Gaussian
from torch import Tensor

from spikeloom.neurons import IPSU, LIF, PSU, RPSU, SPSN
from spikeloom.ops import backend, leaky_filter
from spikeloom.ops.psu import psu_reference
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, Sigmoid, Surrogate

TAUS = [1.5, 2.0, 3.0]


def matrices(T: int, tau: float, v_threshold: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of the derivation."""
    lag = torch.arange(T, dtype=torch.float64).unsqueeze(1) - torch.arange(T)
    power = (1 - 1 / tau) ** lag.clamp_min(0)
    return (power / tau * (lag >= 0)).to(dtype), (v_threshold * power * (lag > 0)).to(dtype)


def serial(x: Tensor, tau: float, v_threshold: float) -> tuple[Tensor, Tensor]:
    """The LIF of the derivation, step by step: the reset takes place before the leak. V before the reset, spikes."""
    v, s, vs, spikes = torch.zeros_like(x[0]), torch.zeros_like(x[0]), [], []
    for x_t in x:
        v = (1 - 1 / tau) * (v - v_threshold * s) + x_t / tau
        s = (v >= v_threshold).to(x.dtype)
        vs.append(v)
        spikes.append(s)
    return torch.stack(vs), torch.stack(spikes)


def integrate(neuron: PSU, x: Tensor) -> Tensor:
    """`A x`."""
    return leaky_filter(x, 0.0, neuron.decay)[0]


def reset(neuron: PSU, estimate: Tensor) -> Tensor:
    """`B estimate`."""
    return -psu_reference(torch.zeros_like(estimate), estimate, neuron.decay, neuron.drop(), False, True)[0]


def membrane(neuron: PSU, x: Tensor) -> Tensor:
    """V with its gradient."""
    u, z, through, raw = neuron.currents(x)
    return psu_reference(u, z, neuron.decay, neuron.drop(), through, raw)[0]


# --- the identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("v_threshold", [0.5, 1.0])
def test_true_spikes_give_lif_back(v_threshold: float, tau: float, dtype: torch.dtype, tolerance: float) -> None:
    """V = A I - B S with S the true spikes: the potential before the reset of LIF with soft reset."""
    T = 8
    x = torch.randn(T, 3, 200, dtype=dtype) + 0.6
    v, s = serial(x, tau, v_threshold)
    neuron = PSU(tau, v_threshold)
    with backend("reference"):
        identity = integrate(neuron, x) - reset(neuron, s)
    a, b = matrices(T, tau, v_threshold, dtype)
    product = (a @ x.flatten(1) - b @ s.flatten(1)).view_as(x)
    lif = LIF(tau, v_threshold=v_threshold, v_reset=None)
    for potential in (identity, product, lif.potentials(x)):
        assert (potential - v).abs().max() <= tolerance * max(1.0, v.abs().max().item())
    clear = (v - v_threshold).abs() > 10 * tolerance
    assert torch.equal(lif(x)[clear], s[clear])
    assert torch.equal((identity >= v_threshold).to(dtype)[clear], s[clear])
    assert s.sum() > 200


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("tau", TAUS)
def test_the_matrices(native: Any, tau: float, path: str) -> None:
    T = 9
    a, b = matrices(T, tau, 0.75, torch.float32)
    identity = torch.eye(T).unsqueeze(1)
    neuron = PSU(tau, 0.75)
    with backend(path):  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(integrate(neuron, identity)[:, 0], a, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(reset(neuron, identity)[:, 0], b, rtol=1e-6, atol=1e-7)


# --- the formulas -----------------------------------------------------------------------------------------------------


def by_matrices(neuron: PSU, x: Tensor) -> Tensor:
    """V of each unit as its document prints it, with dense matrices."""
    T = x.shape[0]
    a, b = matrices(T, neuron.tau, 1.0, x.dtype)
    flat = x.flatten(1)
    if not isinstance(neuron, IPSU | RPSU):
        u = a @ flat
        v = u - neuron.v_threshold * b @ torch.sigmoid(u)
    else:
        learned = neuron.weight.tril() @ flat
        if neuron.bias is not None:
            learned = learned + neuron.bias.unsqueeze(1)
        scale = neuron.reset_threshold
        if isinstance(neuron, RPSU):
            v = a @ flat - scale * b @ torch.sigmoid(learned)
        else:
            v = learned - scale * b @ (torch.sigmoid(learned) if neuron.form == "paper" else flat)
    return v.view_as(x)


FORMS: dict[str, Any] = {
    "psu": lambda T, **s: PSU(**s),
    "ipsu": lambda T, **s: IPSU(T, **s),
    "ipsu_no_bias": lambda T, **s: IPSU(T, bias=False, **s),
    "ipsu_released": lambda T, **s: IPSU(T, form="released", scaled_reset=False, **s),
    "rpsu": lambda T, **s: RPSU(T, **s),
    "rpsu_unscaled": lambda T, **s: RPSU(T, scaled_reset=False, **s),
}


@pytest.mark.parametrize("T", [1, 2, 7, 33, 70])
@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_formula_and_gradients(native: Any, tracks: Any, form: str, path: str, T: int) -> None:
    neuron = FORMS[form](T, tau=3.0, v_threshold=0.5)
    if getattr(neuron, "bias", None) is not None:
        neuron.bias.data.normal_()
    x, upstream = torch.randn(T, 3, 4, 5) * 2, torch.randn(T, 3, 4, 5)
    results = []
    for fast in (True, False):
        given = x.clone().requires_grad_()
        neuron.zero_grad()
        with backend(path):  # pyright: ignore[reportArgumentType]
            v = membrane(neuron, given) if fast else by_matrices(neuron, given)
        (v * upstream).sum().backward()
        assert given.grad is not None
        results.append([v.detach(), given.grad, *(p.grad.clone() for p in neuron.parameters())])
    for got, expected in zip(*results, strict=True):
        assert tracks(got, expected) < 1e-5
    torch.testing.assert_close(neuron.potentials(x), results[0][0], rtol=1e-5, atol=1e-5)
    with backend(path):  # pyright: ignore[reportArgumentType]
        out = neuron(x)
    clear = (results[1][0] - 0.5).abs() > 1e-4
    assert torch.equal(out[clear], (results[1][0] >= 0.5).float()[clear])


@pytest.mark.parametrize("surrogate", [ATan(), Sigmoid(4.0), Gaussian()], ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 40])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_the_surrogates(native: Any, tracks: Any, form: str, T: int, surrogate: Surrogate) -> None:
    """Spikes of the native op, and every gradient, against the formula's membrane under autograd."""
    x, upstream = torch.randn(T, 3, 17), torch.randn(T, 3, 17)
    neuron = FORMS[form](T, tau=3.0, surrogate=surrogate)
    given = x.clone().requires_grad_()
    inputs = [given, *neuron.parameters()]
    with backend("native"):
        out = neuron(given)
    got = torch.autograd.grad(out, inputs, upstream)
    v = membrane(neuron, given)
    expected = torch.autograd.grad(v, inputs, upstream * surrogate.derivative(v.detach() - 1))
    clear = (v.detach() - 1).abs() > 1e-5
    assert torch.equal(out[clear], (v.detach() >= 1).float()[clear])
    for a, b in zip(got, expected, strict=True):
        assert tracks(a, b) < 1e-5


@pytest.mark.parametrize("v_threshold", [0.5, 1.0])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("make", [IPSU, RPSU])
def test_with_the_fixed_matrix_they_are_psu(make: type[RPSU], tau: float, v_threshold: float) -> None:
    T = 10
    neuron, psu = make(T, tau, v_threshold), PSU(tau, v_threshold)
    neuron.weight.data = matrices(T, tau, 1.0, torch.float32)[0]
    x = torch.randn(T, 3, 100) + 0.5
    torch.testing.assert_close(neuron.potentials(x), psu.potentials(x), rtol=1e-5, atol=1e-6)
    clear = (psu.potentials(x) - v_threshold).abs() > 1e-5
    assert torch.equal(neuron(x)[clear], psu(x)[clear])


def test_without_a_threshold_it_integrates() -> None:
    """V_th -> 0 in B: leaky integration without reset, what `scaled_reset` leaves in place."""
    neuron = PSU(2.0, v_threshold=1e-30)
    x = torch.randn(9, 40)
    torch.testing.assert_close(neuron.potentials(x), integrate(neuron, x), rtol=1e-6, atol=1e-7)
    # sigmoid -> 0: far below zero nothing is taken off either.
    low = torch.full((9, 40), -200.0)
    torch.testing.assert_close(PSU().potentials(low), integrate(PSU(), low))


@pytest.mark.parametrize("tau", TAUS)
def test_one_step_has_no_reset(tau: float) -> None:
    x = torch.linspace(-3, 6, 901)[None]
    v = x / tau
    clear = (v - 1).abs() > 1e-5
    assert torch.equal(PSU(tau)(x)[clear], (v >= 1).float()[clear])


def test_a_tie_fires_unless_strict() -> None:
    x = torch.tensor([[2.0]])
    assert PSU(2.0, 1.0)(x).item() == 1
    assert PSU(2.0, 1.0, strict=True)(x).item() == 0
    for make in (IPSU, RPSU):
        for strict in (False, True):
            neuron = make(1, 2.0, 1.0, strict=strict)
            neuron.weight.data.fill_(0.5)
            assert neuron(x).item() == (not strict)


def test_time_alone_is_mixed() -> None:
    """Flattened batch before time would mix samples: T, N and the rest differ in size."""
    for make in FORMS.values():
        neuron = make(6)
        x = torch.randn(6, 4, 3, 2, 5)
        v = neuron.potentials(x)
        alone = neuron.potentials(x[:, 2:3, 1:2])
        torch.testing.assert_close(v[:, 2:3, 1:2], alone, rtol=1e-5, atol=1e-6)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 10, 15, 32])
def test_number_of_parameters(T: int) -> None:
    def count(neuron: Any) -> int:
        return sum(p.numel() for p in neuron.parameters())

    assert count(PSU()) == count(SPSN()) == 0
    for make in (IPSU, RPSU):
        assert count(make(T)) == T * T + T
        assert count(make(T, bias=False)) == T * T
    if T > 1:
        assert {4: 20, 10: 110, 15: 240, 32: 1056}[T] == T * T + T


def test_start_values() -> None:
    for make in (IPSU, RPSU):
        neuron = make(100)
        assert neuron.weight.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.05)
        assert neuron.bias is not None
        assert not neuron.bias.any()
        assert make(3).reset_threshold == make(3).v_threshold == 1.0
        assert make(3, v_threshold=0.5).reset_threshold == 0.5
        assert make(3, v_threshold=0.5, scaled_reset=False).reset_threshold == 1.0


# --- causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_causality(native: Any, form: str, path: str) -> None:
    T = 7
    neuron = FORMS[form](T, v_threshold=0.5)
    with backend(path):  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            x = (torch.randn(T, 2, 60) * 2).requires_grad_()
            out = neuron(x)
            for t in range(T):
                (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
                assert not grad[t + 1 :].any()
                assert grad[: t + 1].flatten(1).any(1).all()
                later = x.detach().clone()
                later[t + 1 :] += 10
                assert torch.equal(neuron(later)[: t + 1], out[: t + 1])
            if form == "psu":
                return
            # And still after an optimiser's step: the mask is applied again.
            optimiser = torch.optim.Adam(neuron.parameters(), lr=0.5, weight_decay=0.1)
            neuron.zero_grad()
            neuron(x).sum().backward()
            assert not neuron.weight.grad.triu(1).any()
            optimiser.step()
            assert neuron.weight.triu(1).any()


# --- step by step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
def test_psu_steps(tracks: Any, tau: float) -> None:
    neuron, x = PSU(tau, 0.5), torch.randn(12, 3, 40)
    whole = neuron.potentials(x)
    for sizes in ([1] * 12, [5, 7], [1, 10, 1]):
        stream, parts = Stream(neuron), []
        for chunk in x.split(sizes):
            parts.append(neuron.potentials(chunk, stream.state(neuron)))
            assert torch.equal(stream(chunk), (parts[-1] >= 0.5).float())
        assert tracks(torch.cat(parts), whole) < 1e-6


@pytest.mark.parametrize("make", [IPSU, RPSU])
def test_learned_matrices_cannot_step(make: type[RPSU]) -> None:
    with pytest.raises(RuntimeError, match=rf"{make.__name__} needs the whole sequence.*PSU can step"):
        Stream(make(3))(torch.zeros(3, 1, 1))


# --- SPSN -------------------------------------------------------------------------------------------------------------


def test_spsn_fires_with_its_probability() -> None:
    T, draws, tau = 4, 100_000, 2.0
    x = torch.tensor([1.0, -0.5, 2.0, 0.0]).view(T, 1).expand(T, draws)
    u = 0.0
    spikes = SPSN(tau)(x)
    for t in range(T):
        u = u * (1 - 1 / tau) + x[t, 0].item() / tau
        p = 1 / (1 + math.exp(-u))
        assert abs(spikes[t].mean().item() - p) < 5 * math.sqrt(p * (1 - p) / draws)


def test_spsn_gradient() -> None:
    """The probability stands in for the draw's derivative: dL/du = dL/ds p p (1 - p); the draw does not matter."""
    x, upstream = torch.randn(5, 60, dtype=torch.float64), torch.randn(5, 60, dtype=torch.float64)
    given = x.clone().requires_grad_()
    SPSN(3.0)(given).backward(upstream)
    u = SPSN(3.0).potentials(x)
    p = torch.sigmoid(u)
    a, _ = matrices(5, 3.0, 1.0, torch.float64)
    assert given.grad is not None
    torch.testing.assert_close(given.grad, a.T @ (upstream * p * p * (1 - p)), rtol=1e-9, atol=1e-12)


def test_invalid_settings() -> None:
    for make in (PSU, SPSN):
        with pytest.raises(ValueError, match=r"tau must be greater than 1, got 1\.0"):
            make(1.0)
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        RPSU(0)
    with pytest.raises(ValueError, match="form must be 'paper' or 'released', got 'other'"):
        IPSU(3, form="other")  # pyright: ignore[reportArgumentType]


def test_autocast_keeps_the_products_in_float32() -> None:
    x = torch.randn(8, 3, 200) * 2
    for make in FORMS.values():
        neuron = make(8)
        with torch.autocast("cpu", torch.bfloat16):
            v = neuron.potentials(x)
        torch.testing.assert_close(v, neuron.potentials(x), rtol=1e-5, atol=1e-5)
