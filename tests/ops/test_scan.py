"""The scan: its definition against a hand-written loop, every fast path against the definition."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.custom_surrogate import Gaussian
from helpers.pairwise import pairwise
from torch import Tensor

from spikeloom.errors import UsageError
from spikeloom.ops import _dispatch, backend, scan, scan_reference
from spikeloom.ops import scan as scan_module_function
from spikeloom.ops.scan import compiled
from spikeloom.ops.scan.native import scan_native_potentials
from spikeloom.ops.scan.params import ScanParams
from spikeloom.surrogates import SLOPE, SURROGATES, ATan, Formula, Rectangular, Sigmoid, Surrogate, Triangle

scan_module = sys.modules[scan_module_function.__module__]


ATAN = ATan()
SURROGATE = {name: SURROGATES[name]() for name in SURROGATES} | {
    "closed": Rectangular(closed=True),
    "narrow": Triangle(0.5),
    "own": Gaussian(),
}
DTYPES = (torch.float32, torch.bfloat16)
RESET = {"hard": 0.0, "hard_below": -0.3, "hard_above": 0.2, "soft": None}


def run(
    name: str,
    x: Tensor,
    v: Tensor | None,
    grad: Tensor,
    grad_last: Tensor,
    v_reset: float | None,
    surrogate: Surrogate = ATAN,
    detach: bool = True,
    decay: float = 0.6,
    gain: float = 0.7,
    v_threshold: float = 0.9,
) -> dict[str, Tensor]:
    """Outputs and every gradient of one backend."""
    x = x.detach().requires_grad_()
    v = None if v is None else v.detach().requires_grad_()
    constants = [torch.tensor(c, requires_grad=True) for c in (decay, gain)]
    with backend(name):  # pyright: ignore[reportArgumentType]
        spikes, last = scan(x, v, *constants, v_threshold, v_reset, surrogate, detach)
    assert last is not None
    torch.autograd.backward([spikes, last], [grad, grad_last])
    out = {"spikes": spikes, "last": last, "x": x.grad, "decay": constants[0].grad, "gain": constants[1].grad}
    if v is not None:
        out["v"] = v.grad
    return {key: value.detach() for key, value in out.items() if value is not None}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Currents, initial potentials, and gradients on spikes and last potentials."""
    return (
        torch.randn(shape).add(0.5).to(dtype),
        torch.randn(shape[1:]) * 0.5,
        torch.randn(shape).to(dtype),
        torch.randn(shape[1:]),
    )


def same(fast: dict[str, Tensor], slow: dict[str, Tensor], tracks: Any) -> None:
    assert fast.keys() == slow.keys()
    assert slow["spikes"].sum() > 0 or slow["spikes"].numel() < 100, "a test without spikes tests little"
    assert torch.equal(fast["spikes"], slow["spikes"])
    assert torch.equal(fast["last"], slow["last"])
    assert fast["spikes"].dtype == slow["spikes"].dtype == fast["x"].dtype
    # bfloat16 gradients are rounded once, on either side of a tie perhaps.
    assert tracks(fast["x"], slow["x"]) < (1e-5 if fast["x"].dtype == torch.float32 else 2**-7)
    if "v" in fast:
        assert tracks(fast["v"], slow["v"]) < 1e-5
    for key in ("decay", "gain"):
        # Sums over all elements and steps, whose terms cancel: rounding is relative to the terms.
        assert (fast[key] - slow[key]).abs() <= 2e-6 * slow["x"].float().abs().sum(), key


# --- native = reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    *pairwise(surrogate=SURROGATE, reset=RESET, dtype=DTYPES, detach=(True, False), T=(1, 2, 7, 70))
)
def test_native_equals_reference(
    native: Any, tracks: Any, surrogate: str, reset: str, dtype: torch.dtype, detach: bool, T: int
) -> None:
    arguments = *inputs((T, 3, 5, 7), dtype), RESET[reset], SURROGATE[surrogate], detach
    same(run("native", *arguments), run("reference", *arguments), tracks)


def layout(name: str, x: Tensor) -> Tensor:
    """The numbers of x [T, N, C, H, W], laid out in memory in one of the ways that networks leave them."""
    T, N = x.shape[:2]
    if name == "contiguous":
        return x.contiguous()
    if name == "channels_last":
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, N))
    if name == "time_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if name == "batch_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if name == "every_second_channel":
        return x.repeat_interleave(2, 2)[:, :, ::2]
    if name == "every_second_step":
        return x.repeat_interleave(2, 0)[::2]
    if name == "offset":
        return torch.cat([x[:1], x])[1:]
    if name == "repeated":
        return x[0].expand(x.shape)
    if name == "repeated_channels_last":
        return x[0].contiguous(memory_format=torch.channels_last).expand(x.shape)
    if name == "broadcast_over_batch":
        return x[:, :1].expand(x.shape)
    raise AssertionError(name)


LAYOUTS = [
    "contiguous",
    "channels_last",
    "time_last",
    "batch_first",
    "every_second_channel",
    "every_second_step",
    "offset",
    "repeated",
    "repeated_channels_last",
    "broadcast_over_batch",
]


@pytest.mark.parametrize(
    *pairwise(name=LAYOUTS, shape=((2, 3, 5, 7), (1, 4, 1, 3), (3, 1, 2, 2)), T=(1, 2, 7), own=(False, True))
)
def test_any_layout(native: Any, tracks: Any, name: str, shape: tuple[int, ...], T: int, own: bool) -> None:
    x, v, grad, grad_last = inputs((T, *shape))
    x = layout(name, x)
    # Gradients and initial potentials come in layouts of their own.
    for other in ("contiguous", "channels_last", "time_last"):
        arguments = (
            x,
            layout(other, v[None])[0],
            layout(other, grad),
            grad_last,
            0.0,
            SURROGATE["own" if own else "ATan"],
        )
        same(run("native", *arguments), run("reference", *arguments), tracks)


def test_channels_last_stays(native: Any) -> None:
    x = layout("channels_last", torch.randn(4, 2, 3, 5, 7)).requires_grad_()
    spikes, last = scan(x, None, 0.5, 0.5, 0.3, 0.0, ATan(), True)
    assert spikes.stride() == x.stride()
    assert last is not None
    assert last.stride() == x.stride()[1:]
    spikes.sum().backward()
    assert x.grad is not None
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1023, 1024, 1025, 2048, 2049, 8191, 40_009])
@pytest.mark.parametrize("T", [1, 5, 33])
def test_any_size(native: Any, tracks: Any, size: int, T: int) -> None:
    # Sizes around the kernels' blocks, and above the size from which threads share the work.
    arguments = *inputs((T, size)), None, Sigmoid(), False
    same(run("native", *arguments), run("reference", *arguments), tracks)


def test_gradients_below_the_normal_numbers(native: Any) -> None:
    """A silent neuron's gradient falls by its decay at every step; below 2^-126 it is 0, and only in the kernel."""
    x = torch.zeros(100, 40_000)
    arguments = x, None, torch.zeros_like(x), torch.ones_like(x[0]), 0.0, Rectangular(), True, 0.25, 1.0
    expected = 0.25 ** torch.arange(99, -1, -1, dtype=torch.float64)
    expected[expected < 2.0**-126] = 0.0
    for level in native.levels():
        native.set_level(level)
        assert torch.equal(run("native", *arguments)["x"].double(), expected[:, None].expand(x.shape)), level
    assert (torch.full((100_000,), 1e-39) * 0.5 > 0).all(), "and not in PyTorch afterwards"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1_048_576, 700_003])  # rows on whole cache lines, and not
def test_large_tensors_are_their_parts(native: Any, size: int, dtype: torch.dtype) -> None:
    """Beyond 4 MB outputs are written past the caches: the same bits as of parts that are not."""
    x, v, grad, grad_last = inputs((3, size), dtype)
    for level in native.levels():
        native.set_level(level)
        whole = run("native", x, v, grad, grad_last, None)
        parts = [
            run("native", *(each[..., i : i + 300_000] for each in (x, v, grad, grad_last)), None)
            for i in range(0, size, 300_000)
        ]
        assert 3 * 300_000 * x.element_size() < 4 << 20 <= x.nbytes
        for key in ("spikes", "last", "x", "v"):
            assert torch.equal(whole[key], torch.cat([part[key] for part in parts], -1)), (key, level)


def test_long_sequence(native: Any, tracks: Any) -> None:
    arguments = *inputs((1100, 131)), 0.0
    same(run("native", *arguments), run("reference", *arguments), tracks)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_empty_space(native: Any, name: str) -> None:
    got = run(name, *inputs((4, 2, 3, 0, 5)), 0.0)
    assert got["spikes"].shape == (4, 2, 3, 0, 5)
    assert got["last"].shape == (2, 3, 0, 5)
    assert got["decay"] == got["gain"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reset", RESET)
def test_every_instruction_level(native: Any, tracks: Any, reset: str, dtype: torch.dtype) -> None:
    arguments = *inputs((7, 20_011), dtype), RESET[reset]
    expected = run("reference", *arguments)
    assert native.levels()[0] == "baseline"
    for level in native.levels():
        native.set_level(level)
        assert native.level() == level
        same(run("native", *arguments), expected, tracks)


def test_unknown_level(native: Any) -> None:
    with pytest.raises(ValueError, match="no instruction level mmx"):
        native.set_level("mmx")


@pytest.mark.parametrize("surrogate", ["ATan", "own"])
def test_number_of_threads_changes_nothing(native: Any, surrogate: str) -> None:
    arguments = *inputs((6, 50_021)), None, SURROGATE[surrogate], False
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("native", *arguments))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("shape", [(5, 3, 1), (3, 2, 3, 5, 7), (4, 20_011)], ids=str)
@pytest.mark.parametrize("surrogate", ["ATan", "own"])
def test_every_output_is_written(
    native: Any, dirty_memory: None, tracks: Any, shape: tuple[int, ...], surrogate: str
) -> None:
    assert torch.empty(3).isnan().all()
    x, v, grad, grad_last = inputs(shape)
    if x.dim() == 5:
        x = layout("channels_last", x)
    arguments = x, v, grad, grad_last, 0.0, SURROGATE[surrogate]
    same(run("native", *arguments), run("reference", *arguments), tracks)


def test_bfloat16_is_rounding_away_from_float32(native: Any, tracks: Any) -> None:
    x, v, grad, grad_last = inputs((9, 4, 33), torch.bfloat16)
    low = run("native", x, v, grad, grad_last, 0.0)
    full = run("native", x.float(), v, grad.float(), grad_last, 0.0)
    assert torch.equal(low["spikes"].float(), full["spikes"])
    assert torch.equal(low["last"], full["last"]), "potentials are float32 whatever the input"
    assert (low["x"].float() - full["x"]).abs().le(full["x"].abs() * 2**-8 + 1e-38).all()
    for key in ("v", "decay", "gain"):
        assert tracks(low[key], full[key]) < 1e-6


def test_extreme_bfloat16_gradients_round_to_even(native: Any) -> None:
    # grad_x = gain * grad * 1 with the constant surrogate: the kernel's own rounding against PyTorch's.
    grad = torch.tensor([1.0, -1.0, 3e38, -3e38, 1e-37, 0.0], dtype=torch.bfloat16)[None]
    x = torch.zeros(1, 6, dtype=torch.bfloat16, requires_grad=True)
    for gain in (1.0, 1.00390625, 1.01171875, 2.0):
        x.grad = None
        with backend("native"):
            scan(x, None, 0.5, gain, 1.0, 0.0, SURROGATE["ConstantOne"], True)[0].backward(grad)
        assert x.grad is not None
        assert torch.equal(x.grad, (grad.float() * gain).to(torch.bfloat16)), gain


def test_infinite_and_missing_numbers_stay_visible(native: Any) -> None:
    x = torch.tensor([[float("nan")], [0.0]])
    spikes, last = scan(x, None, 0.5, 1.0, 1.0, 0.0, ATan(), True)
    assert last is not None
    assert last.isnan().all()
    assert not spikes.any()


@pytest.mark.parametrize("wanted", ["spikes", "last"])
def test_one_output_alone(native: Any, tracks: Any, wanted: str) -> None:
    x, v, grad, grad_last = inputs((5, 40))
    grads = []
    for name in ("native", "reference"):
        a, b = x.clone().requires_grad_(), v.clone().requires_grad_()
        with backend(name):
            spikes, last = scan(a, b, 0.6, 0.7, 0.9, 0.0, ATan(), False)
        assert last is not None
        spikes.backward(grad) if wanted == "spikes" else last.backward(grad_last)
        grads.append((a.grad, b.grad))
    for fast, slow in zip(*grads, strict=True):
        assert tracks(fast, slow) < 1e-5


def test_last_potential_only_where_wanted(native: Any) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    spikes, last = scan(x, None, 0.5, 0.5, 0.2, 0.0, ATan(), True, return_v=False)
    assert last is None
    spikes.sum().backward()
    assert x.grad is not None


def test_same_surrogate_through_formula_and_slope(native: Any, tracks: Any) -> None:
    @dataclass(frozen=True)
    class Unnamed(ATan):
        @property
        def formula(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
            return None

    arguments = *inputs((7, 3, 50)), 0.0
    same(run("native", *arguments, Unnamed(), False), run("native", *arguments, ATan(), False), tracks)


def test_inputs_are_left_alone(native: Any) -> None:
    x, v, grad, grad_last = inputs((5, 2, 9))
    copies = [t.clone() for t in (x, v, grad, grad_last)]
    run("native", x, v, grad, grad_last, 0.0)
    for now, before in zip((x, v, grad, grad_last), copies, strict=True):
        assert torch.equal(now, before)


# --- the definition ---------------------------------------------------------------------------------------------------


def loop(
    x: list[float], v: float, decay: float, gain: float, v_threshold: float, v_reset: float | None
) -> tuple[list[float], list[float], float]:
    """The equations for one neuron, in Python's double precision: spikes, potentials H, last potential."""
    rest = 0.0 if v_reset is None else v_reset
    spikes, potentials = [], []
    for current in x:
        h = rest + decay * (v - rest) + gain * current
        s = 1.0 if h >= v_threshold else 0.0
        v = h - v_threshold * s if v_reset is None else (v_reset if s else h)
        spikes.append(s)
        potentials.append(h)
    return spikes, potentials, v


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("v_reset", [0.0, -0.25, None])
@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.5, 0.5), (0.5, 1.0)], ids=["IF", "LIF", "no_input_decay"])
def test_exact_on_a_binary_grid(
    native: Any, dyadic: Any, name: str, v_reset: float | None, decay: float, gain: float
) -> None:
    x, v = dyadic(16, 200), dyadic(200, low=-0.5, high=0.75)
    with backend(name):
        spikes, last = scan(x, v, decay, gain, 1.0, v_reset, ATan(), True)
    assert last is not None
    potentials = scan_module.potentials(x, v, decay, gain, 1.0, v_reset)
    ties = 0
    for n in range(x.shape[1]):
        expected = loop(x[:, n].tolist(), v[n].item(), decay, gain, 1.0, v_reset)
        assert spikes[:, n].tolist() == expected[0]
        assert potentials[:, n].tolist() == expected[1]
        assert last[n].item() == expected[2]
        ties += expected[1].count(1.0)
    assert ties > 5, "potentials on the threshold itself are the point of the grid"


def test_potentials_are_those_of_the_scan(native: Any) -> None:
    # Whatever the threshold: (h - threshold) + threshold would lose the last digits of h.
    x, v = torch.randn(5, 1000), torch.randn(1000) * 0.3
    for v_threshold in (0.3, 1.0, 1e6):
        h = scan_module.potentials(x, v, 0.9, 0.7, v_threshold, 0.0)
        with backend("native"):
            _, last = scan(x[:1], v, 0.9, 0.7, v_threshold, 0.0, ATan(), True)
        assert last is not None
        silent = h[0] < v_threshold
        assert torch.equal(h[0][silent], last[silent]), v_threshold
        numbers = ScanParams((v_threshold,), 0.0, decay=0.9, gain=0.7).pack()
        native_h = scan_native_potentials(x, v[None], (None, None, None), numbers)
        assert torch.equal(h, native_h[0]), v_threshold


@dataclass(frozen=True)
class Soft(Surrogate):
    """The primitive itself for the step: everything is then differentiable as it stands."""

    of: Surrogate = ATAN

    def __call__(self, x: Tensor, strict: bool = False) -> Tensor:
        return self.of.primitive(x)

    def derivative(self, x: Tensor) -> Tensor:
        return self.of.derivative(x)


def reverse_scan(
    x: Tensor,
    v: Tensor,
    grad: Tensor,
    grad_last: Tensor,
    decay: float,
    gain: float,
    v_threshold: float,
    v_reset: float | None,
    surrogate: Surrogate,
    detach: bool,
    fire: Any,
) -> tuple[Tensor, Tensor, float, float]:
    """Gradients by hand: dL/dH[t] = g[t] sigma' + dL/dV[t] dV[t]/dH[t], from the last step to the first."""
    rest = 0.0 if v_reset is None else v_reset
    starts, hs, spikes = [], [], []
    for x_t in x:
        starts.append(v)
        h = rest + decay * (v - rest) + gain * x_t
        s = fire(h - v_threshold)
        hs.append(h)
        spikes.append(s)
        v = h - v_threshold * s if v_reset is None else h * (1 - s) + v_reset * s
    grad_x, carried, grad_decay, grad_gain = torch.empty_like(x), grad_last, 0.0, 0.0
    for t in range(len(x) - 1, -1, -1):
        slope = surrogate.derivative(hs[t] - v_threshold)
        keep = torch.ones_like(hs[t]) if v_reset is None else 1 - spikes[t]
        if not detach:
            keep = keep - slope * (v_threshold if v_reset is None else hs[t] - v_reset)
        grad_h = grad[t] * slope + carried * keep
        grad_decay += (grad_h * (starts[t] - rest)).sum().item()
        grad_gain += (grad_h * x[t]).sum().item()
        grad_x[t], carried = gain * grad_h, decay * grad_h
    return grad_x, carried, grad_decay, grad_gain


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None])
@pytest.mark.parametrize("surrogate", [ATan(), Sigmoid(), Gaussian()], ids=["ATan", "Sigmoid", "own"])
def test_gradients_of_the_definition(v_reset: float | None, surrogate: Surrogate) -> None:
    """Numeric differentiation proves autograd on the soft scan; both then agree with the reverse scan by hand,
    which proves the hard scan, whose step has no derivative to differentiate numerically."""
    shape = (4, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    gain = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def soft(x: Tensor, v: Tensor, decay: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        return scan_reference(x, v, decay, gain, 0.9, v_reset, Soft(surrogate), False)

    assert torch.autograd.gradcheck(soft, (x, v, decay, gain))

    grad, grad_last = torch.randn(shape, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for detach in (True, False):
        for used, fire in ((Soft(surrogate), surrogate.primitive), (surrogate, lambda u: (u >= 0).double())):
            spikes, last = scan_reference(x, v, decay, gain, 0.9, v_reset, used, detach)
            got = torch.autograd.grad([spikes, last], [x, v, decay, gain], [grad, grad_last])
            expected = reverse_scan(
                x.detach(), v.detach(), grad, grad_last, 0.6, 0.7, 0.9, v_reset, surrogate, detach, fire
            )
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, torch.as_tensor(b, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_rest_is_the_default_start() -> None:
    x = torch.randn(3, 8)
    for v_reset in (0.0, -0.4, None):
        rest = torch.full((8,), v_reset or 0.0)
        for name in ("reference", "native") if _dispatch.native else ("reference",):
            with backend(name):
                a = scan(x, None, 0.6, 0.7, 0.5, v_reset, ATan(), True)
                b = scan(x, rest, 0.6, 0.7, 0.5, v_reset, ATan(), True)
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


# --- dispatch ---------------------------------------------------------------------------------------------------------


def test_unknown_backend() -> None:
    with (
        pytest.raises(UsageError, match=r"unknown backend 'nativ'; known: reference, native, compiled"),
        backend("nativ"),
    ):
        pass


def test_forced_native_refuses_what_it_cannot_take(native: Any) -> None:
    with backend("native"), pytest.raises(UsageError, match=r"float64.*reference"):
        scan(torch.zeros(1, 2, dtype=torch.float64), None, 0.5, 0.5, 1.0, 0.0, ATan(), True)


def test_forced_native_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "native", None)
    with pytest.raises(UsageError, match="install a C\\+\\+ compiler"), backend("native"):
        pass
    spikes, _ = scan(torch.ones(2, 3), None, 1.0, 1.0, 1.0, 0.0, ATan(), True)
    assert spikes.all()


def test_forcing_ends_with_the_block() -> None:
    with pytest.raises(KeyError), backend("reference"):  # noqa: PT012
        with backend("compiled"):
            pass
        assert _dispatch._forced == "reference"
        raise KeyError
    assert _dispatch._forced is None


def test_choice(native: Any) -> None:
    for dtype, expected in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float64, "reference")):
        assert _dispatch.choose("scan", torch.zeros(1, dtype=dtype), scan_module.NATIVE_DTYPES) == expected
    assert _dispatch.choose("scan", torch.zeros(1, device="meta"), scan_module.NATIVE_DTYPES) == "reference"


def test_choice_is_logged_once(native: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_logged", set())
    with caplog.at_level("INFO", logger="spikeloom"):
        for _ in range(3):
            scan(torch.zeros(1, 2), None, 0.5, 0.5, 1.0, 0.0, ATan(), True)
    assert [r.getMessage() for r in caplog.records] == ["scan: native backend (cpu, torch.float32)"]


def in_new_process(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.stdout + done.stderr


# What a new process says of itself: the level, the kernels' threads for 1 to 3 of PyTorch's, the OpenMP libraries.
SAID = """
import os, torch
from spikeloom.ops import _dispatch, scan
from spikeloom.surrogates import ATan

print(_dispatch.native.level())
threads = []
for n in (1, 2, 3):
    torch.set_num_threads(n)
    threads.append(_dispatch.native.openmp_threads())
print(*threads)
scan(torch.randn(4, 100_000), None, 0.5, 0.5, 1.0, 0.0, ATan(), True)
maps = "/proc/self/maps"
print(len({line.split()[-1] for line in open(maps) if "libgomp" in line}) if os.path.exists(maps) else "no maps")
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    return in_new_process(SAID, SPIKELOOM_LEVEL="baseline").splitlines()


def test_one_thread_pool_with_torch(native: Any, said: list[str]) -> None:
    assert said[1] == "1 2 3"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_library_is_loaded(native: Any, said: list[str]) -> None:
    assert said[2:] == ["1"]


def test_level_from_the_environment(native: Any, said: list[str]) -> None:
    assert said[0] == "baseline"
    code = "from spikeloom.ops import _dispatch; print(_dispatch.native.level())"
    assert "SPIKELOOM_LEVEL: this processor has no instruction level sse9; this one has baseline" in in_new_process(
        code, SPIKELOOM_LEVEL="sse9"
    )


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [True, False], ids=["v", "rest"])
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "repeated"])
def test_custom_op_obeys_the_rules(native: Any, how: str, v: bool) -> None:
    x = layout(how, torch.randn(3, 2, 3, 4, 5)).requires_grad_()
    start = torch.randn(1, 2, 3, 4, 5, requires_grad=True) if v else None
    decay, gain = (torch.tensor(c, requires_grad=True) if v else None for c in (0.6, 0.7))
    numbers = ScanParams((0.9,), 0.0, False, False, ATan().formula, 0.6, 0.7).pack()
    torch.library.opcheck(torch.ops.spikeloom.scan.default, (x, start, decay, gain, None, None, numbers, True))


def test_other_custom_ops_obey_the_rules(native: Any) -> None:
    x, v, grad, grad_last = inputs((3, 2, 5))
    decay, gain = torch.tensor(0.6), torch.tensor(0.7)
    v, grad_last = v[None], grad_last[None]
    rational = Formula("rational", 1.0, 3.0)
    numbers = ScanParams((0.9,), None, False, True, rational).pack()
    torch.library.opcheck(torch.ops.spikeloom.scan_potentials.default, (x, v, decay, gain, None, numbers))
    slope = torch.rand(1, 3, 2, 5)
    for start, last, s in ((v, grad_last, slope), (None, None, None)):
        chosen = ScanParams((0.9,), None, False, True, rational if s is None else SLOPE).pack()
        torch.library.opcheck(
            torch.ops.spikeloom.scan_backward.default,
            (grad, last, x, start, decay, gain, None, s, None, chosen, start is not None),
        )


@pytest.mark.parametrize(
    ("T", "reset", "surrogate", "detach"),
    [(8, "hard_below", "ATan", True), (2, "soft", "own", False)],
    ids=["more_than_a_chunk", "less_than_a_chunk"],
)
def test_compiled_equals_reference(
    tracks: Any, T: int, reset: str, surrogate: str, detach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_CHUNK", 3)  # C++ of 8 steps takes half a minute
    arguments = *inputs((T, 3, 5, 7)), RESET[reset], SURROGATE[surrogate], detach
    same(run("compiled", *arguments), run("reference", *arguments), tracks)


VARIANTS = {
    "thresholds": [(3, torch.float32, 0.5 + n / 16, "ATan") for n in range(10)],
    "lengths": [(T, dtype, 0.9, "ATan") for T in (8, 7, 3, 2, 1) for dtype in (torch.float32, torch.bfloat16)],
    "surrogates": [(3, torch.float32, 0.9, name) for name in SURROGATE],
}


@pytest.mark.slow
@pytest.mark.parametrize("varying", VARIANTS)
def test_compiled_never_gives_up_compiling(tracks: Any, varying: str) -> None:
    # More variants than torch.compile's recompile limit of 8: each compiled, none silently run in Python.
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for T, dtype, v_threshold, surrogate in VARIANTS[varying]:
            arguments = *inputs((T, 3, 15), dtype), 0.0, SURROGATE[surrogate]
            got = run("compiled", *arguments, v_threshold=v_threshold)
            same(got, run("reference", *arguments, v_threshold=v_threshold), tracks)
