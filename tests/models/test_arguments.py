"""What a network is made with: mistakes are one line, whichever network it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.small_networks import SMALL

from spikeloom.errors import UsageError
from spikeloom.models import MODELS, create_model, list_models
from spikeloom.neurons import GLIF, LIF, PSN, RecurrentLIF

WRONG: dict[str, tuple[Any, str]] = {
    "a name": ("LIF", r"must be a class or function that makes a new layer .* got 'LIF'$"),
    "a layer": (LIF(tau=3.0), r"must be a class or function that makes a new layer .* got a LIF$"),
    "a class that needs T": (PSN, r"PSN needs T: give lambda: PSN\(T=...\)$"),
    "a function that makes nothing": (lambda: None, "must make a layer, a torch.nn.Module; it made None$"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_model_refuses_what_makes_no_neurons(kind: str) -> None:
    neuron, message = WRONG[kind]
    # One of each builder: those of other depths are the same functions.
    for name in {(MODELS[name].__module__, MODELS[name].__qualname__): name for name in list_models()}.values():
        with pytest.raises(UsageError, match=rf"^neuron {message}") as found, torch.device("meta"):
            create_model(name, neuron=neuron)
        assert "\n" not in str(found.value), name


@pytest.mark.parametrize("name", ["report_vgg16", "colored_mnist_net", "shd_net", "syna_resnet18"])
def test_neurons_that_know_their_width(name: str) -> None:
    for neuron in (lambda channels: GLIF(channels, T=2), lambda features: RecurrentLIF(features)):
        with torch.device("meta"):
            assert create_model(name, **SMALL.get(name, {}), neuron=neuron)


@pytest.mark.parametrize("key", ["T", "in_channels", "num_classes"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, "4", None])
def test_counts_are_whole_numbers(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^model sew_7b: {key} must be (an integer of )?at least 1, got {value!r}$"):
        create_model("sew_7b", **{key: value})
