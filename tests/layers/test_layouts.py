"""Layouts: the stride of an axis of size one says nothing, and no number and no gradient may depend on it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_networks import EVENTS, SMALL
from torch import Tensor, nn

from spikeloom import Stream, backend, create_model
from spikeloom import layers as L
from spikeloom.layers.spiking_attention import mlp_branch
from spikeloom.neurons import IF, LIF, NEURONS, PSU, LeakyIntegrator, ParaLIF
from spikeloom.ops import _dispatch
from spikeloom.ops._dispatch import Backend

Shape = tuple[int, int, int, int, int]
# All of one image. Of others, with each length and batch, every two of channels, height and width: not all three.
SHAPES: list[Shape] = [
    shape
    for shape in itertools.product((1, 2), (1, 2), (1, 4), (1, 4), (1, 3))
    if shape[:2] == (1, 1) or sum(size > 1 for size in shape[2:]) % 2 == 0
]

STEPS: dict[str, dict[str, Any]] = {"MaskedPSN": {"order": 2}, "PSN": {}, "IPSU": {}, "RPSU": {}, "GLIF": {}}
BACKENDS: tuple[Backend, ...] = ("reference",) if _dispatch.native is None else ("reference", "native")
RANDOM = {"SPSN", "ParaLIF", "RecurrentParaLIF"}  # other draws in another order of memory


class Apply(nn.Module):
    """A module from a function of modules and x."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module):
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(*self.inner, x)


def neuron(name: str, T: int, C: int) -> nn.Module:
    if name == "SlidingPSN":
        return NEURONS[name](order=2)
    settings = {**STEPS[name], "T": T} if name in STEPS else {}
    return NEURONS[name](**settings | ({"channels": C} if name == "GLIF" else {}))


NEURON_LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    name: lambda s, name=name: neuron(name, s[0], s[2])
    for name in NEURONS
    if name not in RANDOM and not name.startswith("Recurrent")
}
NEURON_LAYERS.update(
    {
        "RecurrentLIF": lambda s: nn.Sequential(L.Flatten(), NEURONS["RecurrentLIF"](features=s[2] * s[3] * s[4])),
        "ParaLIF t": lambda s: ParaLIF("t", v_threshold=0.02, learn_tau=True, learn_threshold=True),
        "ParaLIF d": lambda s: ParaLIF("sd", v_threshold=0.02, learn_tau=True, learn_threshold=True),
        "LeakyIntegrator of every column": lambda s: LeakyIntegrator(
            [0.01 + 0.01 * i for i in range(s[4])], learn_tau=True
        ),
    }
)


def norms() -> Iterator[tuple[str, Callable[[Shape], nn.Module]]]:
    for training in (True, False):
        end = "" if training else " in evaluation"
        yield f"BatchNorm{end}", lambda s, t=training: L.BatchNorm(s[2]).train(t)
        yield f"TdBN{end}", lambda s, t=training: L.TdBN(s[2], 0.5).train(t)
        yield f"TdBN eps outside{end}", lambda s, t=training: L.TdBN(s[2], 0.5, eps_outside=True).train(t)
        yield f"NormSpike{end}", lambda s, t=training: L.NormSpike(s[2], LIF).train(t)
        yield f"NormSpike PSU{end}", lambda s, t=training: L.NormSpike(s[2], PSU).train(t)
    yield "each_step of a torch.nn norm", lambda s: Apply(L.each_step, nn.BatchNorm2d(s[2])).eval()


def last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def heads(s: Shape) -> int:
    return min(2, s[2])


LAYERS: dict[str, Callable[[Shape], nn.Module]] = {
    **dict(norms()),
    "Conv2d": lambda s: L.Conv2d(s[2], 6, 3, padding=1),
    "Conv2d 1x1, channels-last": lambda s: last(L.Conv2d(s[2], 6, 1)),
    "Conv2d with stride, channels-last": lambda s: last(L.Conv2d(s[2], 6, 3, 2, 1)),
    "Conv2d depthwise": lambda s: L.Conv2d(s[2], s[2], 3, 2, 1, groups=s[2]),
    "Conv2d depthwise, channels-last": lambda s: last(L.Conv2d(s[2], s[2], 3, 1, 1, groups=s[2])),
    "Conv1d": lambda s: Apply(lambda conv, x: conv(x.flatten(3)), L.Conv1d(s[2], 3, 1)),
    "Linear": lambda s: L.Linear(s[4], 5),
    "DelayedLinear": lambda s: Apply(lambda layer, x: layer(x.flatten(2)), L.DelayedLinear(math.prod(s[2:]), 5, 3)),
    "MaxPool2d": lambda s: L.MaxPool2d(3, 2, 1),
    "AvgPool2d": lambda s: L.AvgPool2d(3, 2, 1),
    "AvgPool1d": lambda s: Apply(lambda pool, x: pool(x.flatten(3)), L.AvgPool1d(1)),
    "GlobalAvgPool": lambda s: L.GlobalAvgPool(),
    "Flatten": lambda s: L.Flatten(),
    "MaxOverSteps": lambda s: L.MaxOverSteps(),
    "PopulationSum": lambda s: Apply(lambda layer, x: layer(x.flatten(2)), L.PopulationSum(1)),
    "Dropout": lambda s: L.Dropout(0.5).eval(),
    "PerStep": lambda s: L.PerStep(last(nn.Conv2d(s[2], 6, 1))),
    "PerStep of a norm": lambda s: L.PerStep(nn.BatchNorm2d(s[2])).eval(),
    "Repeat": lambda s: Apply(lambda net, x: net(x[0]), L.Repeat(L.BatchNorm(s[2]).eval(), 3)),
    "PadShortcut": lambda s: L.PadShortcut(s[2], s[2] + 3),
    "SpatialAttention": lambda s: L.SpatialAttention(3),
    **{
        f"SynapticAttention {axis}": lambda s, axis=axis: L.SynapticAttention(axis, nn.Sigmoid(), s[0], s[2])
        for axis in ("time", "channel", "space")
    },
    "SynapticAttention gated by neurons": lambda s: L.SynapticAttention("space", IF(), s[0], s[2]),
    **{
        f"AttentionProduct {variant}": lambda s, variant=variant: Apply(
            lambda product, x: product(x, x / 2, x * x), L.AttentionProduct(heads(s), variant=variant)
        )
        for variant in ("ssa", "softmax")
    },
    "SpikingSelfAttention": lambda s: L.SpikingSelfAttention(s[2], heads(s), LIF),
    "mlp_branch": lambda s: mlp_branch(s[2], LIF),
    "PlainBlock": lambda s: L.PlainBlock(L.basic_branch(s[2], s[2], 1, LIF), L.NormSpike(s[2], LIF)),
    "VanillaBlock": lambda s: L.VanillaBlock(
        L.bottleneck_branch(s[2], 8, 2, LIF), L.NormSpike(8, LIF), L.conv_shortcut(s[2], 8, 2, pool=True)
    ),
    "SEWBlock": lambda s: L.SEWBlock(
        L.basic_branch(s[2], 8, 2, LIF), L.NormSpike(8, LIF), L.conv_shortcut(s[2], 8, 2, LIF)
    ),
    "MembraneBlock": lambda s: Apply(
        lambda block, x: sum(block(x, x / 4)),  # pyright: ignore[reportArgumentType]
        L.MembraneBlock(L.basic_branch(s[2], s[2], 1, LIF), L.NormSpike(s[2], LIF), nn.Identity()),
    ),
}


def test_every_layer_and_neuron_is_here() -> None:
    named = {name.split()[0] for name in (*LAYERS, *NEURON_LAYERS)}
    public = {name for name in L.__all__ if inspect.isclass(found := getattr(L, name)) and issubclass(found, nn.Module)}
    assert public <= named
    assert set(NEURONS) - RANDOM <= named


def laid_out(x: Tensor, channels_last: bool, one: int | None) -> Tensor:
    """x [T, N, C, ...] in one of two orders of memory; axes of size one have the stride `one`, or a regular one."""
    axis = 2 if x.dim() > 2 else 1
    x = x.movedim(axis, -1).contiguous().movedim(-1, axis) if channels_last else x.contiguous()
    if one is None:
        return x
    strides = [one if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def results(layer: nn.Module, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    upstream = torch.randn(y.shape, dtype=y.dtype) if grad is None else grad
    found: Any = torch.autograd.grad(y, inputs, upstream, allow_unused=True)
    grads = (torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True))
    return [y.detach(), *grads, upstream]


def same(found: list[Tensor], wanted: list[Tensor], where: object) -> None:
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape == b.shape, where
        # Of a weight before a norm next to nothing is left of the gradient but rounding.
        difference = (a.double() - b).abs().max() / (b.abs().max() + 0.1)
        assert difference < 1e-3, (where, number, difference.item())


@pytest.mark.parametrize("name", [*LAYERS, *NEURON_LAYERS])
def test_axes_of_size_one(name: str) -> None:
    make = {**LAYERS, **NEURON_LAYERS}[name]
    for shape in SHAPES:
        torch.manual_seed(1)
        layer = make(shape)
        if name not in NEURON_LAYERS:
            for p in layer.parameters():
                if p.dim() == 1:
                    nn.init.uniform_(p, 0.5, 1.5)
        x = torch.randint(-16, 25, shape) / 8
        double = copy.deepcopy(layer).double()
        with backend("reference"):
            *wanted, grad = results(double, x.double())
        strides = (None, 1, shape[2]) if shape[:2] == (1, 1) else (None,)
        for number, (order, one) in enumerate(itertools.product((False, True), strides)):
            given = laid_out(x, order, one)
            upstream = laid_out(grad.float(), not order, strides[(number + 1) % len(strides)])
            for chosen in BACKENDS:
                with backend(chosen):
                    found = results(copy.deepcopy(layer), given, upstream)[:-1]
                same(found, wanted, (chosen, shape, given.stride(), upstream.stride()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_one_image_by_hand(training: bool, dtype: torch.dtype) -> None:
    x, g = torch.randn(1, 1, 3, 4, 4, dtype=dtype), torch.randn(1, 1, 3, 4, 4, dtype=dtype)
    axes = (0, 1, 3, 4)
    mean, variance = (x.mean(axes), x.var(axes, correction=0)) if training else (torch.zeros(3), torch.ones(3))
    normed = (x - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + 1e-5).sqrt()
    weight_gradient, bias_gradient = (g * normed).sum(axes), g.sum(axes)
    for order in (False, True):
        for one in (None, 1, 3):
            norm = L.BatchNorm(3).to(dtype).train(training)
            norm(laid_out(x, order, one).requires_grad_()).backward(laid_out(g, not order, one))
            torch.testing.assert_close(norm.weight.grad, weight_gradient.to(dtype), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(norm.bias.grad, bias_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [L.BatchNorm, L.TdBN])
def test_norms_whose_tensors_are_parts_of_others(make: Callable[[int], L.BatchNorm], training: bool) -> None:
    x, grad = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    norm = make(4).train(training)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    part = copy.deepcopy(norm)
    for name, tensor in norm.state_dict().items():
        if tensor.dim():
            wide = torch.stack([tensor, tensor + 9], 1)[:, 0]
            setattr(part, name, wide if "running" in name else nn.Parameter(wide))
    wanted = results(copy.deepcopy(norm).double(), x.double(), grad.double())
    for order in (False, True):
        same(results(copy.deepcopy(part), laid_out(x, order, None), laid_out(grad, order, None)), wanted, order)


def gradients(model: nn.Module, x: Tensor, stream: bool) -> Tensor:
    """Of a weighted sum of the first image's logits, or of their mean where all images are the same."""
    y = (Stream(model) if stream else model)(x)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().div(y.shape[1]).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "name", ["spikingformer_2_384", "spikingformer_2_256_dvs", "spikformer_2_384", "ms_resnet20", "report_vgg16"]
)
def test_one_image_has_the_gradients_of_two_equal_ones(name: str) -> None:
    model = create_model(name, **SMALL.get(name, {}) | {"T": 1}).train()
    x = torch.rand(1, *EVENTS.get(name, (3, 32, 32)))
    double = copy.deepcopy(model).double()
    wanted = gradients(double, x.repeat(2, 1, 1, 1).double(), False)
    for chosen, stream, order in itertools.product(BACKENDS, (False, True), (False, True)):
        form = torch.channels_last if order else torch.contiguous_format
        dtype = torch.float64 if chosen == "reference" else torch.float32
        copied = last(copy.deepcopy(model).to(dtype)) if order else copy.deepcopy(model).to(dtype)
        with backend(chosen):
            found = gradients(copied, x.to(dtype).contiguous(memory_format=form), stream)
        # One spike that rounding flips in float32 moves a gradient by a percent or so.
        limit = 1e-6 if dtype == torch.float64 else 0.05
        assert (found - wanted).norm() < limit * wanted.norm(), (chosen, stream, order)


@pytest.mark.parametrize(("level", "threads"), [("AVX2", "2"), ("DEFAULT", "1")])
def test_strided_convolutions_of_few_channels_keep_to_their_memory(level: str, threads: str) -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": level, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": threads}
    script = Path(__file__).parents[1] / "helpers" / "strided_steps.py"
    ran = subprocess.run([sys.executable, script, threads], env=environment, capture_output=True, text=True, timeout=90)
    assert ran.returncode == 0, ran.stderr[-500:]
    # The weight gradients that oneDNN computed, as channels and strides.
    asked = re.findall(r"backward_weights.*_ic(\d+)oc.*?kh1sh(\d+).*?kw1sw(\d+)", ran.stdout)
    assert ("16", "2", "2") in asked or "onednn_verbose" not in ran.stdout
    assert all((down, across) == ("1", "1") or int(channels) >= 16 for channels, down, across in asked)


@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_has_the_strided_convolution_itself(strict: bool) -> None:
    with torch.no_grad():
        graph = torch.export.export(L.Conv2d(3, 8, 1, 2), (torch.rand(1, 2, 3, 8, 8),), strict=strict).graph
    made = [node for node in graph.nodes if "conv" in str(node.target) or "pool" in str(node.target)]
    assert [node.args[3] for node in made] == [[2, 2]]
