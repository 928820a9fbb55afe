"""First filters set by data, and the norms' biases that learn faster than the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import NORMED, SMALL, Told, equal, resolved, run_of, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv2d
from spikeloom.models import create_model
from spikeloom.train import fit
from spikeloom.train.build import build_model
from spikeloom.train.loop import Interrupted, train
from spikeloom.train.optim import build_optimizer, build_schedule
from spikeloom.train.run import Run
from spikeloom.train.whiten import check_images, first_convolution, whiten

pytestmark = pytest.mark.usefixtures("one_thread")

WHITE: dict[str, Any] = {**NORMED, "train": {**NORMED["train"], "whiten": True, "norm_bias_lr_scale": 8.0}}


# --- filters ----------------------------------------------------------------------------------------------------------


def test_what_passes_the_filters_is_uncorrelated() -> None:
    """Without padding, the largest variance first; each filter has its negative, and the rest is as it was drawn."""
    x = F.avg_pool2d(torch.randn(40, 3, 17, 15), 3, stride=1)
    conv = Conv2d(3, 59, 3, stride=2, bias=False)
    drawn = conv.weight.detach().clone()
    whiten(conv, x)
    w = conv.weight.detach()
    assert torch.equal(w[27:54], -w[:27])
    assert torch.equal(w[54:], drawn[54:])
    flat = w[:27].flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(27), atol=1e-5, rtol=0)
    y = F.conv2d(x, w[:27]).transpose(0, 1).flatten(1).double()
    moments = y @ y.T / y.shape[1]
    variances = moments.diagonal()
    assert (moments - variances.diag()).abs().max() < 1e-5 * variances[0]
    assert bool((variances[:-1] >= variances[1:]).all())


def test_few_filters_take_the_largest_components() -> None:
    x = torch.randn(8, 2, 6, 6)
    many, few = Conv2d(2, 36, 3), Conv2d(2, 7, 3)
    whiten(many, x)
    whiten(few, torch.stack([x, x]))  # a sequence
    torch.testing.assert_close(few.weight[:3].abs(), many.weight[:3].abs())
    assert torch.equal(few.weight[3:6], -few.weight[:3])
    one = Conv2d(2, 1, 3)
    drawn = one.weight.detach().clone()
    whiten(one, x)  # no room for a component and its negative
    assert torch.equal(one.weight, drawn)


def test_the_first_convolution() -> None:
    for name in ("cifar10_net", "report_vgg16", "ghostnet_snn", "spikingformer_4_256"):
        assert first_convolution(create_model(name)).in_channels == 3
    with pytest.raises(UsageError, match=r"train\.whiten: the network has no convolution of images that joins all"):
        first_convolution(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8, 1, 9, 9), r"takes images of 3 channels, and inputs are \[8, 1, 9, 9\]"),
        ((8, 700), r"takes images of 3 channels, and inputs are \[8, 700\]"),
        ((8, 3, 9, 2), r"inputs \[8, 3, 9, 2\] are smaller than the kernel, \(3, 3\)"),
    ],
)
def test_inputs_that_have_no_patches(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_images(Conv2d(3, 8, 3), torch.zeros(shape))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_first_filters(tmp_path: Path) -> None:
    """And ends with the same bits when it was interrupted."""
    whole = run_of(tmp_path / "whole", WHITE)
    train(whole, Told())
    trained = weights(whole)
    model = build_model(whole.settings, 1, 10)
    name = next(name for name, module in model.named_modules() if module is first_convolution(model)) + ".weight"
    filters = trained[name].flatten(1)
    half = min(len(filters) // 2, filters.shape[1])
    assert torch.equal(filters[:half], -filters[half : 2 * half])
    torch.testing.assert_close(filters[:half] @ filters[:half].T, torch.eye(half), atol=1e-5, rtol=0)
    for stop in (1, 5):
        parts, told = run_of(tmp_path / f"parts{stop}", WHITE), Told()
        with pytest.raises(Interrupted):
            train(parts, told, stop=lambda told=told, stop=stop: len(told.steps) == stop)
        train(Run.open(parts.folder), Told())
        assert equal(weights(parts), trained)


def test_a_network_without_such_filters_leaves_nothing(tmp_path: Path) -> None:
    images = TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Unflatten(0, (1, -1)))
    with pytest.raises(UsageError, match=r"train\.whiten: the network has no convolution of images"):
        fit(model, images, images, out=tmp_path / "run", progress=Told(), epochs=1, batch_size=16, lr=0.01, whiten=True)
    assert not (tmp_path / "run").exists()


def test_a_model_of_ones_own_can_learn_again(tmp_path: Path) -> None:
    model = create_model("report_sew_resnet34", in_channels=1, T=1)
    images = TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 10)
    fit(model, images, images, out=tmp_path / "run", progress=Told(), epochs=1, batch_size=16, lr=0.01, whiten=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_settings_without_these_keys_are_written_without_them() -> None:
    plain, white = resolved(NORMED).model_dump()["train"], resolved(WHITE).model_dump()["train"]
    assert {*white} - {*plain} == {"whiten", "norm_bias_lr_scale"}


@pytest.mark.parametrize(("key", "value"), [("shard", True), ("start_from", "runs/other")])
def test_what_does_not_go_with_first_filters(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"train\.{key} .*cannot both be given") as caught:
        resolved(WHITE, train={key: value})
    assert "train.whiten" in str(caught.value)


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "one_cycle", "step"])
def test_biases_of_norms_learn_faster(schedule: str, decay_all: bool) -> None:
    """By the same factor in every step; what decay takes off them in a step is as much as of other weights."""
    model = nn.Sequential(Conv2d(3, 4, 3), BatchNorm(4), nn.LayerNorm(4), nn.Linear(4, 2))
    changes = {"optimizer": "sgd", "lr": 0.1, "epochs": 4, "warmup_epochs": 1.0, "weight_decay": 1e-3}
    changes |= {"schedule": schedule, "decay_all": decay_all, "norm_bias_lr_scale": 8.0}
    if schedule == "step":
        changes["milestones"] = [2.0]
    t = resolved(SMALL, train=changes).train
    optimizer = build_optimizer(t, model)
    fast = {id(model[1].bias), id(model[2].bias)}
    update = build_schedule(t, optimizer, 4)
    for step in range(16):
        update.step_update(step)
        groups = optimizer.param_groups
        slow = groups[0]
        assert sum(len(group["params"]) for group in groups) == 8
        for group in groups:
            quick = {id(p) in fast for p in group["params"]}
            assert len(quick) == 1
            assert group["lr"] == pytest.approx(slow["lr"] * (8.0 if quick == {True} else 1.0))
            decays = decay_all or all(p.dim() > 1 for p in group["params"])
            assert group["lr"] * group["weight_decay"] == pytest.approx(slow["lr"] * 1e-3 if decays else 0.0)
