"""Weights of other networks by order and shape: what is matched, what is left over, and nothing in silence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv2d, Flatten, Linear, NormSpike
from spikeloom.models import copy_weights, load_spikingjelly
from spikeloom.neurons import IF, PLIF


class Theirs(nn.Module):
    """A user's own network, with names and containers of its own."""

    def __init__(self, classes: int = 3, bias: bool = True):
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.Conv2d(2, 4, 3, bias=bias), "b": nn.BatchNorm2d(4)})
        self.mixer = nn.Linear(4, 4, bias=bias)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4 * 36, classes))


def ours(classes: int = 3) -> nn.Sequential:
    layers = [Conv2d(2, 4, 3), NormSpike(4, IF), Conv2d(4, 4, 1), Flatten(), Linear(4 * 36, classes)]
    return nn.Sequential(*layers)


def test_names_of_both_sides() -> None:
    source, model = Theirs(), ours()
    nn.init.uniform_(source.encoder["b"].running_mean)
    found = copy_weights(source, model)
    assert found.matched == {
        "encoder.a.weight": "0.weight",
        "encoder.a.bias": "0.bias",
        **{f"encoder.b.{k}": f"1.norm.{k}" for k in ("weight", "bias", "running_mean", "running_var")},
        "encoder.b.num_batches_tracked": "1.norm.num_batches_tracked",
        "mixer.weight": "2.weight",
        "mixer.bias": "2.bias",
        "classifier.1.weight": "4.weight",
        "classifier.1.bias": "4.bias",
    }
    assert found.source_left == found.model_left == found.zeroed == ()
    for theirs, mine in found.matched.items():
        a, b = source.state_dict()[theirs], model.state_dict()[mine]
        assert torch.equal(a, b.view(a.shape))


def test_a_bias_that_the_source_lacks_is_zero() -> None:
    model = ours()
    found = copy_weights(Theirs(bias=False), model)
    assert found.zeroed == ("0.bias", "2.bias")
    assert not model.state_dict()["0.bias"].any()


def test_what_is_left_over_is_an_error_that_changes_nothing() -> None:
    model = ours(classes=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = (
        "only part of the weights fits: 9 tensors matched; left over in the source: classifier.1.weight, "
        "classifier.1.bias; left over in the model: 4.weight, 4.bias; build the model with"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        copy_weights(Theirs(), model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_left_over_may_be_left() -> None:
    model = ours(classes=5)
    with pytest.warns(UserWarning, match=r"9 tensors matched; left over in the source: classifier.1.weight"):
        found = copy_weights(Theirs(), model, strict=False)
    assert found.source_left == ("classifier.1.weight", "classifier.1.bias")
    assert found.model_left == ("4.weight", "4.bias")


def test_a_bias_that_the_model_lacks_is_left_over() -> None:
    with pytest.raises(UsageError, match=r"left over in the source: 0.bias; left over in the model: none"):
        copy_weights(nn.Sequential(nn.Conv2d(2, 4, 3)), nn.Sequential(Conv2d(2, 4, 3, bias=False)))


def test_nothing_fits() -> None:
    for strict in (True, False):
        with pytest.raises(UsageError, match=r"no weights fit: the source begins with 0.weight \(3, 2\), the model"):
            copy_weights(nn.Sequential(nn.Linear(2, 3)), ours(), strict)


def test_what_neurons_learn_is_matched_by_itself() -> None:
    """Of two networks one registers its neuron before the layer, one behind it."""
    first = nn.ModuleList([PLIF(tau=3.0), nn.Linear(2, 2), PLIF(tau=4.0), nn.Linear(2, 2)])
    model = nn.ModuleList([Linear(2, 2), PLIF(), Linear(2, 2), PLIF()])
    assert len(copy_weights(first, model).matched) == 6
    assert [(1 / model[i].w.detach().sigmoid()).item() for i in (1, 3)] == pytest.approx([3.0, 4.0])  # pyright: ignore


@pytest.mark.parametrize("source", [{"a.weight": [1.0]}, {"a.weight": None}])
def test_what_is_no_tensor(source: Any) -> None:
    with pytest.raises(UsageError, match=r"^copy_weights: a.weight is a \w+, not a tensor"):
        copy_weights(source, ours())


def test_an_order_that_is_lost_is_an_error(tmp_path: Path) -> None:
    """safetensors sorts names: the layers of equal shapes would change places in silence."""
    save_file(Theirs().state_dict(), tmp_path / "a.safetensors")
    for source in (tmp_path / "a.safetensors", load_file(tmp_path / "a.safetensors")):
        with pytest.raises(
            UsageError, match=r"^copy_weights: the names of the tensors are sorted.*saved by torch.save$"
        ):
            copy_weights(source, ours())


def test_numbers_keep_an_order_that_was_lost(tmp_path: Path) -> None:
    chain = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    save_file(chain.state_dict(), tmp_path / "a.safetensors")
    model = nn.Sequential(*(Linear(2, 2) for _ in range(12)))
    copy_weights(tmp_path / "a.safetensors", model)
    for a, b in zip(chain, model, strict=True):
        assert torch.equal(a.weight, b.weight)


def test_a_module_of_ones_own_as_a_registered_network() -> None:
    class Own(nn.Module):
        """VGG-11 by hand, with other names."""

        def __init__(self) -> None:
            super().__init__()
            widths = (64, 128, 256, 256, 512, 512, 512, 512)
            self.body = nn.ModuleList()
            for before, width in zip((1, *widths), widths, strict=False):
                self.body.append(nn.Conv2d(before, width, 3, padding=1))
            self.end = nn.ModuleList([nn.Linear(512 * 49, 8), nn.Linear(8, 8), nn.Linear(8, 6)])

    own = Own()
    model: Any = load_spikingjelly(own, "spiking_vgg11", hidden=8)
    assert torch.equal(model.features[0].weight, own.body[0].weight)
    assert torch.equal(model.head[-1].weight, own.end[2].weight)
    x: Tensor = torch.rand(2, 1, 32, 32)
    assert model(x).shape == (4, 2, 6)
    assert not any(isinstance(module, BatchNorm) for module in model.modules())
