"""What neurons and layers make of inputs that are not floating-point tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from helpers.neuron_variants import STEPPERS, VARIANTS, C, N, T, make, seeded
from PIL import Image
from torch import Tensor, nn

import spikeloom
from spikeloom.data import Events, event_frames
from spikeloom.encode import as_sequence, repeat
from spikeloom.layers import (
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    Dropout,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    NormSpike,
    PadShortcut,
    TdBN,
)
from spikeloom.neurons import LIF, LeakyIntegrator
from spikeloom.ops import backend, leaky_filter, psn, scan
from spikeloom.record import Recorder
from spikeloom.stream import Stream
from spikeloom.surrogates import ATan

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def counts(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 9, shape or (T, N, C)).to(dtype)


@pytest.mark.parametrize("path", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_integers_are_floats(native: Any, variant: str, dtype: torch.dtype, path: str) -> None:
    neuron, x = make(variant), counts(dtype)
    with torch.no_grad(), backend("reference") if path == "reference" else nullcontext():
        expected = seeded(lambda: neuron(x.float()))
        got = seeded(lambda: neuron(x))
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
        if variant in STEPPERS:
            stream = Stream(neuron)
            steps = seeded(lambda: torch.cat([stream(x[:2]), stream(x[2:].float())]))
            whole = Stream(neuron)
            assert torch.equal(steps, seeded(lambda: torch.cat([whole(x[:2].float()), whole(x[2:].float())])))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("GLIF")])
def test_potentials_of_integers(variant: str) -> None:
    neuron, x = make(variant), counts(torch.int64)
    expected = seeded(lambda: neuron.potentials(x.float()))
    assert torch.equal(seeded(lambda: neuron.potentials(x)), expected)
    assert not expected.requires_grad
    with Recorder(neuron, potentials=True) as record, torch.no_grad():
        seeded(lambda: neuron(x))
    (recorded,) = record.potentials[""]
    assert recorded.is_floating_point()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_readout_of_integers_by_hand(dtype: torch.dtype) -> None:
    """M[t] = beta M[t-1] + (1 - beta) X[t], in float64."""
    x, readout = counts(dtype), LeakyIntegrator(tau_mem=0.004, tau_syn=None)
    beta, m, expected = float(torch.exp(torch.tensor(-0.25, dtype=torch.float64))), torch.zeros(N, C).double(), []
    for x_t in x.double():
        m = beta * m + (1 - beta) * x_t
        expected.append(m)
    torch.testing.assert_close(readout(x).double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_the_default_type_decides() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert LIF()(counts(torch.int64)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_frames_of_events_go_into_a_network() -> None:
    """Counts are int64, and a network of neurons and layers takes them as they are."""
    t = np.arange(60, dtype=np.int64)
    events = Events(t, t % 8, (t * 3) % 8, t % 2, 8, 8)
    frames = event_frames(events, T=4)[:, None]
    assert frames.dtype == torch.int64
    net = nn.Sequential(AvgPool2d(2), Conv2d(2, 4, 3, padding=1), NormSpike(4, LIF), GlobalAvgPool(), LIF())
    assert torch.equal(net.eval()(frames), net(frames.float()))


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Conv1d": (lambda: Conv1d(2, 3, 3), 1),
    "AvgPool1d": (lambda: AvgPool1d(2), 1),
    "Linear": (lambda: Linear(6, 3), 1),
    "Conv2d": (lambda: Conv2d(2, 3, 3), 2),
    "MaxPool2d": (lambda: MaxPool2d(2), 2),
    "AvgPool2d": (lambda: AvgPool2d(2), 2),
    "GlobalAvgPool": (GlobalAvgPool, 2),
    "Dropout": (Dropout, 2),
    "BatchNorm": (lambda: BatchNorm(2), 2),
    "TdBN": (lambda: TdBN(2, eps_outside=True), 2),
    "NormSpike": (lambda: NormSpike(2, LIF), 2),
    "PadShortcut": (lambda: PadShortcut(2, 5), 2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_integers(name: str, dtype: torch.dtype, training: bool) -> None:
    made, axes = LAYERS[name]
    layer = made().train(training)
    for x in (counts(dtype, T, N, 2, *(6,) * axes), repeat(counts(dtype, N, 2, *(6,) * axes), T)):
        with torch.no_grad():
            got = seeded(lambda x=x: layer(x))
            assert got.dtype == torch.float32
            assert torch.equal(got, seeded(lambda x=x: layer(x.float())))


def test_a_network_of_integers() -> None:
    model, images = spikeloom.create_model("colored_mnist_net", T=2).eval(), counts(torch.int64, 2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(images), model(images.float()))


# --- what is refused --------------------------------------------------------------------------------------------------

NO_TENSORS = {
    "ndarray": np.zeros((T, N, C), np.float32),
    "Image": Image.new("RGB", (8, 8)),
    "NoneType": None,
    "list": [[0.0]],
    "Events": Events(*(np.zeros(1, np.int64),) * 4, 1, 1),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_neurons_take_tensors(variant: str, kind: str) -> None:
    neuron = make(variant)
    message = rf"^{type(neuron).__name__} takes a tensor, got {kind}(: use torch|$)"
    for call in (neuron, neuron.potentials, Stream(neuron)):
        with pytest.raises(TypeError, match=message):
            call(NO_TENSORS[kind])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_tensors(name: str) -> None:
    with pytest.raises(TypeError, match=r"^\w+ takes a tensor, got ndarray: use torch\.from_numpy"):
        LAYERS[name][0]()(NO_TENSORS["ndarray"])


def test_networks_take_tensors() -> None:
    for value in NO_TENSORS.values():
        with pytest.raises(TypeError, match=r"^a network takes a tensor, got"):
            as_sequence(value, 2, dims=4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("variant", VARIANTS)
def test_complex_numbers(variant: str) -> None:
    with pytest.raises(TypeError, match=r"takes real numbers, got torch\.complex64: .*x\.real"):
        make(variant)(torch.zeros(T, N, C, dtype=torch.complex64))


def test_ops_do_not_convert() -> None:
    """They give back the type of their input, which integers cannot be."""
    x = counts(torch.int64)
    for op in (
        lambda: leaky_filter(x, 0.9, 0.8),
        lambda: scan(x, None, 0.5, 0.5, 1.0, 0.0, ATan(), True),
        lambda: psn(x, torch.eye(T), torch.zeros(T), ATan()),
    ):
        with pytest.raises(TypeError, match=r"takes floating-point tensors, got torch\.int64: convert with x\.float"):
            op()
