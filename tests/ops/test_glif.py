"""GLIF's recurrence: the kernel against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.custom_surrogate import Gaussian
from helpers.pairwise import pairwise
from torch import Tensor

from spikeloom.ops import backend, gated_scan, gated_scan_reference
from spikeloom.surrogates import SURROGATES, ATan, Rectangular, Surrogate, Triangle

SURROGATE = {name: SURROGATES[name]() for name in SURROGATES} | {
    "closed": Rectangular(closed=True),
    "narrow": Triangle(0.5),
    "own": Gaussian(),
}
NAMES = ("decay", "drop", "leak", "gate", "threshold")


def constants(x: Tensor, hard: bool = False) -> tuple[Tensor, Tensor]:
    """The input's gate, and decay, drop, leak, gate, threshold, within the range that GLIF's sigmoids give."""
    T, C = x.shape[0], x.shape[2]
    decay, drop, leak, gate, threshold = torch.rand(5, C)
    if hard:
        gate = gate.round()
    return torch.rand(T, C) * 0.5 + 0.5, torch.stack([decay, drop * 0.5, leak * 0.1, gate, threshold * 0.6 + 0.1])


def run(
    name: str,
    x: Tensor,
    constant: tuple[Tensor, Tensor],
    state: Tensor | None,
    grad: Tensor,
    grad_last: Tensor,
    surrogate: Surrogate,
    strict: bool,
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    state = None if state is None else state.detach().requires_grad_()
    open, learned = (c.detach().clone().requires_grad_() for c in constant)
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes, last = gated_scan(x, open, learned, surrogate, strict, state)  # pyright: ignore[reportArgumentType]
    torch.autograd.backward([spikes, last], [grad, grad_last])
    assert learned.grad is not None
    out: dict[str, Tensor | None] = {"spikes": spikes, "last": last, "x": x.grad, "open": open.grad}
    out |= dict(zip(NAMES, learned.grad, strict=True))
    if state is not None:
        out["state"] = state.grad
    return {key: value.detach() for key, value in out.items() if value is not None}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Currents, initial state {U, S}, and gradients on spikes and last state."""
    state = torch.stack([torch.randn(shape[1:]) * 0.5, torch.randint(0, 2, shape[1:]).float()])
    return torch.randn(shape) + 0.3, state, torch.randn(shape), torch.randn(2, *shape[1:])


def compare(
    tracks: Any,
    x: Tensor,
    constant: tuple[Tensor, Tensor],
    state: Tensor | None,
    grad: Tensor,
    grad_last: Tensor,
    surrogate: Surrogate = Rectangular(),  # noqa: B008
    strict: bool = True,
) -> None:
    arguments = x, constant, state, grad, grad_last, surrogate, strict
    fast, slow = run("native", *arguments), run("reference", *arguments)
    assert fast.keys() == slow.keys()
    assert slow["spikes"].sum() > 0 or slow["spikes"].numel() < 100, "a test without spikes tests little"
    assert torch.equal(fast["spikes"], slow["spikes"])
    assert torch.equal(fast["last"], slow["last"])
    for key in ("x", "state"):
        if key in fast:
            assert tracks(fast[key], slow[key]) < 1e-5, key
    # Sums over steps, and over the neurons that share a constant, whose terms cancel: rounding is relative to these.
    # |dL/du| <= |grad_x|, and what it is multiplied with is below 1 + |u|.
    size = slow["x"].abs().sum() * (1 + x.abs().max())
    for key in ("open", *NAMES):
        assert fast[key].shape == slow[key].shape
        if fast[key].numel():
            assert (fast[key] - slow[key]).abs().max() <= 2e-6 * size, key


@pytest.mark.parametrize(
    *pairwise(
        shape=((2, 5, 5, 7), (3, 11), (1, 1, 700), (2, 600)),
        hard=(False, True),
        strict=(False, True),
        carried=(False, True),
        T=(1, 2, 7, 33),
    )
)
def test_native_equals_reference(
    native: Any, tracks: Any, shape: tuple[int, ...], hard: bool, strict: bool, carried: bool, T: int
) -> None:
    x, state, grad, grad_last = inputs((T, *shape))
    compare(tracks, x, constants(x, hard), state if carried else None, grad, grad_last, strict=strict)


@pytest.mark.parametrize("surrogate", SURROGATE)
def test_every_surrogate(native: Any, tracks: Any, surrogate: str) -> None:
    x, state, grad, grad_last = inputs((9, 4, 33))
    compare(tracks, x, constants(x), state, grad, grad_last, SURROGATE[surrogate])


LAYOUTS = {
    "channels_last": lambda x: x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    "time_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every_second_channel": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "repeated": lambda x: x[0].expand(x.shape),
    "repeated_channels_last": lambda x: x[0].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "broadcast_over_batch": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(native: Any, tracks: Any, name: str, T: int) -> None:
    x, state, grad, grad_last = inputs((T, 2, 3, 5, 7))
    for other in ("channels_last", "time_last"):
        compare(
            tracks,
            LAYOUTS[name](x),
            constants(x),
            LAYOUTS[other](state),
            LAYOUTS[other](grad),
            LAYOUTS[other](grad_last),
        )


@pytest.mark.parametrize("size", [1, 63, 511, 512, 513, 40_009])
@pytest.mark.parametrize("T", [1, 5])
def test_any_size(native: Any, tracks: Any, size: int, T: int) -> None:
    x, state, grad, grad_last = inputs((T, 1, size))
    compare(tracks, x, constants(x), state, grad, grad_last)


def test_every_instruction_level(native: Any, tracks: Any) -> None:
    x, state, grad, grad_last = inputs((7, 11, 2_003))
    for level in native.levels():
        native.set_level(level)
        compare(tracks, x, constants(x), state, grad, grad_last)


def test_number_of_threads_changes_nothing(native: Any) -> None:
    x, state, grad, grad_last = inputs((6, 13, 4_001))
    constant, results = constants(x), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("native", x, constant, state, grad, grad_last, ATan(), True))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("shape", [(5, 3, 1), (3, 2, 3, 5, 7), (4, 5, 2_003)], ids=str)
def test_every_output_is_written(native: Any, dirty_memory: None, tracks: Any, shape: tuple[int, ...]) -> None:
    assert torch.empty(3).isnan().all()
    x, state, grad, grad_last = inputs(shape)
    compare(tracks, x, constants(x), state, grad, grad_last)
    compare(tracks, x, constants(x), None, grad, grad_last)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("shape", [(4, 2, 3, 0), (3, 0, 5)], ids=str)
def test_empty_space(native: Any, shape: tuple[int, ...], name: str) -> None:
    x, state, grad, grad_last = inputs(shape)
    got = run(name, x, constants(x), state, grad, grad_last, ATan(), True)
    assert got["spikes"].shape == shape
    assert got["last"].shape == (2, *shape[1:])


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("strict", [False, True])
def test_the_recurrence_by_hand(native: Any, name: str, strict: bool) -> None:
    """One neuron in Python's double precision, on numbers that are exact: ties included."""
    decay, drop, leak, gate, threshold = 0.5, 0.25, 0.125, 1.0, 0.5
    x, open = torch.randint(-8, 17, (12, 1, 300)) / 4, 0.5
    constant = torch.tensor([[decay, drop, leak, gate, threshold]]).T.expand(5, 300)
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes, last = gated_scan(x, torch.full((12, 300), open), constant, ATan(), strict)
    ties = 0
    for n in range(300):
        u = s = 0.0
        for t in range(12):
            u = decay * u * (1 - gate * s) - drop * s - leak + open * x[t, 0, n].item()
            ties += u == threshold
            s = float(u > threshold if strict else u >= threshold)
            assert spikes[t, 0, n] == s
        assert last[:, 0, n].tolist() == [u, s]
    assert ties > 20


def test_gradients_of_the_definition() -> None:
    """Numeric differentiation, with the smooth function in place of the step."""

    class Soft(Surrogate):
        def __call__(self, x: Tensor, strict: bool = False) -> Tensor:
            return torch.sigmoid(2 * x)

    x, state, *_ = inputs((4, 2, 5))
    arguments = [t.double().requires_grad_() for t in (x, state, *constants(x))]

    def soft(x: Tensor, state: Tensor, open: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        return gated_scan_reference(x, open, constant, Soft(), True, state)

    assert torch.autograd.gradcheck(soft, arguments)


def test_float64_stays_with_the_reference() -> None:
    x, state, *_ = (t.double() for t in inputs((4, 2, 5)))
    spikes, last = gated_scan(x, *(c.double() for c in constants(x)), ATan(), True, state)
    assert spikes.dtype == last.dtype == torch.float64


def test_shapes_that_disagree_are_refused(native: Any) -> None:
    # A kernel that trusted them would read other memory.
    x = torch.zeros(3, 50, 4)
    open, constant = constants(x)
    for name in ("native", "reference"):
        with backend(name):  # pyright: ignore[reportArgumentType]
            for wrong in (
                (x, open, constant, torch.zeros(2, 3, 4)),
                (x, open[1:], constant, None),
                (x, open, constant[:, 1:], None),
                (x[:, 0], open, constant, None),
            ):
                with pytest.raises(ValueError, match=r"state must be|do not agree"):
                    gated_scan(*wrong[:3], ATan(), True, wrong[3])


@pytest.mark.parametrize("how", ["plain", "channels_last", "repeated"])
@pytest.mark.parametrize("carried", [True, False], ids=["state", "rest"])
def test_custom_ops_obey_the_rules(native: Any, carried: bool, how: str) -> None:
    x, state, grad, grad_last = inputs((3, 2, 3, 4, 5))
    if how != "plain":
        x = LAYOUTS[how](x)
    open, constant = constants(x)
    kind, p, q = ATan().formula
    start = state if carried else None
    learned = [t.detach().clone().requires_grad_() for t in (open, constant)]
    ops = torch.ops.spikeloom
    first = None if start is None else start.clone().requires_grad_()
    torch.library.opcheck(ops.gated_scan.default, (x.detach().requires_grad_(), *learned, first, True, kind, p, q))
    torch.library.opcheck(
        ops.gated_scan_backward.default, (grad, grad_last, x, open, constant, start, True, kind, p, q)
    )
