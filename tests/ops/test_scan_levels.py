"""The scan with several thresholds, with a rectified charge, and with the strict rule: kernel against definition."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.custom_surrogate import Gaussian
from helpers.pairwise import pairwise
from torch import Tensor

from spikeloom.ops import backend, scan
from spikeloom.ops.scan.params import ScanParams
from spikeloom.surrogates import SLOPE, SURROGATES, ATan, Rectangular, Surrogate, Triangle

scan_module = sys.modules[scan.__module__]
Thresholds = float | tuple[float, ...]


SURROGATE = {name: SURROGATES[name]() for name in SURROGATES} | {
    "closed": Rectangular(closed=True),
    "narrow": Triangle(0.5),
    "own": Gaussian(),
}
DTYPES = (torch.float32, torch.bfloat16)
LEVELS: dict[str, Thresholds] = {
    "none": 0.9,
    "one": (0.6,),
    "two": (0.6, 1.6),
    "three": (0.6, 1.6, 2.6),
    "five": (0.25, 0.5, 1.0, 1.25, 3.0),
}


def run(
    name: str,
    x: Tensor,
    v: Tensor | None,
    grad: Tensor,
    grad_last: Tensor,
    thresholds: Thresholds,
    scale: float | None = None,
    strict: bool = False,
    v_reset: float | None = 0.0,
    surrogate: Surrogate = ATan(),  # noqa: B008
    detach: bool = False,
) -> dict[str, Tensor]:
    """Outputs and every gradient of one backend."""
    x = x.detach().requires_grad_()
    v = None if v is None else v.detach().requires_grad_()
    names = ("decay", "gain") if scale is None else ("decay", "gain", "scale")
    constants = {key: torch.tensor(c, requires_grad=True) for key, c in zip(names, (0.6, 0.7, scale), strict=False)}
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes, last = scan(
            x,
            v,
            constants["decay"],
            constants["gain"],
            thresholds,
            v_reset,
            surrogate,
            detach,
            scale=constants.get("scale"),
            strict=strict,
        )
    assert last is not None
    torch.autograd.backward([spikes, last], [grad, grad_last])
    out: dict[str, Tensor | None] = {"spikes": spikes, "last": last, "x": x.grad}
    out |= {key: c.grad for key, c in constants.items()}
    if v is not None:
        out["v"] = v.grad
    return {key: value.detach() for key, value in out.items() if value is not None}


def inputs(
    shape: tuple[int, ...], thresholds: Thresholds, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Currents, initial potentials, and gradients on spikes and last potentials."""
    levels = (len(thresholds),) if isinstance(thresholds, tuple) else ()
    state = (*levels, *shape[1:])
    return (
        torch.randn(shape).mul(2).add(0.8).to(dtype),
        torch.randn(state) * 0.5,
        torch.randn(shape).to(dtype),
        torch.randn(state),
    )


def compare(
    tracks: Any, x: Tensor, v: Tensor | None, grad: Tensor, grad_last: Tensor, thresholds: Thresholds, **settings: Any
) -> None:
    arguments = x, v, grad, grad_last, thresholds
    fast, slow = run("native", *arguments, **settings), run("reference", *arguments, **settings)
    assert fast.keys() == slow.keys()
    assert slow["spikes"].sum() > 0 or slow["spikes"].numel() < 100, "a test without spikes tests little"
    assert torch.equal(fast["spikes"], slow["spikes"])
    assert torch.equal(fast["last"], slow["last"])
    assert fast["spikes"].dtype == slow["spikes"].dtype == fast["x"].dtype == x.dtype
    # bfloat16 gradients are rounded once, on either side of a tie perhaps.
    assert tracks(fast["x"], slow["x"]) < (1e-5 if x.dtype == torch.float32 else 2**-7)
    if "v" in fast:
        assert tracks(fast["v"], slow["v"]) < 1e-5
    for key in ("decay", "gain", "scale"):
        if key in fast:
            # Sums over all elements, steps and levels, whose terms cancel: rounding is relative to the terms. Each is
            # a gradient of the charge, at most that of every level alone, times a potential or current.
            size = slow["x"].float().abs().sum() + grad.float().abs().sum() + grad_last.abs().sum()
            size = size * (1 + slow["last"].abs().max())
            assert (fast[key] - slow[key]).abs() <= 2e-6 * size, key


@pytest.mark.parametrize(
    *pairwise(name=LEVELS, dtype=DTYPES, detach=(True, False), carried=(False, True), T=(1, 2, 7, 70))
)
def test_levels(native: Any, tracks: Any, name: str, dtype: torch.dtype, detach: bool, carried: bool, T: int) -> None:
    thresholds = LEVELS[name]
    x, v, grad, grad_last = inputs((T, 3, 5, 7), thresholds, dtype)
    for v_reset in (0.0, None):
        for strict in (False, True):
            compare(
                tracks,
                x,
                v if carried else None,
                grad,
                grad_last,
                thresholds,
                v_reset=v_reset,
                strict=strict,
                detach=detach,
            )


@pytest.mark.parametrize(
    *pairwise(
        scale=(1.0, 1.5, 0.25, -0.75),
        dtype=DTYPES,
        v_reset=(0.0, -0.3, 0.2, None),
        carried=(False, True),
        T=(1, 2, 7, 70),
    )
)
def test_rectified(
    native: Any, tracks: Any, scale: float, dtype: torch.dtype, v_reset: float | None, carried: bool, T: int
) -> None:
    x, v, grad, grad_last = inputs((T, 3, 5, 7), 0.4, dtype)
    for detach in (True, False):
        for strict in (False, True):
            compare(
                tracks,
                x,
                v if carried else None,
                grad,
                grad_last,
                0.4,
                scale=scale,
                v_reset=v_reset,
                strict=strict,
                detach=detach,
            )


@pytest.mark.parametrize("surrogate", SURROGATE)
def test_every_surrogate(native: Any, tracks: Any, surrogate: str) -> None:
    for thresholds, scale in ((LEVELS["three"], None), (0.5, 1.25), (LEVELS["two"], 1.25)):
        for strict in (False, True):
            compare(
                tracks,
                *inputs((9, 4, 33), thresholds),
                thresholds,
                scale=scale,
                strict=strict,
                surrogate=SURROGATE[surrogate],
            )


LAYOUTS = {
    "channels_last": lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "time_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every_second_channel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "repeated": lambda x: x[0].expand(x.shape),
    "repeated_channels_last": lambda x: x[0].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "broadcast_over_batch": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("own", [False, True], ids=["fused", "slope"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(native: Any, tracks: Any, name: str, own: bool, T: int) -> None:
    for thresholds in (LEVELS["three"], LEVELS["one"]):
        x, v, grad, grad_last = inputs((T, 2, 3, 5, 7), thresholds)
        for other in ("channels_last", "time_last"):
            compare(
                tracks,
                LAYOUTS[name](x),
                LAYOUTS[other](v),
                LAYOUTS[other](grad),
                LAYOUTS[other](grad_last),
                thresholds,
                surrogate=SURROGATE["own" if own else "ATan"],
            )


@pytest.mark.parametrize("size", [1, 63, 511, 1025, 8191, 20_009])
def test_any_size(native: Any, tracks: Any, size: int) -> None:
    for T in (1, 5, 33):
        compare(tracks, *inputs((T, size), LEVELS["three"]), LEVELS["three"])
        compare(tracks, *inputs((T, size), 0.5), 0.5, scale=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_instruction_level(native: Any, tracks: Any, dtype: torch.dtype) -> None:
    for level in native.levels():
        native.set_level(level)
        compare(tracks, *inputs((7, 10_011), LEVELS["three"], dtype), LEVELS["three"])
        compare(tracks, *inputs((7, 10_011), 0.5, dtype), 0.5, scale=1.5, strict=True)


def test_number_of_threads_changes_nothing(native: Any) -> None:
    for thresholds, scale in ((LEVELS["three"], None), (0.5, 1.5)):
        arguments, results = inputs((6, 50_021), thresholds), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("native", *arguments, thresholds, scale=scale))
        for other in results[1:]:
            for key, value in results[0].items():
                assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("surrogate", ["ATan", "own"])
def test_every_output_is_written(native: Any, dirty_memory: None, tracks: Any, surrogate: str) -> None:
    for shape in ((5, 3, 1), (4, 20_011)):
        compare(tracks, *inputs(shape, LEVELS["three"]), LEVELS["three"], surrogate=SURROGATE[surrogate])
        compare(tracks, *inputs(shape, 0.5), 0.5, scale=1.5, surrogate=SURROGATE[surrogate])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_empty_space(native: Any, name: str) -> None:
    got = run(name, *inputs((4, 2, 3, 0), LEVELS["three"]), LEVELS["three"])
    assert got["spikes"].shape == (4, 2, 3, 0)
    assert got["last"].shape == (3, 2, 3, 0)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_levels_are_scans_of_their_own(native: Any, name: str) -> None:
    """The sum of scans, one a threshold, with their gradients."""
    thresholds = LEVELS["five"]
    assert isinstance(thresholds, tuple)
    x, v, grad, grad_last = inputs((12, 300), thresholds)
    together = run(name, x, v, grad, grad_last, thresholds)
    alone = [run(name, x, v[k], grad, grad_last[k], level) for k, level in enumerate(thresholds)]
    assert torch.equal(together["spikes"], torch.stack([a["spikes"] for a in alone]).sum(0))
    for key in ("last", "v"):
        torch.testing.assert_close(together[key], torch.stack([a[key] for a in alone]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(together["x"], torch.stack([a["x"] for a in alone]).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_strict_differs_at_ties_alone(native: Any, dyadic: Any, name: str) -> None:
    x = dyadic(1, 4000)
    with backend(name):  # pyright: ignore[reportArgumentType]
        loose, last = scan(x, None, 0.5, 1.0, 0.5, 0.0, ATan(), True)
        strict, kept = scan(x, None, 0.5, 1.0, 0.5, 0.0, ATan(), True, strict=True)
        levels, _ = scan(x, None, 0.5, 1.0, (0.5, 1.0), 0.0, ATan(), True, strict=True)
    assert torch.equal(loose, (x >= 0.5).float())
    assert torch.equal(strict, (x > 0.5).float())
    assert torch.equal(levels, (x > 0.5).float() + (x > 1.0).float())
    assert (loose != strict).sum() > 50
    assert last is not None
    assert kept is not None
    tie = x[0] == 0.5
    assert not last[tie].any()
    assert (kept[tie] == 0.5).all()


@pytest.mark.parametrize("threshold", [0.0, 1e-30, -0.5, 1e30])
def test_strict_at_unusual_thresholds(native: Any, threshold: float) -> None:
    x = torch.tensor([[threshold, -1.0, 0.0, 1.0, 2e30, -2e30]])
    for name in ("native", "reference"):
        with backend(name):
            for strict in (False, True):
                spikes, _ = scan(x, None, 0.0, 1.0, threshold, None, ATan(), True, strict=strict)
                assert torch.equal(spikes, ((x > threshold) if strict else (x >= threshold)).float())


def test_rectified_by_hand(native: Any, dyadic: Any) -> None:
    """F = relu(k H), V = F - V_th S: one neuron in Python, on numbers that are exact."""
    x = dyadic(12, 200)
    for name in ("native", "reference"):
        with backend(name):
            spikes, last = scan(x, None, 0.5, 0.5, 0.5, None, ATan(), True, scale=1.5)
        assert last is not None
        f_all = scan_module.potentials(x, None, 0.5, 0.5, 0.5, None, 1.5)
        for n in range(200):
            v = 0.0
            for t in range(8):  # beyond, 1.5^t needs more digits than float32 has
                f = max(0.0, 1.5 * (0.5 * v + 0.5 * x[t, n].item()))
                s = float(f >= 0.5)
                v = f - 0.5 * s
                assert f_all[t, n] == pytest.approx(f, rel=1e-6)
                assert spikes[t, n] == s or abs(f - 0.5) < 1e-6


@pytest.mark.parametrize("path", ["native", "reference"])
def test_gradient_of_the_rectifier(native: Any, path: str) -> None:
    """At T = 1, S = Theta(relu(k x) - V_th): dS/dx = sigma' k and dS/dk = sigma' x where x > 0, none below."""
    x = torch.tensor([[-1.0, -0.125, 0.0, 0.25, 0.5, 2.0]], requires_grad=True)
    k = torch.tensor(1.5, requires_grad=True)
    with backend(path):  # pyright: ignore[reportArgumentType]
        spikes, _ = scan(x, None, 0.5, 1.0, 0.5, 0.0, ATan(), True, scale=k)
    spikes.sum().backward()
    values = x.detach()[0]
    slope = ATan().derivative(torch.relu(1.5 * values) - 0.5) * (values > 0)
    assert x.grad is not None
    assert k.grad is not None
    torch.testing.assert_close(x.grad[0], slope * 1.5)
    torch.testing.assert_close(k.grad, (slope * values).sum())


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "channels_last", "repeated"])
@pytest.mark.parametrize("carried", [True, False], ids=["state", "rest"])
def test_custom_ops_obey_the_rules(native: Any, carried: bool, how: str) -> None:
    x, v, grad, grad_last = inputs((3, 2, 3, 4, 5), LEVELS["two"])
    if how != "plain":
        x = LAYOUTS[how](x)
    thresholds = (0.6, 1.6)
    start = v if carried else None
    constants = [torch.tensor(c) for c in (0.6, 0.7, 1.25)]
    learned = [torch.tensor(c, requires_grad=carried) for c in (0.6, 0.7, 1.25)]
    ops = torch.ops.spikeloom
    first = None if start is None else start.clone().requires_grad_()
    numbers = ScanParams(thresholds, 0.0, True, False, ATan().formula).pack()
    torch.library.opcheck(ops.scan.default, (x.detach().requires_grad_(), first, *learned, None, numbers, True))
    torch.library.opcheck(ops.scan_potentials.default, (x, start, *constants, numbers))
    for slope, formula in ((None, ATan().formula), (torch.rand(2, 3, 2, 3, 4, 5), SLOPE)):
        torch.library.opcheck(
            ops.scan_backward.default,
            (
                grad,
                grad_last if carried else None,
                x,
                start,
                *constants,
                slope,
                None,
                ScanParams(thresholds, None, True, True, formula).pack(),
                True,
            ),
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [("three", None), ("none", 1.25), ("two", 1.25)])
@pytest.mark.parametrize("T", [3, 19])
def test_compiled_equals_reference(tracks: Any, T: int, name: str, scale: float | None) -> None:
    torch._dynamo.reset()
    thresholds = LEVELS[name]
    arguments = *inputs((T, 3, 5), thresholds), thresholds
    for strict in (False, True):
        fast, slow = (run(path, *arguments, scale=scale, strict=strict) for path in ("compiled", "reference"))
        assert torch.equal(fast["spikes"], slow["spikes"])
        for key in ("last", "x", "v"):
            assert tracks(fast[key], slow[key]) < 1e-5, key
        for key in {"decay", "gain", "scale"} & fast.keys():
            assert tracks(fast[key], slow[key]) < 1e-4, key
