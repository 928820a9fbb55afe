"""Constants of neurons stay what their settings say, whatever their module and PyTorch's defaults went through."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.neuron_variants import VARIANTS, C, N, T, inputs, make, run
from torch import nn

import spikeloom
from spikeloom.layers import NormSpike, TdBN
from spikeloom.models import MODELS
from spikeloom.neurons import LIF, MLF, PLIF, LeakyIntegrator
from spikeloom.surrogates import Rectangular


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    for name, value in module.state_dict().items():
        assert value.is_meta, name
    return module.to_empty(device="cpu")


HISTORIES: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "bfloat16": lambda build: build().bfloat16().float(),
    "half": lambda build: build().half().float(),
    "double": lambda build: build().double().float(),
    "made_on_meta": _on_meta,
    "moved_to_meta": lambda build: build().to("meta").to_empty(device="cpu"),
    "copied": lambda build: copy.deepcopy(build().bfloat16()).float(),
    "pickled": lambda build: pickle.loads(pickle.dumps(build().bfloat16())).float(),
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_weights_bring_everything_back(dirty_memory: None, variant: str, history: str) -> None:
    original, x = make(variant), inputs(T, N, C)
    moved = HISTORIES[history](lambda: make(variant))
    moved.load_state_dict(original.state_dict())
    expected = run(original, x)
    for key, value in run(moved, x).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("history", HISTORIES)
def test_a_decay_by_hand(dirty_memory: None, history: str) -> None:
    """exp(-1 ms / 20 ms), not the nearest number of 8 bits: M[1] / M[0] of an impulse."""
    readout = HISTORIES[history](lambda: LeakyIntegrator(tau_mem=0.02, tau_syn=None))
    first, second = readout(torch.tensor([1.0, 0.0]).view(2, 1, 1)).flatten().tolist()
    assert second / first == pytest.approx(math.exp(-1 / 20), rel=1e-6)


def test_learned_decays_are_made_where_the_others_are() -> None:
    with torch.device("meta"):
        assert LeakyIntegrator(learn_tau=True).beta.is_meta


USUAL = {"sew_resnet18", "ds_resnet20_gesture", "spikformer_2_256_dvs", "report_vgg16", "colored_mnist_net"}


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_saved_weights_hold_every_tensor_of_a_model(name: str) -> None:
    """Built on the meta device, as large models are: nothing but parameters and saved buffers is left there."""
    with torch.device("meta"):
        model = spikeloom.create_model(name)
    saved = model.state_dict()
    assert {n for n, _ in model.named_buffers()} <= set(saved)
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            assert not (isinstance(value, torch.Tensor) and value.is_meta), f"{path}.{attribute}"


def test_the_constant_norm_of_an_input(dirty_memory: None) -> None:
    """DS-ResNet's norm of event counts has a weight of 1 and a bias of 0 that no file holds."""
    model = spikeloom.create_model("ds_resnet20_gesture", T=2)
    saved = model.state_dict()
    norm = model.to("meta").to_empty(device="cpu").stem[0]  # pyright: ignore
    model.load_state_dict(saved)
    assert isinstance(norm, TdBN)
    assert torch.equal(norm.weight, torch.ones(2))
    assert torch.equal(norm.bias, torch.zeros(2))


# --- PyTorch's defaults -----------------------------------------------------------------------------------------------

# Constants that no other test has: kernels keep what they have read of them.
UNITS: dict[str, Callable[[], nn.Module]] = {
    "NormSpike": lambda: NormSpike(C, lambda: LIF(tau=1.97, v_threshold=0.73)),
    "NormSpike-eval": lambda: NormSpike(C, lambda: PLIF(v_threshold=0.71)).eval(),
    "MLF": lambda: NormSpike(C, lambda: MLF(v_threshold=(0.57, 1.21), strict=True)),
    "Rectangular": lambda: LIF(v_threshold=0.67, surrogate=Rectangular(closed=True)),
}


def unit(name: str) -> nn.Module:
    return make(name) if name in VARIANTS else UNITS[name]()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", [*UNITS, *VARIANTS])
def test_defaults_of_new_tensors_do_not_reach_kernels(dirty_memory: None, name: str, default: str) -> None:
    """A default device or type is for the user's tensors, and no place for a kernel to write to."""
    module, x, upstream = unit(name), inputs(T, N, C), torch.randn(T, N, C)

    def outcome() -> tuple[torch.Tensor, ...]:
        y = x.clone().requires_grad_()
        torch.manual_seed(3)
        out = module(y)
        out.backward(upstream)
        return out, y.grad if y.grad is not None else y

    with DEFAULTS[default]():
        got = outcome()
    for a, b in zip(got, outcome(), strict=True):
        assert torch.equal(a, b)


def test_a_closed_window_ends_behind_its_edge() -> None:
    """The first float32 beyond a half, whatever the default type."""
    expected = Rectangular(closed=True).formula
    for default in DEFAULTS.values():
        with default():
            assert Rectangular(closed=True).formula == expected
    assert expected is not None
    assert expected.q == 0.5 + 2**-24
