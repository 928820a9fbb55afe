"""Products over time and their threshold: the fused kernel against the matrix product it stands for."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from helpers.custom_surrogate import Gaussian
from helpers.pairwise import pairwise
from torch import Tensor

from spikeloom.errors import UsageError
from spikeloom.ops import backend, psn, sliding_psn
from spikeloom.surrogates import SLOPE, SURROGATES, ATan, Rectangular, Surrogate, Triangle

module = sys.modules[psn.__module__]


SURROGATE = {name: SURROGATES[name]() for name in SURROGATES} | {
    "closed": Rectangular(closed=True),
    "narrow": Triangle(0.5),
    "own": Gaussian(),
}


def eighths(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Random multiples of 1/8: their products and sums are exact in float32, in whatever order."""
    return torch.randint(round(low * 8), round(high * 8) + 1, shape) / 8


def call(form: str, x: Tensor, weight: Tensor, bias: Tensor, surrogate: Surrogate) -> Tensor:
    """`form`: psn, bandK (masked of order K) or slideK."""
    if form.startswith("slide"):
        return sliding_psn(x, weight, bias, surrogate)
    return psn(x, weight, bias, surrogate, None if form == "psn" else int(form.removeprefix("band")))


def parameters(form: str, T: int) -> tuple[Tensor, Tensor]:
    """Weights and biases on the grid; the present step always counts, so that there are spikes."""
    if form.startswith("slide"):
        weight = eighths(int(form.removeprefix("slide")))
        weight[-1] = 0.875
        return weight, torch.tensor(-0.125)
    return eighths(T, T).fill_diagonal_(0.875), eighths(T, low=-1, high=0)


def run(
    name: str, form: str, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, surrogate: Surrogate
) -> dict[str, Tensor]:
    """Spikes and every gradient of one backend."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes = call(form, x, weight, bias, surrogate)
    spikes.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return {"spikes": spikes.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad}


def compare(
    tracks: Any,
    form: str,
    x: Tensor,
    grad: Tensor,
    surrogate: Surrogate = ATan(),  # noqa: B008
) -> dict[str, Tensor]:
    weight, bias = parameters(form, x.shape[0])
    fast, slow = (run(name, form, x, weight, bias, grad, surrogate) for name in ("native", "reference"))
    low = x.dtype == torch.bfloat16
    assert slow["spikes"].sum() > 0 or slow["spikes"].numel() < 200, "a test without spikes tests little"
    assert fast["spikes"].dtype == fast["x"].dtype == x.dtype
    assert torch.equal(fast["spikes"], slow["spikes"].to(x.dtype))
    # Sums over steps whose terms cancel: rounding is relative to the largest; bfloat16 is rounded once more.
    assert tracks(fast["x"], slow["x"]) < (2**-7 if low else 1e-5)
    peak = max(1.0, surrogate.derivative(torch.linspace(-1, 1, 101)).max().item())
    terms = grad.float().abs().flatten(1) @ x.float().abs().flatten(1).T * peak
    sizes = {"weight": terms, "bias": grad.float().abs().flatten(1).sum(1) * peak}
    for key, size in sizes.items():
        # Sums over all neurons, whose terms cancel: rounding is relative to the terms.
        assert fast[key].shape == slow[key].shape
        assert fast[key].dtype == torch.float32
        bound = 1e-6 * (size.sum() if form.startswith("slide") else size) + 1e-30
        assert ((fast[key] - slow[key]).abs() <= bound).all(), key
    return fast


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return eighths(*shape, high=2.0).to(dtype), torch.randn(shape).to(dtype)


FORMS = ["psn", "band1", "band3", "band40", "slide1", "slide3", "slide40"]
STEPS = [1, 2, 7, 33, 64, 65, 70]


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_native_equals_reference(native: Any, tracks: Any, form: str, dtype: torch.dtype, T: int) -> None:
    compare(tracks, form, *inputs((T, 3, 5, 7), dtype))


@pytest.mark.parametrize("form", ["psn", "band2", "slide4"])
@pytest.mark.parametrize("surrogate", SURROGATE)
def test_every_surrogate(native: Any, tracks: Any, surrogate: str, form: str) -> None:
    for T in (7, 65):
        compare(tracks, form, *inputs((T, 3, 35)), SURROGATE[surrogate])


@pytest.mark.parametrize("form", ["psn", "band2", "band7", "band9", "slide7", "slide9"])
def test_order_around_the_length(native: Any, tracks: Any, form: str) -> None:
    for T in (7, 8, 1):
        compare(tracks, form, *inputs((T, 150)))


LAYOUTS = {
    "channels_last": lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "time_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "batch_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second_channel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every_second_step": lambda x: x.repeat_interleave(2, 0)[::2],
    "repeated": lambda x: x[0].expand(x.shape),
    "repeated_channels_last": lambda x: x[0].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "broadcast_over_batch": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize(*pairwise(name=LAYOUTS, own=(False, True), form=("psn", "band3", "slide3"), T=(1, 2, 7, 66)))
def test_any_layout(native: Any, tracks: Any, name: str, own: bool, form: str, T: int) -> None:
    x, grad = inputs((T, 2, 3, 5, 7))
    for other in ("channels_last", "time_last"):
        compare(tracks, form, LAYOUTS[name](x), LAYOUTS[other](grad), SURROGATE["own" if own else "ATan"])


@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
@pytest.mark.parametrize("T", [4, 66])
def test_channels_last_stays(native: Any, form: str, T: int) -> None:
    x = LAYOUTS["channels_last"](torch.randn(T, 2, 3, 5, 7)).requires_grad_()
    spikes = call(form, x, *parameters(form, T), ATan())
    assert spikes.stride() == x.stride()
    spikes.sum().backward()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1023, 1024, 1025, 20_009])
@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
def test_any_size(native: Any, tracks: Any, form: str, size: int) -> None:
    for T in (1, 5):
        compare(tracks, form, *inputs((T, size)))


@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_instruction_level(native: Any, tracks: Any, dtype: torch.dtype, form: str) -> None:
    x, grad = inputs((7, 10_011), dtype)
    for level in native.levels():
        native.set_level(level)
        compare(tracks, form, x, grad)


@pytest.mark.parametrize("surrogate", ["ATan", "own"])
@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
def test_number_of_threads_changes_nothing(native: Any, form: str, surrogate: str) -> None:
    x, grad = torch.randn(6, 50_021), torch.randn(6, 50_021)
    weight, bias = parameters(form, 6)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("native", form, x, weight, bias, grad, SURROGATE[surrogate]))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("shape", [(5, 3, 1), (3, 2, 3, 5, 7), (4, 20_011)], ids=str)
@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
@pytest.mark.parametrize("surrogate", ["ATan", "own"])
def test_every_output_is_written(
    native: Any, dirty_memory: None, tracks: Any, surrogate: str, form: str, shape: tuple[int, ...]
) -> None:
    assert torch.empty(3).isnan().all()
    compare(tracks, form, *inputs(shape), SURROGATE[surrogate])


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
@pytest.mark.parametrize("shape", [(4, 2, 0, 5), (3, 0), (66, 0), (1, 0, 2)], ids=str)
def test_empty_space(native: Any, shape: tuple[int, ...], form: str, name: str) -> None:
    x, weight, bias = torch.zeros(shape), *parameters(form, shape[0])
    got = run(name, form, x, weight, bias, torch.zeros(shape), ATan())
    assert got["spikes"].shape == got["x"].shape == shape
    assert not got["weight"].any()
    assert not got["bias"].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 7, 64, 65])
def test_potentials_are_within_rounding(native: Any, form: str, T: int) -> None:
    """On numbers off the grid: the kernel sums in an order of its own, so spikes may differ at the threshold alone."""
    x = torch.randn(T, 500)
    weight, bias = parameters(form, T)
    weight, bias = weight + torch.randn_like(weight), bias + torch.randn_like(bias)
    sliding = form.startswith("slide")
    order = weight.shape[0] if sliding else 0 if form == "psn" else min(int(form[4:]), T)
    h = module._psn_potentials(x, weight, bias.view(-1) if sliding else bias, order, sliding)
    matrix = module.sliding_matrix(weight, T) if sliding else weight
    matrix = matrix * module.band_mask(T, order, weight) if order and not sliding else matrix
    exact = matrix.double() @ x.double() + bias.double().view(-1, 1)
    terms = matrix.double().abs() @ x.double().abs() + bias.double().abs().view(-1, 1)
    rounding = 2**-23 * T * terms
    assert ((h.double() - exact).abs() <= rounding).all()
    clear = exact.abs() > rounding
    assert clear.float().mean() > 0.99
    for name in ("native", "reference"):
        with backend(name):
            spikes = call(form, x, weight, bias, ATan())
        assert torch.equal(spikes[clear], (exact >= 0).float()[clear])


def test_ties_fire(native: Any) -> None:
    for name in ("native", "reference"):
        with backend(name):
            assert psn(torch.full((2, 3), 0.5), torch.eye(2), torch.full((2,), -0.5), ATan()).all()
            assert sliding_psn(torch.full((2, 3), 0.5), torch.ones(1), torch.tensor(-0.5), ATan()).all()


@pytest.mark.parametrize("name", ["native", "reference"])
def test_gradients_by_hand(native: Any, name: str) -> None:
    """dL/dh = g sigma'(h); dL/dW = dh X^T within the band, dL/db its sum, dL/dX = W^T dh."""
    T, order = 6, 3
    x, grad, (weight, bias) = torch.randn(T, 40), torch.randn(T, 40), parameters("psn", T)
    surrogate = ATan()
    for form in ("psn", f"band{order}", f"slide{order}"):
        w = eighths(order) if form.startswith("slide") else weight
        b = torch.tensor(-0.25) if form.startswith("slide") else bias
        got = run(name, form, x, w, b, grad, surrogate)
        mask = torch.ones(T, T) if form == "psn" else torch.ones(T, T).tril().triu(1 - order)
        matrix = (
            sum(
                (w[i] * torch.diag(torch.ones(T - (order - 1 - i)), -(order - 1 - i)) for i in range(order)),
                torch.zeros(T, T),
            )
            if form.startswith("slide")
            else w * mask
        )
        dh = grad * surrogate.derivative(matrix @ x + (b if b.dim() == 0 else b.unsqueeze(1)))
        torch.testing.assert_close(got["x"], matrix.T @ dh, rtol=1e-5, atol=1e-5)
        full = dh @ x.T * mask
        if form.startswith("slide"):
            # The sum over all positions in the band, which must not be cut from the graph.
            diagonals = torch.stack([full.diagonal(-(order - 1 - i)).sum() for i in range(order)])
            torch.testing.assert_close(got["weight"], diagonals, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(got["bias"], dh.sum(), rtol=1e-5, atol=1e-4)
        else:
            torch.testing.assert_close(got["weight"], full, rtol=1e-5, atol=1e-4)
            assert not got["weight"][mask == 0].any()
            torch.testing.assert_close(got["bias"], dh.sum(1), rtol=1e-5, atol=1e-4)


def test_weights_outside_the_band_are_not_read(native: Any) -> None:
    x, weight, bias = eighths(6, 30, high=2.0), eighths(6, 6), eighths(6, low=-1, high=0)
    outside = torch.ones(6, 6) - torch.ones(6, 6).tril().triu(-1)
    for name in ("native", "reference"):
        with backend(name):
            expected = psn(x, weight, bias, ATan(), order=2)
            assert torch.equal(psn(x, weight + 100 * outside, bias, ATan(), order=2), expected)
    with backend("native"):
        assert torch.equal(psn(x, weight.masked_fill(outside > 0, float("nan")), bias, ATan(), order=2), expected)


def test_sliding_is_a_band_of_equal_rows(native: Any) -> None:
    for T, order in ((7, 3), (7, 7), (7, 12), (1, 4), (70, 5)):
        x, weight = eighths(T, 50, high=2.0), eighths(order)
        matrix = module.sliding_matrix(weight, T)
        bias = torch.tensor(-0.25)
        for name in ("native", "reference"):
            with backend(name):
                a = sliding_psn(x, weight, bias, ATan())
                b = psn(x, matrix, bias.expand(T), ATan(), order)
            assert torch.equal(a, b)
        # A convolution over time with k - 1 zeros in front.
        padded = torch.cat([torch.zeros(order - 1, 50), x]).T.unsqueeze(1)
        h = torch.nn.functional.conv1d(padded, weight.view(1, 1, -1))[:, 0].T + bias
        assert torch.equal(a, (h >= 0).float())


def test_float64_stays_with_the_reference(native: Any) -> None:
    x, weight, bias = eighths(4, 9).double(), eighths(4, 4).double(), eighths(4).double()
    assert psn(x, weight, bias, ATan()).dtype == torch.float64
    with backend("native"), pytest.raises(UsageError, match=r"psn.*float64.*reference"):
        psn(x, weight, bias, ATan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("T", [7, 65])
@pytest.mark.parametrize("form", ["psn", "band3", "slide3"])
def test_spikes_have_the_precision_of_the_input(native: Any, form: str, T: int, dtype: torch.dtype) -> None:
    """Weights stay float32 beside inputs of another precision."""
    x = eighths(T, 20).to(dtype).requires_grad_()
    with backend("reference"):
        reference = call(form, x, *parameters(form, T), ATan())
    assert reference.dtype == dtype
    assert call(form, x, *parameters(form, T), ATan()).dtype == dtype


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "channels_last", "repeated"])
def test_custom_ops_obey_the_rules(native: Any, how: str) -> None:
    x, grad = inputs((3, 2, 3, 4, 5))
    if how != "plain":
        x = LAYOUTS[how](x)
    ops = torch.ops.spikeloom
    for order, sliding, weight, bias in (
        (0, False, eighths(3, 3), eighths(3)),
        (2, False, eighths(3, 3), eighths(3)),
        (2, True, eighths(2), eighths(1)),
    ):
        learned = (x.detach().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_())
        torch.library.opcheck(ops.psn.default, (*learned, None, order, sliding, *ATan().formula))
        torch.library.opcheck(ops.psn_potentials.default, (x, weight, bias, order, sliding))
        for slope, formula in ((None, ATan().formula), (torch.rand(x.shape), SLOPE)):
            torch.library.opcheck(ops.psn_backward.default, (grad, x, weight, bias, slope, order, sliding, *formula))
