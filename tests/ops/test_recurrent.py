"""LIF with recurrent weights: the loop with its backward written out, against the definition and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.custom_surrogate import Gaussian
from torch import Tensor

from spikeloom.ops import backend
from spikeloom.ops.recurrent import recurrent_scan, recurrent_scan_reference
from spikeloom.surrogates import SURROGATES, ATan, Rectangular, Surrogate, Triangle

SURROGATE = {name: SURROGATES[name]() for name in SURROGATES} | {
    "closed": Rectangular(closed=True),
    "narrow": Triangle(0.5),
    "own": Gaussian(),
}
LAST = ("synapse", "membrane", "fed")


def inputs(T: int, N: int, F: int, dtype: torch.dtype = torch.float32, relu: bool = False) -> dict[str, Tensor]:
    fed = torch.rand(N, F) if relu else torch.randint(0, 2, (N, F)).float()
    made = {
        "x": torch.randn(T, N, F) * 1.5 + 0.5,
        "weight": torch.randn(F, F) / F**0.5,
        "bias": torch.randn(F) * 0.2,
        "synapse": torch.randn(N, F),
        "membrane": torch.randn(N, F) * 0.3,
        "fed": fed,
    }
    return {key: value.to(dtype) for key, value in made.items()}


def run(
    name: str,
    given: dict[str, Tensor],
    relu: bool,
    carried: bool,
    surrogate: Surrogate = ATan(),  # noqa: B008
    alpha: float = 0.6,
    beta: float = 0.7,
    outputs: tuple[str, ...] = ("spikes", *LAST),
) -> dict[str, Tensor]:
    """Outputs and every gradient of one backend."""
    leaves = {key: value.detach().clone().requires_grad_() for key, value in given.items()}
    state = tuple(leaves[key] for key in LAST) if carried else None
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes, last = recurrent_scan(
            leaves["x"],
            leaves["weight"],
            leaves["bias"],
            alpha,
            beta,
            0.5,
            surrogate,
            relu,
            state,  # pyright: ignore
        )
    out = {"spikes": spikes, **dict(zip(LAST, last, strict=True))}
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(
        [out[key] for key in outputs],
        [torch.randn(out[key].shape, generator=generator).to(out[key].dtype) for key in outputs],
    )
    results = {key: value.detach() for key, value in out.items()}
    results |= {f"grad_{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return results


def same(fast: dict[str, Tensor], slow: dict[str, Tensor], tracks: Any) -> None:
    assert fast.keys() == slow.keys()
    assert torch.equal(fast["spikes"], slow["spikes"])
    for key in LAST:
        assert tracks(fast[key], slow[key]) < 1e-5, key
    for key in fast.keys() - {"spikes", *LAST}:
        # Weights and bias sum over steps and samples, terms cancel: within a few roundings of the largest.
        assert tracks(fast[key], slow[key]) < (1e-5 if key in ("grad_x", "grad_synapse", "grad_fed") else 5e-5), key


@pytest.mark.parametrize("T", [1, 2, 7, 33])
@pytest.mark.parametrize("carried", [False, True], ids=["rest", "state"])
@pytest.mark.parametrize("relu", [False, True], ids=["spikes", "relu"])
@pytest.mark.parametrize(("N", "F"), [(3, 5), (1, 1), (17, 33)])
def test_fast_equals_reference(native: Any, tracks: Any, N: int, F: int, relu: bool, carried: bool, T: int) -> None:
    given = inputs(T, N, F, relu=relu)
    fast, slow = (run(name, given, relu, carried) for name in ("native", "reference"))
    assert slow["spikes"].sum() > 0 or slow["spikes"].numel() < 100
    same(fast, slow, tracks)


@pytest.mark.parametrize("relu", [False, True], ids=["spikes", "relu"])
@pytest.mark.parametrize("surrogate", SURROGATE)
def test_every_surrogate(native: Any, tracks: Any, surrogate: str, relu: bool) -> None:
    given = inputs(9, 4, 11, relu=relu)
    fast, slow = (run(name, given, relu, True, SURROGATE[surrogate]) for name in ("native", "reference"))
    same(fast, slow, tracks)


@pytest.mark.parametrize("relu", [False, True], ids=["spikes", "relu"])
@pytest.mark.parametrize("output", ["spikes", *LAST])
def test_one_output_alone(native: Any, tracks: Any, output: str, relu: bool) -> None:
    given = inputs(6, 4, 11, relu=relu)
    fast, slow = (run(name, given, relu, True, outputs=(output,)) for name in ("native", "reference"))
    for key in slow:
        if key in fast:
            assert tracks(fast[key], slow[key]) < 5e-5, key


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.7), (0.95, 0.0), (0.0, 0.0), (1.0, 0.9)])
def test_limits_of_the_decays(native: Any, tracks: Any, alpha: float, beta: float) -> None:
    given = inputs(7, 4, 11)
    fast, slow = (run(name, given, False, True, alpha=alpha, beta=beta) for name in ("native", "reference"))
    same(fast, slow, tracks)


@pytest.mark.parametrize("how", ["transposed", "repeated", "every_second"])
def test_any_layout(native: Any, tracks: Any, how: str) -> None:
    given = inputs(6, 4, 10)
    x = given["x"]
    given["x"] = {
        "transposed": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "repeated": x[0].expand(x.shape),
        "every_second": x.repeat_interleave(2, 2)[:, :, ::2],
    }[how]
    leaf = given["x"].detach()
    results = []
    for name in ("native", "reference"):
        leaf = given["x"].detach().requires_grad_()
        with backend(name):
            spikes, _ = recurrent_scan(leaf, given["weight"], given["bias"], 0.6, 0.7, 0.5, ATan(), False)
        (grad,) = torch.autograd.grad(spikes, leaf, torch.ones_like(spikes))
        results.append((spikes, grad))
    assert torch.equal(results[0][0], results[1][0])
    assert tracks(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("relu", [False, True], ids=["spikes", "relu"])
def test_the_equations_by_hand(relu: bool) -> None:
    given = inputs(5, 1, 3, torch.float64, relu)
    out = run("reference", given, relu, True)
    synapse, membrane, fed = (given[key][0].tolist() for key in LAST)
    for t in range(5):
        current = [
            0.6 * synapse[i]
            + given["x"][t, 0, i].item()
            + given["bias"][i].item()
            + sum(given["weight"][i, j].item() * fed[j] for j in range(3))
            for i in range(3)
        ]
        m = [0.7 * membrane[i] + 0.3 * current[i] for i in range(3)]
        s = [float(v > 0.5) for v in m]
        assert out["spikes"][t, 0].tolist() == s
        synapse, membrane = current, [v * (1 - f) for v, f in zip(m, s, strict=True)]
        fed = [max(v, 0.0) for v in membrane] if relu else s
    for key, expected in zip(LAST, (synapse, membrane, fed), strict=True):
        assert out[key][0].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_tie_does_not_fire(native: Any) -> None:
    for name in ("native", "reference"):
        with backend(name):
            spikes, last = recurrent_scan(
                torch.tensor([[[0.5, 0.625]]]), torch.zeros(2, 2), torch.zeros(2), 0.0, 0.0, 0.5, ATan(), False
            )
        assert spikes.flatten().tolist() == [0, 1]
        assert last[1].flatten().tolist() == [0.5, 0]


def test_gradients_of_the_definition() -> None:
    """Numeric differentiation, with the smooth function in place of the step; where no reset has a gradient to lose."""

    class Soft(Surrogate):
        def __call__(self, x: Tensor, strict: bool = False) -> Tensor:
            return torch.sigmoid(2 * x)

    given = inputs(3, 2, 3, torch.float64)
    leaves = [given[key].requires_grad_() for key in ("x", "weight", "bias", *LAST)]

    def soft(x: Tensor, weight: Tensor, bias: Tensor, *state: Tensor) -> Tensor:
        spikes, _ = recurrent_scan_reference(
            x[:1],
            weight,
            bias,
            0.6,
            0.7,
            0.5,
            Soft(),
            False,
            state,  # pyright: ignore
        )
        return spikes

    assert torch.autograd.gradcheck(soft, leaves)


def test_number_of_threads(native: Any, tracks: Any) -> None:
    given, results = inputs(6, 40, 65), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run("native", given, False, True))
    # Matrix products are PyTorch's own.
    same(results[1], results[0], tracks)


def test_inputs_are_left_alone(native: Any) -> None:
    given = inputs(5, 3, 7)
    copies = {key: value.clone() for key, value in given.items()}
    run("native", given, True, True)
    for key, value in copies.items():
        assert torch.equal(given[key], value), key


def test_every_output_is_written(native: Any, dirty_memory: None, tracks: Any) -> None:
    given = inputs(5, 3, 7)
    same(run("native", given, False, False), run("reference", given, False, False), tracks)
