"""What every registered neuron promises, whatever its equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from helpers.neuron_variants import (
    ARGUMENTS,
    LENGTH_FIXED,
    LENGTH_LIMITED,
    RECURRENT,
    STEPLESS,
    STEPPERS,
    STOCHASTIC,
    VARIANTS,
    C,
    N,
    T,
    inputs,
    length,
    make,
    run,
    seeded,
)

from spikeloom.neurons import NEURONS
from spikeloom.ops import backend
from spikeloom.stream import Stream


def test_the_table_is_the_registry() -> None:
    assert set(ARGUMENTS) == set(NEURONS)
    assert len(NEURONS) == 19
    for name in NEURONS:
        assert NEURONS[name].__name__ == name


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_numbers(variant: str) -> None:
    got = run(make(variant), inputs(T, N, C))
    assert got["out"].shape == (T, N, C)
    for key, value in got.items():
        assert value.isfinite().all(), key
    assert got["x"].any()
    if variant != "LeakyIntegrator":
        levels = 3 if variant == "MLF" else 1
        assert torch.equal(got["out"], got["out"].round().clamp(0, levels))
        assert 0 < got["out"].sum() < levels * T * N * C, "a test without spikes, or of nothing else, tests little"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_meta_device_gives_shapes(variant: str) -> None:
    y = make(variant).to("meta")(torch.empty(T, N, C, device="meta"))
    assert y.shape == (T, N, C)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_call_gives_the_same_answer(variant: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    before = copy.deepcopy(neuron.state_dict())
    first = run(neuron, x)
    other = inputs(T, 2 * N + 1, C)
    run(neuron, other)
    again = run(neuron, x)
    for key, value in first.items():
        assert torch.equal(again[key], value), key
    for key, value in neuron.state_dict().items():
        assert torch.equal(value, before[key]), key
    # A copy made before any call, and one loaded from saved weights, give it too.
    twin = make(variant)
    for parameter in twin.parameters():
        parameter.data += 1
    twin.load_state_dict(before)
    assert torch.equal(run(twin, x)["out"], first["out"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in STOCHASTIC])
def test_samples_do_not_meet(variant: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    together = neuron(x)
    for n in range(N):
        assert torch.equal(neuron(x[:, n : n + 1]), together[:, n : n + 1])


SHAPES = {
    "one": (1, 1, C),
    "one_sample": (T, 1, C),
    "one_step": (1, N, C),
    "space": (T, N, C, 2, 3),
    "short": (2, 5, C, 1),
    "empty_space": (T, N, C, 0, 3),
    "empty_batch": (T, 0, C),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_smallest_and_empty_shapes(variant: str, shape: str) -> None:
    size = SHAPES[shape]
    if VARIANTS[variant][0] in RECURRENT:
        size = (*size[:2], C)  # these take [T, N, features]
    elif variant == "ParaLIF-t":
        size = (*size[:2], *size[3:], C)  # constants of features, the last axis
    neuron = length(variant, size[0])
    got = run(neuron, inputs(*size))
    assert got["out"].shape == got["x"].shape == size
    if variant in STEPPERS:
        with torch.no_grad():
            assert Stream(neuron)(inputs(*size)).shape == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_precision_of_the_output_is_that_of_the_input(native: Any, variant: str, path: str, dtype: torch.dtype) -> None:
    neuron, x = make(variant), inputs(T, N, C, dtype=dtype).requires_grad_()
    # Weights over time stay float32 beside bfloat16 inputs; those over features are cast with the model, as Linear's.
    if dtype == torch.float64 or VARIANTS[variant][0] in RECURRENT:
        neuron = neuron.to(dtype)
    if path == "reference":
        with backend("reference"):
            out = neuron(x)
    else:
        out = neuron(x)  # native as far as it goes
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_sequence(variant: str) -> None:
    with pytest.raises(ValueError, match=r"at least one step, got shape \(0, 3, 4\)"):
        make(variant)(torch.zeros(0, N, C))
    with pytest.raises(ValueError, match=r"\[T, N, \.\.\.\].*got shape \(4,\)"):
        make(variant)(torch.zeros(C))


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_number_of_steps(variant: str) -> None:
    kind, neuron = VARIANTS[variant][0], make(variant)
    for steps in (1, T - 1, T + 1, 2 * T):
        x = inputs(steps, N, C)
        refused = kind in LENGTH_FIXED or (kind in LENGTH_LIMITED and steps > T)
        if refused:
            with pytest.raises(ValueError, match=rf"{kind} is made for T = {T} steps, got {steps}"):
                neuron(x)
        else:
            assert neuron(x).shape == x.shape


# --- streams ----------------------------------------------------------------------------------------------------------

CUTS = [tuple(range(1, T)), (2,), (1, T - 1)]


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("variant", STEPPERS)
def test_whole_is_stepwise_is_chunks(native: Any, tracks: Any, variant: str, path: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    with backend(path):  # pyright: ignore[reportArgumentType]
        whole = run(neuron, x)
        for cuts in CUTS:
            chunks = run(neuron, x, cuts)
            # Membranes of neurons without reset are carried as computed; matrix products sum in another order.
            if variant not in STOCHASTIC:
                same = torch.equal(chunks["out"], whole["out"])
                assert tracks(chunks["out"], whole["out"]) < 1e-6 if variant == "LeakyIntegrator" else same
            if variant == "ParaLIF":
                continue  # the gradient of gs depends on the draw, which other calls draw otherwise
            for key in whole.keys() - {"out"}:
                assert tracks(chunks[key], whole[key]) < 2e-5, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", [v for v in STEPPERS if v not in STOCHASTIC])
def test_steps_of_another_precision(tracks: Any, variant: str, dtype: torch.dtype) -> None:
    neuron, x = make(variant), inputs(T, N, C, dtype=dtype)
    if dtype == torch.float64 or VARIANTS[variant][0] in RECURRENT:
        neuron = neuron.to(dtype)
    with torch.no_grad():
        whole = neuron(x)
        for sizes in ([1] * T, [2, T - 2]):
            stream = Stream(neuron)
            parts = torch.cat([stream(part) for part in x.split(sizes)])
            assert parts.dtype == whole.dtype == dtype
            assert tracks(parts, whole) < 1e-2 if variant == "LeakyIntegrator" else torch.equal(parts, whole)


@pytest.mark.parametrize("variant", STEPPERS)
def test_streams_start_over(variant: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    stream = Stream(neuron)
    with torch.no_grad():
        first = seeded(lambda: stream(x))
        stream.reset()
        assert torch.equal(seeded(lambda: stream(x)), first)
        assert torch.equal(seeded(lambda: neuron(x)), seeded(lambda: neuron(x)))
    stream.detach()


@pytest.mark.parametrize("variant", STEPPERS)
def test_state_of_another_batch(variant: str) -> None:
    stream = Stream(make(variant))
    stream(inputs(1, N, C))
    with pytest.raises(ValueError, match=r"(?i)stream\.reset"):
        stream(inputs(1, N + 2, C))


@pytest.mark.parametrize("variant", [v for v, (kind, _) in VARIANTS.items() if kind in STEPLESS])
def test_those_that_cannot_step_name_one_that_can(variant: str) -> None:
    kind = VARIANTS[variant][0]
    neuron = make(variant)
    with pytest.raises(RuntimeError, match=rf"{kind} needs the whole sequence at once.*{STEPLESS[kind]}.* can step"):
        Stream(neuron)(inputs(T, N, C))
    # The refusal leaves nothing behind.
    assert neuron(inputs(T, N, C)).shape == (T, N, C)


# --- PyTorch's compilers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_export(variant: str) -> None:
    neuron, x = make(variant), inputs(T, N, C)
    with torch.no_grad():
        exported = torch.export.export(neuron, (x,)).module()
        assert torch.equal(seeded(lambda: exported(x)), seeded(lambda: neuron(x)))


COMPILED_BY_DEFAULT = ("MLF", "MaskedPSN", "PSU", "ParaLIF-d")


@pytest.mark.parametrize(
    "variant", [v if v in COMPILED_BY_DEFAULT else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_compile(tracks: Any, variant: str) -> None:
    torch._dynamo.reset()
    neuron, x = make(variant), inputs(T, N, C)
    expected = run(neuron, x)
    got = run(torch.compile(neuron, fullgraph=True), x)
    got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
    assert got.keys() == expected.keys()
    if variant in STOCHASTIC:  # compiled code draws other numbers
        assert got["out"].shape == expected["out"].shape
        return
    if variant == "LeakyIntegrator":
        assert tracks(got["out"], expected["out"]) < 1e-6
    else:
        assert torch.equal(got["out"], expected["out"])
    for key in expected.keys() - {"out"}:
        assert tracks(got[key], expected[key]) < 1e-5, key
