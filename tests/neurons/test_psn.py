"""The PSN family: what its documents demand of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikeloom.neurons import LIF, PSN, MaskedPSN, SlidingPSN
from spikeloom.ops import backend
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan, Triangle


def on_grid(neuron: Any) -> Any:
    """Weights and biases that are multiples of 1/8, where sums are exact in any order; the present step counts."""
    for parameter in neuron.parameters():
        parameter.data = (torch.rand_like(parameter) * 16 - 8).round() / 8
    neuron.bias.data = -neuron.bias.data.abs()
    (neuron.weight.data if neuron.weight.dim() == 1 else neuron.weight.data.diagonal())[-1:] = 0.875
    return neuron


def grads(neuron: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    neuron.zero_grad()
    out = neuron(x)
    out.backward(upstream)
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in neuron.parameters() if p.grad is not None)]


def reset_free_lif(T: int, tau: float) -> Tensor:
    lag = torch.arange(T).unsqueeze(1) - torch.arange(T)
    return ((1 - 1 / tau) ** lag.clamp_min(0) / tau * (lag >= 0)).float()


# --- initialisation and parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 4, 10, 32])
def test_number_of_parameters(T: int) -> None:
    for neuron in (PSN(T), MaskedPSN(T, 2), MaskedPSN(T, T)):
        assert sum(p.numel() for p in neuron.parameters()) == T * T + T
    for k in (1, 2, T):
        assert sum(p.numel() for p in SlidingPSN(k).parameters()) == k + 1
    kept = MaskedPSN(T, 2)._masked().count_nonzero().item()
    assert kept == min(2, T) * T - min(2, T) * (min(2, T) - 1) // 2


def test_parameters_of_the_published_networks() -> None:
    """PSN(T=4) in 17 layers of ResNet-18 and 10 of VGG-11; PSN and sliding PSN in the 7 of the sequential net."""
    per_layer = sum(p.numel() for p in PSN(4).parameters())
    assert (17 * per_layer, 10 * per_layer) == (340, 200)
    assert pytest.approx(0.00291e-2, rel=1e-2) == 340 / 11_689_512
    assert pytest.approx(0.00015e-2, rel=2e-2) == 200 / 132_863_336
    assert 7 * sum(p.numel() for p in PSN(32).parameters()) == 7392
    assert 7 * sum(p.numel() for p in SlidingPSN(32).parameters()) == 231


def test_start_values() -> None:
    for T in (4, 64):
        for neuron in (PSN(T), MaskedPSN(T, 2)):
            bound = 1 / math.sqrt(T)
            assert neuron.weight.abs().max() <= bound
            assert neuron.weight.abs().max() > 0.6 * bound
            assert (neuron.bias == -1).all()
            assert neuron.bias.shape == (T,)
    neuron = SlidingPSN(64)
    assert neuron.weight.shape == (64,)
    assert 0.6 / 8 < neuron.weight.abs().max() <= 1 / 8
    assert neuron.bias.item() == -1
    assert neuron.bias.shape == ()
    assert SlidingPSN(4, "exponential").weight.tolist() == [0.125, 0.25, 0.5, 1.0]
    assert PSN(3).surrogate == MaskedPSN(3, 1).surrogate == SlidingPSN(1).surrogate == ATan(2.0)


@pytest.mark.parametrize("make", [lambda: PSN(4), lambda: MaskedPSN(4, 2), lambda: SlidingPSN(2)])
def test_silent_input_is_silent_output(make: Any) -> None:
    neuron, x = make(), torch.zeros(4, 3, 5)
    assert not neuron(x).any()
    neuron.bias.data.zero_()
    assert neuron(x).all(), "a potential at the threshold fires"


# --- equalities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [2.0, 3.0, 1.5])
def test_psn_is_a_reset_free_lif(tau: float) -> None:
    T = 12
    neuron = PSN(T)
    neuron.weight.data = reset_free_lif(T, tau)
    x = torch.randn(T, 3, 200) * 1.5 + 0.5
    # A LIF that never fires integrates without reset.
    h = LIF(tau, v_threshold=1e30).potentials(x)
    torch.testing.assert_close(neuron.potentials(x), h - 1, rtol=1e-5, atol=1e-5)
    clear = (h - 1).abs() > 1e-5
    assert torch.equal(neuron(x)[clear], (h >= 1).float()[clear])
    assert neuron(x).sum() > 100


def test_psn_is_a_reset_free_lif_exactly(dyadic: Any) -> None:
    T = 8
    neuron = PSN(T)
    neuron.weight.data = reset_free_lif(T, 2.0)
    x = dyadic(T, 400)
    h = LIF(2.0, v_threshold=1e30).potentials(x)
    assert (h == 1).any()
    assert torch.equal(neuron(x), (h >= 1).float())


@pytest.mark.parametrize("T", [1, 5, 8, 70])
def test_masked_without_its_mask_is_psn(dyadic: Any, T: int) -> None:
    psn = on_grid(PSN(T, Triangle()))
    x, upstream = dyadic(T, 3, 40), torch.randn(T, 3, 40)
    for order in {1, T}:
        masked = MaskedPSN(T, order, lam=0.0, surrogate=Triangle())
        masked.load_state_dict({**psn.state_dict(), "lam": torch.tensor(0.0)})
        for a, b in zip(grads(masked, x, upstream), grads(psn, x, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert torch.equal(masked(x), psn(x))


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 3, 6, 9])
def test_the_mask_by_hand(dyadic: Any, order: int, lam: float) -> None:
    """W . (lam M_k + 1 - lam), M_k[i][j] = 1 where j <= i <= j + k - 1."""
    T = 6
    neuron = on_grid(MaskedPSN(T, order, lam))
    mask = torch.tensor([[float(j <= i <= j + order - 1) for j in range(T)] for i in range(T)])
    plain = PSN(T)
    plain.weight.data = neuron.weight.data * (lam * mask + (1 - lam))
    plain.bias.data = neuron.bias.data
    x, upstream = dyadic(T, 50), torch.randn(T, 50)
    assert torch.equal(neuron(x), plain(x))
    got, expected = grads(neuron, x, upstream), grads(plain, x, upstream)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], expected[2] * (lam * mask + (1 - lam)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(neuron.potentials(x), plain.potentials(x))


@pytest.mark.parametrize(("T", "order"), [(8, 3), (8, 8), (8, 12), (8, 1), (1, 3), (70, 4)])
def test_sliding_is_masked_with_equal_rows(dyadic: Any, T: int, order: int) -> None:
    sliding = on_grid(SlidingPSN(order))
    masked = MaskedPSN(T, order)
    for i in range(T):
        for j in range(max(0, i - order + 1), i + 1):
            masked.weight.data[i, j] = sliding.weight.data[order - 1 - (i - j)]
    masked.bias.data[:] = sliding.bias.data
    x, upstream = dyadic(T, 3, 30), torch.randn(T, 3, 30)
    a, b = grads(sliding, x, upstream), grads(masked, x, upstream)
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=1e-5)
    # The gradient of a weight is the sum over all its positions in the band.
    by_name = dict(zip([name for name, _ in masked.named_parameters()], b[2:], strict=True))
    mine = dict(zip([name for name, _ in sliding.named_parameters()], a[2:], strict=True))
    for i in range(order):
        back = order - 1 - i
        expected = by_name["weight"].diagonal(-back).sum() if back < T else torch.tensor(0.0)
        torch.testing.assert_close(mine["weight"][i], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine["bias"], by_name["bias"].sum(), rtol=1e-4, atol=1e-4)


def test_sliding_of_order_one_has_no_memory() -> None:
    neuron = SlidingPSN(1)
    neuron.weight.data[:], neuron.bias.data = 1.5, torch.tensor(-0.5)
    x = torch.randn(9, 50)
    assert torch.equal(neuron(x), (1.5 * x - 0.5 >= 0).float())


def test_sliding_takes_any_length_and_uses_its_last_weights() -> None:
    neuron = on_grid(SlidingPSN(6))
    short = SlidingPSN(3)
    short.weight.data, short.bias.data = neuron.weight.data[3:], neuron.bias.data
    x = torch.randint(-8, 16, (3, 50)) / 8
    assert torch.equal(neuron(x), short(x))
    for T in (1, 2, 6, 7, 100):
        assert neuron(torch.randn(T, 2, 3)).shape == (T, 2, 3)


def test_one_step_is_a_learned_threshold(dyadic: Any) -> None:
    neuron = on_grid(PSN(1))
    x = dyadic(1, 100)
    assert torch.equal(neuron(x), (neuron.weight.item() * x + neuron.bias.item() >= 0).float())


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3), (6, 2, 3, 4, 5)], ids=str)
def test_time_alone_is_mixed(dyadic: Any, shape: tuple[int, ...]) -> None:
    """One matrix for all neurons: every element's sequence gives what it gives alone; B is not T."""
    for neuron in (on_grid(PSN(6)), on_grid(MaskedPSN(6, 2)), on_grid(SlidingPSN(3))):
        x = dyadic(*shape)
        flat, out = x.flatten(1), neuron(x).flatten(1)
        for n in range(0, flat.shape[1], 7):
            assert torch.equal(neuron(flat[:, n : n + 1])[:, 0], out[:, n])


# --- causality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("make", [lambda: MaskedPSN(7, 3), lambda: MaskedPSN(7, 7), lambda: SlidingPSN(3)])
def test_causality(native: Any, make: Any, path: str) -> None:
    neuron, T = make(), 7
    with backend(path):  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            x = (torch.randn(T, 2, 60) * 2 + 1).requires_grad_()
            out = neuron(x)
            for t in range(T):
                (grad,) = torch.autograd.grad(out[t].sum(), x, retain_graph=True)
                assert not grad[t + 1 :].any()
                assert not grad[: max(0, t - neuron.order + 1)].any()
                assert grad[t].any()
                later = x.detach().clone()
                later[t + 1 :] += 10
                assert torch.equal(neuron(later)[: t + 1], out[: t + 1])
            # And still after an optimiser's step on all weights.
            optimiser = torch.optim.Adam(neuron.parameters(), lr=0.5, weight_decay=0.1)
            neuron.zero_grad()
            neuron(x).sum().backward()
            optimiser.step()


def test_psn_and_a_partial_mask_are_not_causal() -> None:
    for neuron in (PSN(5), MaskedPSN(5, 2, lam=0.5)):
        x = torch.randn(5, 40, requires_grad=True)
        (grad,) = torch.autograd.grad(neuron(x)[0].sum(), x)
        assert grad[1:].any()


# --- progressive masking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [2, 8, 9, 10, 64, 256, 257])
def test_schedule_of_lam(epochs: int) -> None:
    neuron = MaskedPSN(4, 2, lam=0.3)
    full = math.ceil((epochs - 1) / 8)
    for epoch in range(epochs):
        neuron.start_epoch(epoch, epochs)
        assert neuron.lam.item() == pytest.approx(min(1.0, 8 * epoch / (epochs - 1)))
        assert (neuron.lam.item() == 0) == (epoch == 0)
        assert (neuron.lam.item() == 1) == (epoch >= full)


def test_schedule_of_a_single_epoch() -> None:
    neuron = MaskedPSN(4, 2, lam=0.0)
    neuron.start_epoch(0, 1)
    assert neuron.lam.item() == 1


def test_lam_is_saved() -> None:
    neuron = MaskedPSN(4, 2, lam=0.25)
    assert neuron.state_dict()["lam"].item() == 0.25
    other = MaskedPSN(4, 2)
    other.load_state_dict(neuron.state_dict())
    assert other.lam.item() == 0.25
    x = torch.randn(4, 9)
    assert torch.equal(other(x), neuron(x))
    assert not neuron.lam.requires_grad


# --- step by step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("kind", ["masked", "sliding"])
def test_steps_are_the_whole(dyadic: Any, kind: str, order: int) -> None:
    T = 8
    neuron = on_grid(MaskedPSN(T, order) if kind == "masked" else SlidingPSN(order))
    x = dyadic(T, 3, 4, 5)
    whole = neuron(x)
    assert 0 < whole.sum() < whole.numel()
    for sizes in ([1] * T, [3, 5], [1, 6, 1]):
        stream = Stream(neuron)
        assert torch.equal(torch.cat([stream(chunk) for chunk in x.split(sizes)]), whole)
    # Off the grid the sums are taken in another order: potentials to 1e-5.
    neuron.weight.data += torch.randn_like(neuron.weight) * 0.1
    stream, potentials = Stream(neuron), []
    for x_t in x.split(1):
        potentials.append(neuron.potentials(x_t, stream.state(neuron)))
        stream(x_t)
    torch.testing.assert_close(torch.cat(potentials), neuron.potentials(x), rtol=1e-5, atol=1e-5)


def test_the_queue_of_sliding_is_no_longer_than_needed() -> None:
    for order in (1, 2, 5):
        neuron = SlidingPSN(order)
        stream = Stream(neuron)
        for t in range(9):
            stream(torch.randn(1, 2, 3))
            assert stream.state(neuron).shape[0] == min(t + 1, order - 1)


def test_the_queue_of_masked_is_no_longer_than_needed() -> None:
    neuron = MaskedPSN(50, 3)
    stream = Stream(neuron)
    for _ in range(50):
        stream(torch.randn(1, 2, 3))
    held = stream.state(neuron)
    numbers = sum(part.numel() for part in (held if isinstance(held, tuple) else (held,)) if isinstance(part, Tensor))
    assert numbers <= 3 * 6, "a queue of at most k past inputs"


def test_masked_refuses_to_step_while_the_mask_is_off() -> None:
    neuron = MaskedPSN(4, 2, lam=0.5)
    with pytest.raises(RuntimeError, match=r"cannot step while its mask is partly off: lam is 0\.5"):
        Stream(neuron)(torch.zeros(1, 2, 3))
    neuron.start_epoch(10, 11)
    assert Stream(neuron)(torch.zeros(1, 2, 3)).shape == (1, 2, 3)


def test_masked_refuses_one_step_too_many() -> None:
    neuron = MaskedPSN(3, 2)
    stream = Stream(neuron)
    for _ in range(3):
        stream(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"made for T = 3 steps, and the Stream has come to step 4"):
        stream(torch.zeros(1, 2, 3))
    stream.reset()
    stream(torch.zeros(3, 2, 3))
    with pytest.raises(ValueError, match="T = 3"):
        Stream(neuron)(torch.zeros(4, 2, 3))


@pytest.mark.parametrize("make", [lambda: MaskedPSN(6, 3), lambda: SlidingPSN(3)])
def test_channels_last_steps(dyadic: Any, make: Any) -> None:
    neuron = on_grid(make())
    x = dyadic(6, 2, 3, 4, 5).flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (6, 2))
    stream = Stream(neuron)
    assert torch.equal(torch.cat([stream(x_t) for x_t in x.split(1)]), neuron(x.contiguous()))


# --- invalid settings -------------------------------------------------------------------------------------------------


def test_invalid_settings() -> None:
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        PSN(0)
    for T, order, name in ((0, 1, "T"), (3, 0, "order")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            MaskedPSN(T, order)
    for lam in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"lam must lie from 0 to 1, got {lam}"):
            MaskedPSN(3, 1, lam)
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        SlidingPSN(0)
    with pytest.raises(ValueError, match="init must be 'kaiming' or 'exponential', got 'ones'"):
        SlidingPSN(2, "ones")  # pyright: ignore[reportArgumentType]


def test_autocast_keeps_the_product_in_float32() -> None:
    x = torch.randn(8, 3, 100) * 2
    for neuron in (PSN(8), MaskedPSN(8, 3), MaskedPSN(8, 3, 0.5), SlidingPSN(3), PSN(70), MaskedPSN(70, 3, 0.5)):
        given = torch.randn(70, 3, 100) * 2 if getattr(neuron, "T", 8) == 70 else x
        expected = neuron(given)
        for path in ("reference", "native"):
            with backend(path), torch.autocast("cpu", torch.bfloat16):  # pyright: ignore[reportArgumentType]
                out = neuron(given)
            assert (out != expected).float().mean() < 1e-4, (neuron, path)
