"""Layers and networks say what axes they want: a batch of images is not taken for a sequence, nor one for the other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_networks import EVENTS, SHAPES, SMALL
from PIL import Image
from torch import Tensor, nn

from spikeloom.encode import Frames, repeat
from spikeloom.layers import (
    AttentionProduct,
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    NormSpike,
    PadShortcut,
    PerStep,
    Repeat,
    SpatialAttention,
    SynapticAttention,
    TdBN,
)
from spikeloom.models import MODELS, create_model
from spikeloom.neurons import LIF

# Layers, and the numbers of axes that they take of tensors whose sides are all 4.
LAYERS: dict[str, tuple[Callable[[], nn.Module], set[int]]] = {
    "Conv1d": (lambda: Conv1d(4, 4, 3), {4}),
    "Conv2d": (lambda: Conv2d(4, 4, 3), {5}),
    "Linear": (lambda: Linear(4, 4), {3, 4, 5, 6}),
    "MaxPool2d": (lambda: MaxPool2d(2), {5}),
    "AvgPool2d": (lambda: AvgPool2d(2), {5}),
    "AvgPool1d": (lambda: AvgPool1d(2), {4}),
    "Dropout": (Dropout, {3, 4, 5, 6}),
    "GlobalAvgPool": (GlobalAvgPool, {5}),
    "GlobalAvgPool of rows": (lambda: GlobalAvgPool(dims=2), {4}),
    "Flatten": (Flatten, {3, 5}),
    "Flatten of rows": (lambda: Flatten(dims=2), {3, 4}),
    "PadShortcut": (lambda: PadShortcut(4, 8), {5}),
    "SpatialAttention": (SpatialAttention, {5}),
    "AttentionProduct": (lambda: OneInput(AttentionProduct(2)), {5}),
    "SynapticAttention": (lambda: SynapticAttention("space", nn.Sigmoid(), 4, 4), {5}),
    "BatchNorm": (lambda: BatchNorm(4), {3, 4, 5, 6}),
    "TdBN": (lambda: TdBN(4, eps_outside=True), {3, 4, 5, 6}),
    "NormSpike": (lambda: NormSpike(4, LIF), {3, 4, 5, 6}),
    "PerStep Conv3d": (lambda: PerStep(nn.Conv3d(4, 4, 3)), {6}),
    "PerStep pool": (lambda: PerStep(nn.MaxPool1d(2)), {4}),
    "PerStep GroupNorm": (lambda: PerStep(nn.GroupNorm(2, 4)), {3, 4, 5, 6}),
    "PerStep BatchNorm1d": (lambda: PerStep(nn.BatchNorm1d(4)), {3, 4}),
}


class OneInput(nn.Module):
    def __init__(self, product: AttentionProduct):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, x, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_other_axes(name: str) -> None:
    make, taken = LAYERS[name]
    layer = make().train()
    for axes in range(1, 7):
        x = torch.rand((4,) * axes)
        if axes in taken:
            assert layer(x).shape[:2] == (4, 4)
            continue
        with pytest.raises(ValueError, match=re.escape(f"got shape {tuple(x.shape)}")) as found:
            layer(x)
        assert re.search(r"takes a sequence \[T, N, ", str(found.value)), found.value
    with pytest.raises(TypeError, match=r"^\w+ takes a tensor, got ndarray: use torch\.from_numpy\(x\)\.float\(\)$"):
        layer(np.zeros((4,) * max(taken), np.float32))


@pytest.mark.parametrize("groups", [1, 64], ids=["plain", "depthwise"])
def test_a_convolution_refuses_other_channels(groups: int) -> None:
    # Large, and in channels-last memory: of a kind that the native kernels take.
    conv = Conv2d(64, 64, 3, padding=1, groups=groups, bias=False).to(memory_format=torch.channels_last)  # pyright: ignore
    for channels in (32, 128):
        x = torch.rand(32, channels, 16, 16).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 8))
        with pytest.raises(RuntimeError, match=rf"to have 64 channels, but got {channels} channels"):
            conv(x)


@pytest.mark.parametrize(("layer", "x"), [(Linear(4, 2), torch.rand(2, 3, 5)), (BatchNorm(4), torch.rand(2, 3, 5))])
def test_other_features_are_named(layer: nn.Module, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes a sequence \[T, N, 4.*\], got shape \(2, 3, 5\)"):
        layer(x)


# --- networks ---------------------------------------------------------------------------------------------------------


def image_shape(name: str) -> tuple[int, ...]:
    return {**SHAPES, "paralif_nmnist": (1 * 34 * 34,), "paralif_gesture": (8192,), **EVENTS}.get(name, (3, 32, 32))


def test_networks_for_events_take_sequences_alone() -> None:
    found = {name for name in MODELS if isinstance(inspect.signature(MODELS[name]).parameters["T"].default, Frames)}
    for name in found:
        options = {key: value for key, value in SMALL.get(name, {}).items() if key != "T"}
        with torch.device("meta"):
            with pytest.raises(ValueError, match=r"^this network takes sequences \[T, N, .*\], got shape \(8, "):
                create_model(name, **options)(torch.rand(8, *image_shape(name)))
            # With a T of one's own it is to show images.
            assert create_model(name, **options, T=2)(torch.rand(1, *image_shape(name))).shape[:2] == (2, 1)
    assert found == {
        "sew_7b",
        "spiking_7b",
        "plain_7b",
        "sew_wide_7b",
        "vggsnn",
        "plif_net",
        "delay_net",
        "ds_resnet14_dvs",
        "ds_resnet20_gesture",
        "spikformer_2_256_dvs",
        "spikingformer_2_256_dvs",
        "sequential_cifar_net",
        "shd_net",
        "paralif_shd",
        "paralif_ntidigits",
        "paralif_nmnist",
        "paralif_gesture",
    }


INPUTS: dict[str, tuple[Any, str]] = {
    "numpy": (np.zeros((1, 3, 28, 28), np.float32), r"got ndarray: use torch.from_numpy\(x\).float\(\)"),
    "PIL": (Image.new("RGB", (28, 28)), r"got Image: use torchvision.transforms.functional.to_tensor\(x\)\[None\]"),
    "nothing": (None, "got NoneType$"),
    "list": ([torch.zeros(3, 28, 28)], r"got list: use torch.stack"),
    "bytes": (
        torch.zeros(1, 3, 28, 28, dtype=torch.uint8),
        r"got uint8: use x.float\(\) for counts .* x.float\(\) / 255",
    ),
    "complex": (torch.zeros(1, 3, 28, 28, dtype=torch.complex64), "got torch.complex64"),
    "one image": (torch.zeros(3, 28, 28), r"got shape \(3, 28, 28\): .* one input alone as x\[None\]"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("colored_mnist_net", "spikformer_v2_2_64") for kind in INPUTS),
        # Here three axes are a sequence, or have a message of their own.
        *((name, kind) for name in ("shd_net", "masked_autoencoder") for kind in INPUTS if kind != "one image"),
    ],
)
def test_what_is_no_batch_is_named(name: str, kind: str) -> None:
    x, message = INPUTS[kind]
    model = create_model(name, **SMALL.get(name, {}))
    with pytest.raises((TypeError, ValueError), match=message):
        model(x)


@torch.no_grad()
def test_counts_of_events_are_numbers() -> None:
    torch.manual_seed(0)
    model = create_model("colored_mnist_net", in_channels=2, T=3).eval()
    counts = torch.randint(0, 9, (3, 2, 2, 28, 28))
    assert model(counts).any()
    assert torch.equal(model(counts), model(counts.float()))
    assert torch.equal(model(counts > 4), model((counts > 4).float()))


# --- wrappers ---------------------------------------------------------------------------------------------------------

PER_STEP: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(3), (4, 7, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 7, 5)),
    "LayerNorm": (lambda: nn.LayerNorm([4, 7]), (4, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 2, 2), (4, 7, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 2), (4, 3, 4, 5)),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), (4, 7)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (4, 7, 5)),
    "several": (lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(), nn.Flatten()), (4, 7, 5)),
}


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("name", PER_STEP)
def test_per_step_is_the_layer_at_every_step(name: str, repeated: bool) -> None:
    make, shape = PER_STEP[name]
    layer = make().double().eval()
    wrapped = PerStep(layer)
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    sequence = repeat(x, 5) if repeated else x[None] * torch.arange(1.0, 6.0).double().view(5, *(1,) * x.dim())
    expected = torch.stack([layer(step) for step in sequence])
    found = wrapped(sequence)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream, wanted = torch.randn_like(expected), [x, *layer.parameters()]
    gradients = [torch.autograd.grad(y, wanted, upstream, retain_graph=True) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_per_step_is_for_layers_of_torch() -> None:
    with pytest.raises(TypeError, match=r"but 1 is LIF, which takes sequences \[T, N, ...\]"):
        PerStep(nn.Sequential(nn.ReLU(), LIF()))
    with pytest.raises(TypeError, match=r"this module is Conv2d, which takes sequences"):
        PerStep(Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"give one tensor; GRU gives tuple"):
        PerStep(nn.GRU(4, 4, batch_first=True))(torch.rand(2, 3, 5, 4))


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    net = Repeat(nn.Sequential(PerStep(nn.Conv2d(3, 8, 3)), LIF(), Flatten(), Linear(8 * 36, 5)), T=4)
    x = torch.rand(6, 3, 8, 8) * 4
    logits = net(x)
    assert logits.shape == (4, 6, 5)
    for i in range(len(x)):
        torch.testing.assert_close(net(x[i : i + 1])[:, 0], logits[:, i])
    torch.testing.assert_close(logits, net.net(x.repeat(4, 1, 1, 1, 1)))
    assert (logits[0] - logits[1]).abs().max() > 0.01, "the neurons remember"


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Conv2d(3, 4, 3), "Conv2d"),
        (nn.Flatten(), "Flatten"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d"),
        (nn.GroupNorm(1, 3), "GroupNorm"),
        (nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.Upsample(scale_factor=2), "Upsample"),
    ],
)
def test_repeat_names_the_layer_that_takes_time_for_the_batch(layer: nn.Module, name: str) -> None:
    with pytest.raises(TypeError, match=rf"layer 1\.0 is torch\.nn\.{name}, .*spikeloom\.layers\.PerStep"):
        Repeat(nn.Sequential(LIF(), nn.Sequential(layer)), 2)


def test_repeat_takes_what_it_can() -> None:
    with pytest.raises(ValueError, match="T must be at least 1, got 0"):
        Repeat(LIF(), 0)
    net = Repeat(nn.Sequential(nn.Flatten(2), nn.ReLU(), nn.Linear(12, 5)), 3)
    assert net(torch.ones(2, 3, 4, dtype=torch.int64)).shape == (3, 2, 5)
    # Modules of other kinds are their owners' affair.
    assert Repeat(create_model("colored_mnist_net"), 3)(torch.rand(2, 3, 28, 28)).shape == (3, 2, 2)
    assert str(Repeat(LIF(), 3)).startswith("Repeat(\n  T=3\n")
