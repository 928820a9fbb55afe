"""Folding norms into the convolutions before them (Zhou et al. 2023, Spikingformer, appendix B).

        y = gamma (w x + b - mu) / sqrt(var + eps) + beta = W x + B,
        W = w a,  B = a b + c,  a = gamma / sqrt(var + eps),  c = beta - gamma mu / sqrt(var + eps)

Which norm stands behind which convolution is seen in a run of the network (`exchange.fold_pairs`), not in the order in
which its layers are registered.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikeloom.deploy.exchange.fold_pairs import Layer, Norm, Pair, find_pairs
from spikeloom.errors import UsageError
from spikeloom.layers import Linear, SpikingSelfAttention
from spikeloom.layers.stateless import has_hooks
from spikeloom.neurons.lif import IF, LIF, PLIF, LIFBase

Model = TypeVar("Model", bound=nn.Module)

_ROUNDING = 100
"""Errors of the last place, of the largest term of a sum, by which a folded layer may differ."""

_SIDES = (32, 28, 34, 48, 64, 128, 224, 16)
"""Heights and widths of the images that are tried where no example is given."""


def fold(model: Model, example: Tensor | None = None) -> Model:
    """A copy in eval mode whose norms are part of the convolutions and linear layers before them.

    The network is run once on the example. A norm with running statistics is folded where its input is the output of a
    convolution or linear layer, which nothing else reads, and each of the two runs once. It is replaced by
    `nn.Identity`; a convolution without bias gets one. All other norms stay as they are: before a convolution, behind a
    neuron or a sum, of batch statistics (`track_running_stats=False`), shared by several layers, with hooks, or of
    classes with a `forward` of their own.

    Then every folded layer is compared with the layer and the norm that it replaces, on the same inputs.

    The scale s of a spiking self-attention, a power of two, goes into the threshold of the neuron behind the product
    (appendix B): `V >= threshold` of s times the input is `V >= threshold / s` of the input, to the bit.

    Args:
        model: in any mode; it is not changed.
        example: an input, [N, ...] or [T, N, ...]; one or two images are enough. Without it random inputs are tried,
            of as many channels as the first layer takes and of any size, linear layers standing for themselves:
            [T, 1, ...] and [1, ...], with T = `model.T`, else 2.

    Raises:
        UsageError: no example is given and the network takes none of the inputs that are tried; or a folded layer,
            which the message names, says something else than before by more than rounding.
    """
    folded = copy.deepcopy(model).eval()
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        nullcontext() if example is not None else _sizeless(folded),
    ):
        x = _some_input(folded) if example is None else _as_weights(example, folded)
        found = find_pairs(folded, x)
        if found:
            before, wanted = _norm_outputs(folded, found, x)
            terms = {pair: _merge(folded, pair) for pair in found}
            _compare(folded, terms, before, wanted, x)
    for module in folded.modules():
        if isinstance(module, SpikingSelfAttention):
            _fold_scale(module)
    return folded


def _fold_scale(attention: SpikingSelfAttention) -> None:
    """Moves s into the neuron behind the product, where that is exact: potentials scale with their input."""
    product, neuron = attention.product, attention.spike
    if product.variant.startswith("softmax") or type(neuron) not in (IF, LIF, PLIF) or has_hooks(neuron):
        return
    assert isinstance(neuron, LIFBase)
    scale = float(product.scale)
    if math.frexp(scale)[0] == 0.5 and isinstance(neuron.v_threshold, float) and neuron.v_reset in (None, 0.0):
        product.scale, neuron.v_threshold = 1.0, neuron.v_threshold / scale


def _merge(model: nn.Module, pair: Pair) -> Layer:
    """Folds one norm. Returns a layer that gives the sums of the absolute values of all terms, for inputs >= 0."""
    layer, norm = pair.layer, pair.norm
    scale, shift = affine(norm, pair.axis)
    weight, dtype = layer.weight.double(), layer.weight.dtype
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    mean = norm.running_mean
    assert mean is not None

    def parameter(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(dtype), requires_grad=layer.weight.requires_grad)

    weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    # The memory format of the weight is kept.
    layer.weight = parameter(torch.empty_like(layer.weight, dtype=torch.float64).copy_(weight))
    layer.bias = parameter(scale * bias + shift)
    terms = copy.deepcopy(layer)
    terms.weight.abs_()
    terms.bias = parameter((scale * bias).abs() + shift.abs() + 2 * (scale * mean.double()).abs())
    identity = nn.Identity().eval()
    for name in pair.norm_names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, identity)
    return terms


def affine(norm: Norm, axis: int) -> tuple[Tensor, Tensor]:
    """(a, c) of a norm in eval mode, which is `a x + c` in every channel; float64, [C] each.

    Asked of the norm itself, so that it holds for every kind of batch norm.

    Args:
        norm: with running statistics.
        axis: on which its channels are: 1, or 2 of time-first norms.
    """
    exact = copy.deepcopy(norm).double().eval()
    assert norm.running_mean is not None
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=norm.running_mean.device)
    # Batch norms of torch.nn differ in the axes that they take.
    rank = next((axes for kind, axes in _AXES if isinstance(norm, kind)), 2) if axis == 1 else 3
    shape = [2, *[1] * (rank - 1)]
    shape[axis] = norm.num_features
    with torch.no_grad():
        values = exact(ends.view(2, *[1] * (rank - 1)).expand(shape)).flatten(1)
    return values[1] - values[0], values[0]


_AXES = ((nn.BatchNorm1d, 2), (nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5))


# --- comparing --------------------------------------------------------------------------------------------------------


def _norm_outputs(model: nn.Module, pairs: Sequence[Pair], x: Tensor) -> tuple[dict[Pair, Tensor], Any]:
    """What the norms give in a run, and what the network gives."""
    found: dict[Pair, Tensor] = {}
    with ExitStack() as hooks:
        for pair in pairs:

            def note(_: nn.Module, __: Any, output: Tensor, pair: Pair = pair) -> None:
                found[pair] = output

            hooks.callback(pair.norm.register_forward_hook(note).remove)
        torch.manual_seed(0)
        return found, model(x)


def _compare(model: nn.Module, terms: dict[Pair, Layer], before: dict[Pair, Tensor], wanted: Any, x: Tensor) -> None:
    """Runs the folded network, where whoever reads a folded layer gets what the norm gave: no rounding error can flip a
    spike, and every layer is compared on the inputs that it had before."""
    limits: dict[Pair, Tensor] = {}
    with ExitStack() as hooks:
        for pair, sums in terms.items():

            def bound(_: nn.Module, args: Any, y: Tensor, pair: Pair = pair, sums: Layer = sums) -> None:
                channels = sums(args[0].abs()).movedim(pair.layer_axis, 0).flatten(1)
                limits[pair] = channels.amax(1) * (_ROUNDING * torch.finfo(y.dtype).eps)

            def check(_: nn.Module, __: Any, y: Tensor, pair: Pair = pair) -> Tensor:
                expected = before[pair]
                same = (y == expected) | expected.isnan()
                off = (
                    (y - expected)
                    .abs()
                    .nan_to_num(torch.inf)
                    .masked_fill(same, 0)
                    .movedim(pair.axis, 0)
                    .flatten(1)
                    .amax(1)
                )
                if bool((off > limits[pair]).any()):
                    worst = (off - limits[pair]).argmax()
                    raise UsageError(
                        f"{pair.layer_name}: folding {pair.norm_names[0]} into it changes its output by "
                        f"{off[worst]:.3g}, where rounding explains {limits[pair][worst]:.3g}"
                    )
                return expected

            hooks.callback(pair.layer.register_forward_hook(bound).remove)
            hooks.callback(model.get_submodule(pair.norm_names[0]).register_forward_hook(check).remove)
        torch.manual_seed(0)
        got = model(x)
    if len(limits) != len(terms) or not _alike(got, wanted):
        names = ", ".join(pair.norm_names[0] for pair in list(terms)[:3])
        raise UsageError(f"{type(model).__name__}: folding its norms ({names} ...) changes what it says on the example")


def _alike(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    a, b = (tree_leaves(value) for value in (one, other))
    return len(a) == len(b) and all(
        torch.allclose(x, y, 1e-3, 1e-3 * float(y.abs().amax() if y.numel() else 0), equal_nan=True)
        for x, y in zip(a, b, strict=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


def _as_weights(x: Tensor, model: nn.Module) -> Tensor:
    """An input of the type and on the device of the network's weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or not x.is_floating_point():
        return x
    return x.detach().to(weight.device, weight.dtype)


@contextmanager
def _sizeless(model: nn.Module) -> Generator[None]:
    """Lets linear layers take any number of features, which depends on the size of an image; then they give their
    bias."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if x.shape[-1] == self.in_features:
            return type(self).forward(self, x)
        bias = x.new_zeros(self.out_features) if self.bias is None else self.bias  # pyright: ignore
        return bias.expand(*x.shape[:-1], -1).clone()

    layers = [m for m in model.modules() if type(m) in (nn.Linear, Linear)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _some_input(model: nn.Module) -> Tensor:
    """A random input that the network takes."""
    tried: list[str] = []
    for shape in _shapes(model):
        x = _as_weights(torch.rand(shape, generator=torch.Generator().manual_seed(0)), model)
        tried.append(str(list(shape)))
        try:
            model(x)
        except Exception:
            continue
        return x
    found = f"takes none of {', '.join(tried)}" if tried else "has no convolution or linear layer"
    raise UsageError(f"{type(model).__name__} {found}: give fold an input, fold(model, example)")


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    T = getattr(model, "T", None)
    steps = T if isinstance(T, int) else 2
    first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        return
    if isinstance(first, nn.Linear):
        shapes: list[tuple[int, ...]] = [(first.in_features,)]
    else:
        own = getattr(model, "image_size", None)
        sides = (own, *_SIDES) if isinstance(own, int) else _SIDES
        shapes = [(first.in_channels, *(side,) * len(first.kernel_size)) for side in sides]
    for shape in shapes:
        yield steps, 1, *shape
        yield 1, *shape
