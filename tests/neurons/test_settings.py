"""What constructors of neurons refuse, and networks made of them: one line, and no later than at construction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers.neuron_variants import ARGUMENTS, C, N, T, inputs, make
from torch import Tensor, nn

import spikeloom
from spikeloom.errors import UsageError
from spikeloom.layers import NormSpike, SpikingSelfAttention, TdBN
from spikeloom.models import MODELS
from spikeloom.models._residual import ResidualNet
from spikeloom.neurons import IF, LIF, MLF, NEURONS, PLIF, ParaLIF, make_neuron
from spikeloom.surrogates import SURROGATES, ATan, Surrogate, Triangle, as_surrogate


def taking(argument: str) -> list[str]:
    """The registered neurons whose constructor takes an argument."""
    return [name for name in NEURONS if argument in inspect.signature(NEURONS[name]).parameters]


def refused(name: str, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as found:
        NEURONS[name](**{**ARGUMENTS[name], **settings})
    assert "\n" not in str(found.value)


# --- surrogates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", taking("surrogate"))
def test_surrogates_by_name(name: str) -> None:
    for surrogate in SURROGATES:
        for spelling in (surrogate, surrogate.lower()):
            assert make(name, surrogate=spelling).surrogate == SURROGATES[surrogate]()
    x = inputs(T, N, C)
    by_name, by_value = (x.clone().requires_grad_() for _ in range(2))
    for y, surrogate in ((by_name, "triangle"), (by_value, Triangle())):
        torch.manual_seed(3)
        make(name, surrogate=surrogate)(y).sum().backward()
    assert torch.equal(by_name.grad, by_value.grad)  # pyright: ignore[reportArgumentType]
    refused(name, r"unknown surrogate 'atam'; did you mean", surrogate="atam")


@dataclass(frozen=True, eq=False)
class Learned(Surrogate):
    """A surrogate with a width to train, as a user would write it."""

    width: Tensor

    def primitive(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x / self.width)

    def derivative(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(x / self.width)
        return s * (1 - s) / self.width


class LearnedByClass(Learned):
    """With the width where a beginner would write it."""

    width: Tensor = nn.Parameter(torch.tensor(1.0))  # pyright: ignore

    def __init__(self):
        pass


class LearnedModule(nn.Module, Surrogate):  # pyright: ignore[reportUnsafeMultipleInheritance]
    """The same as a module."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.tensor(1.0))

    primitive, derivative = Learned.primitive, Learned.derivative


@pytest.mark.parametrize("name", taking("surrogate"))
def test_surrogates_with_values_to_train(name: str) -> None:
    """They would get no gradient, and nothing would say so."""
    message = r"surrogate Learned\w* has values to train \(width\), and they would get no gradient"
    refused(name, message, surrogate=Learned(nn.Parameter(torch.tensor(1.0))))
    refused(name, message, surrogate=Learned(torch.tensor(1.0, requires_grad=True)))
    refused(name, message, surrogate=LearnedModule())
    refused(name, message, surrogate=LearnedByClass())
    # With a constant in the same place it is a surrogate like any other.
    x = inputs(T, N, C).requires_grad_()
    make(name, surrogate=Learned(torch.tensor(1.0)))(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", taking("surrogate"))
def test_what_is_no_surrogate(name: str) -> None:
    refused(name, r"surrogate must be a name such as 'ATan', .*got the class ATan", surrogate=ATan)
    refused(name, r"got a Sigmoid", surrogate=nn.Sigmoid())
    refused(name, r"got a NoneType", surrogate=None)
    refused(name, r"got a function", surrogate=lambda x: x)


def test_a_surrogate_is_itself() -> None:
    surrogate = ATan(3.0)
    assert as_surrogate(surrogate) is surrogate


# --- numbers ----------------------------------------------------------------------------------------------------------

NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "nan": (math.nan, "nan"),
    "inf": (math.inf, "inf"),
    "-inf": (-math.inf, "-inf"),
    "text": ("1", "'1'"),
    "tensor": (torch.tensor(1.0), "a Tensor"),
    "parameter": (nn.Parameter(torch.tensor(1.0)), "a Parameter"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize(
    ("argument", "name"),
    [(a, n) for a in ("v_threshold", "v_reset", "tau", "tau_mem", "tau_syn", "time_step") for n in taking(a)],
)
def test_numbers(argument: str, name: str, kind: str) -> None:
    value, shown = NO_NUMBERS[kind]
    if kind == "inf" and argument in ("tau_mem", "tau_syn"):
        pytest.skip("an integrator without leak")
    called = "a time constant" if argument in ("tau_mem", "tau_syn") else argument
    kind = r"(a finite number|a positive number|greater than 1)"
    refused(name, rf"^{called} must be {kind}, got {shown}", **{argument: value})


@pytest.mark.parametrize(
    ("argument", "name"),
    [(a, n) for a in ("decay_input", "detach_reset", "strict", "hard_gates") for n in taking(a)],
)
def test_flags(argument: str, name: str) -> None:
    """A number in the place of a flag was meant for another argument, such as a threshold."""
    for value, shown in ((0.5, "0.5"), (1, "1"), (None, "None")):
        with pytest.raises(TypeError, match=rf"^{argument} is True or False, got {shown}$"):
            make(name, **{argument: value})


@pytest.mark.parametrize("value", [0, -0.5])
@pytest.mark.parametrize("name", taking("v_threshold"))
def test_thresholds_that_are_not_positive(name: str, value: float) -> None:
    if name in ("IF", "LIF", "PLIF", "KLIF"):
        refused(name, r"v_threshold must be a positive number, got", v_threshold=value, v_reset=None)
        refused(name, rf"v_reset must be below v_threshold, got 0\.0 and {value}", v_threshold=value)
    else:
        refused(name, r"v_threshold must be a positive number, got", v_threshold=value)


def test_membranes_in_millivolts() -> None:
    """A hard reset has no zero of its own: -65 to -50 is 0 to 15."""
    x = inputs(T, N, C) * 20
    shifted = LIF(v_threshold=-50.0, v_reset=-65.0)(x)
    assert torch.equal(shifted, LIF(v_threshold=15.0)(x))
    assert shifted.any()


@pytest.mark.parametrize("levels", [(0.5, math.nan), (math.inf,), (0.5, "1"), "1"])
def test_levels(levels: Any) -> None:
    with pytest.raises(ValueError, match="v_threshold must be a positive number, got"):
        MLF(v_threshold=levels)


def test_one_level_and_thresholds_of_features() -> None:
    assert MLF(v_threshold=0.6).v_threshold == (0.6,)
    x = inputs(T, N, C)
    thresholds = [0.1, 0.2, 0.3, 0.4]
    neuron = ParaLIF("t", tau_mem=0.002, tau_syn=None, v_threshold=thresholds)
    assert torch.equal(neuron(x), (neuron.potentials(x) > torch.tensor(thresholds)).float())
    assert neuron(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="v_threshold must be a positive number, got nan"):
        ParaLIF("t", v_threshold=[0.1, math.nan])


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", None])
@pytest.mark.parametrize(
    ("argument", "name"), [(a, n) for a in ("T", "order", "channels", "features") for n in taking(a)]
)
def test_counts(argument: str, name: str, value: Any) -> None:
    refused(name, rf"^{argument} must be (an integer of )?at least 1, got {value!r}$", **{argument: value})


def test_numbers_of_numpy() -> None:
    assert LIF(np.float64(2.0), v_threshold=np.float32(0.5)).v_threshold == 0.5  # pyright: ignore[reportArgumentType]
    assert make("PSN", T=np.int64(T))(inputs(T, N, C)).shape == (T, N, C)


@pytest.mark.parametrize("settings", [{"v_threshold": math.nan}, {"alpha": math.inf}, {"v_threshold": 0.0}])
def test_norms(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"(v_threshold|alpha) must be a positive number, got"):
        TdBN(3, **settings)


# --- networks ---------------------------------------------------------------------------------------------------------

NO_FACTORIES: dict[str, tuple[Any, str]] = {
    "name": ("LIF", "got 'LIF'"),
    "layer": (LIF(), "got a LIF"),
    "none": (None, "got a NoneType"),
    "number": (2.0, "got a float"),
}


@pytest.mark.parametrize("kind", NO_FACTORIES)
def test_what_cannot_make_neurons(kind: str) -> None:
    value, shown = NO_FACTORIES[kind]
    places: list[Callable[[], Any]] = [
        lambda: make_neuron(value, 3),
        lambda: NormSpike(3, value),
        lambda: SpikingSelfAttention(8, 2, value),
        lambda: MODELS["sew_resnet18"](neuron=value),
        *(lambda name=name: spikeloom.create_model(name, neuron=value) for name in MODELS),
    ]
    for place in places:
        with pytest.raises(
            UsageError, match=rf"^neuron must be a class or function .*spikeloom\.neurons\.LIF.* {shown}"
        ):
            place()


@pytest.mark.parametrize("T", [0, -1, 2.5, "4", None])
def test_steps_of_a_network(T: Any) -> None:
    message = rf"^(model \w+: )?T must be (an integer of )?at least 1, got {T!r}$"
    for name in MODELS:
        with pytest.raises(ValueError, match=message):
            spikeloom.create_model(name, T=T)
    with pytest.raises(ValueError, match=message):
        ResidualNet(nn.Identity(), NormSpike(3, IF), nn.ModuleList([nn.Identity()]), nn.Identity(), T)


def test_every_builder_checks_its_steps() -> None:
    """Also where `create_model` does not: called by itself, on the meta device, which costs no memory."""
    with torch.device("meta"):
        for name in ("sew_resnet18", "sew_7b", "report_vgg16", "colored_mnist_net", "spikformer_2_384", "vggsnn"):
            with pytest.raises(ValueError, match="T must be at least 1, got 0"):
                MODELS[name](T=0)


def test_a_network_takes_neurons_that_are_told_their_channels() -> None:
    model = spikeloom.create_model("report_vgg16", T=2, neuron=lambda channels: make("GLIF", channels=channels, T=2))
    assert model(torch.rand(1, 3, 32, 32)).shape[:2] == (2, 1)
    assert any(isinstance(m, PLIF) for m in spikeloom.create_model("report_vgg16", neuron=PLIF).modules())
