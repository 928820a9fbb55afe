"""What lowering says of networks that no plan stands for, and that it says so of nothing else."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.engine_networks import C, N, T, images, layers, net, on_a_grid, unit
from helpers.small_networks import Graph
from torch import Tensor, nn

from spikeloom.deploy.engine.lower import OPERATIONS, lower
from spikeloom.deploy.engine.lower_state import Unsupported
from spikeloom.layers import Conv2d, Linear
from spikeloom.layers.stateless import each_step
from spikeloom.neurons import IF
from spikeloom.ops import _dispatch
from spikeloom.ops.scan import scan
from spikeloom.surrogates import ATan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]

SIDE = 4  # of the maps below


def conv2d(s: Tensor, **options: Any) -> Tensor:
    return each_step(lambda x: F.conv2d(x, torch.ones(C, C, 3, 3), **options), s)


def conv1d(s: Tensor, **options: Any) -> Tensor:
    return each_step(lambda x: F.conv1d(x, torch.ones(x.shape[1], x.shape[1], 1), **options), s)


def pooled(s: Tensor, pool: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return each_step(lambda x: pool(x, *args, **options), s)


def neurons(s: Tensor, v: Tensor | None = None, threshold: Any = 1.0, return_v: bool = False) -> Any:
    return scan(s, v, 0.5, 1.0, threshold, None, ATan(), True, return_v)


def places(x: Tensor) -> Tensor:
    """Tokens as a map."""
    return x.unflatten(3, (SIDE, SIDE))


def heads(s: Tensor) -> Tensor:
    return s.flatten(3).unflatten(2, (2, C // 2))


def attention(s: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Q (K^T V) with something done to the product in brackets."""
    q = heads(s)
    return places((q @ change(q.mT @ q)).flatten(2, 3))


def vectors(s: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the means of all maps, [T N, C]."""
    return function(s.mean((3, 4)).flatten(0, 1)).unflatten(0, s.shape[:2])[..., None, None]


def with_gradients(s: Tensor) -> Tensor:
    with torch.enable_grad():
        return s * 2


# A function of spikes [T, N, C, SIDE, SIDE], the operation that is not supported, a part of the reason.
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    # --- nodes
    "an unknown operation": (lambda s: s.cumsum(0), "cumsum", "unknown operation, which makes [T, N, 4, 4, 4]"),
    "a graph within": (with_gradients, "wrap_with_set_grad_enabled", "unknown operation"),
    "a constant for every step": (lambda s: s * torch.ones(s.shape[0], 1, 1, 1, 1), "ones", "images or steps"),
    "half the steps": (lambda s: s * torch.full((1,), s.shape[0] / 2), "full", "images or steps"),
    "a change of what is read again": (
        lambda s: (flat := s.flatten(0, 1), s.add_(1), flat.unflatten(0, s.shape[:2]))[2],
        "add_",
        "changes in place",
    ),
    "a constant as input": (
        lambda s: vectors(s, lambda x: F.linear(torch.ones(C, C), x).t()),
        "linear",
        "its argument x is a constant tensor; it must be a value that depends on the input",
    ),
    "a weight that depends on the input": (
        lambda s: vectors(s, lambda x: F.linear(x, x) @ x),
        "linear",
        "its argument weight is a value that depends on the input; it must be a constant tensor",
    ),
    "a product to which something is done": (
        lambda s: attention(s, torch.relu),
        "relu",
        "its argument x is a product of two values",
    ),
    # --- views
    "part of a map": (lambda s: s[..., :2], "slice", "makes [T, N, 4, 4, 2], of other axes than [4, 4, 4] of a map"),
    "another type": (lambda s: s.double().float(), "to", "torch.float64; torch.float32 is supported"),
    "random zeros": (lambda s: F.dropout(s, 0.5, training=True), "dropout", "random zeros, p=0.5"),
    "potentials": (lambda s: s + neurons(s, return_v=True)[1], "getitem", "potentials; their spikes"),
    "repetitions": (lambda s: s.repeat(1, 1, 1, 2, 1), "repeat", "[1, 1, 1, 2, 1]; those of a static image"),
    "a stack": (lambda s: torch.stack([s, s]).flatten(0, 1)[: s.shape[0]], "stack", "not one image"),
    "rows side by side": (lambda s: torch.cat([s, s], 3), "cat", "axis 3 of map, map; channels"),
    "a constant besides": (
        lambda s: vectors(s, lambda x: torch.cat([x, torch.ones(1, C)])[:-1]),
        "cat",
        "its argument tensors holds a constant tensor",
    ),
    "a channel": (lambda s: s[:, :, 0].unsqueeze(2).expand(s.shape), "select", "a map, 0 of axis 2; the last of"),
    "all tokens as one axis": (
        lambda s: places(s.flatten(3).mT.flatten().view(*s.shape[:2], SIDE**2, C).mT),
        "flatten",
        "of a tokens.T [16, 4]",
    ),
    "rows and columns": (lambda s: s.mT, "mT", "these axes of a map; those of tokens,"),
    "channels and rows": (lambda s: s.transpose(2, 3), "transpose", "these axes of a map; those of tokens.heads,"),
    "steps and images": (lambda s: s.transpose(0, 1).transpose(0, 1), "transpose", "axes 0 and 1 of a map; neighb"),
    # --- layers
    "dilation": (lambda s: conv2d(s, dilation=2, padding=2), "conv2d", "dilation [2, 2], padding [2, 2]; one str"),
    "two strides": (lambda s: conv2d(s, stride=(1, 2), padding=1), "conv2d", "stride [1, 2], dilation"),
    "padding by name": (lambda s: conv2d(s, padding="same"), "conv2d", "padding same; one stride"),
    "a long stride": (lambda s: conv2d(s, padding=1, stride=65), "conv2d", "its stride 65: Input should be less"),
    "a convolution of heads": (
        lambda s: each_step(lambda x: F.conv2d(x, torch.ones(2, 2, 1, 1)), heads(s)).flatten(2, 3)[..., None],
        "conv2d",
        "it reads heads; map, row, vector, tokens are supported",
    ),
    "a stride of tokens": (lambda s: conv1d(s.flatten(3), stride=2)[..., None], "conv1d", "stride [2], dilation [1]"),
    "a convolution of columns": (lambda s: places(conv1d(s.flatten(3).mT).mT), "conv1d", "it reads tokens.T; map,"),
    "a linear layer on rows": (lambda s: F.linear(s, torch.ones(4, 4)), "linear", "it reads map; flat, vector,"),
    "a linear layer of one": (
        lambda s: places(F.linear(s.flatten(3).mT, torch.ones(C))[:, :, None].expand(-1, -1, C, -1)),
        "linear",
        "a weight of 1 axes; [out, in] is supported",
    ),
    "potentials to start with": (lambda s: neurons(s, s.mean(0))[0], "spikeloom::scan", "start from rest"),
    "a threshold that is never reached": (
        lambda s: s + neurons(s, threshold=math.inf)[0],
        "spikeloom::scan",
        "its threshold.0 inf: Input should be a finite",
    ),
    "17 levels": (
        lambda s: s + neurons(s, threshold=tuple(range(1, 18)))[0],
        "spikeloom::scan",
        "its threshold: Tuple should have at most 16",
    ),
    "a wide window": (lambda s: pooled(s, F.max_pool2d, (3, 2)), "max_pool2d", "a window of [3, 2], stride [3, 2], p"),
    "windows that hang over": (
        lambda s: pooled(s, F.max_pool2d, 3, ceil_mode=True),
        "max_pool2d",
        "dilation [1, 1], ceil_mode=True; neither",
    ),
    "another divisor": (lambda s: pooled(s, F.avg_pool2d, 2, divisor_override=3), "avg_pool2d", "divisor_override=3"),
    "four places": (lambda s: pooled(s, F.adaptive_avg_pool2d, 2), "adaptive_avg_pool2d", "a map to [2, 2] places"),
    "padding of places": (lambda s: F.pad(s, (1, 1)), "pad", "padding [1, 1] of a map in mode constant with 0; "),
    "padding with ones": (lambda s: F.pad(s, (0,) * 5 + (1,), value=1.0)[:, :, :C], "pad", "constant with 1.0; chann"),
    "fewer channels": (lambda s: F.pad(s, (0, 0, 0, 0, 1, -1)), "pad", "its behind -1: Input should be greater"),
    "a norm of columns": (
        lambda s: places(pooled(s.flatten(3).mT, F.batch_norm, torch.ones(16), torch.ones(16)).mT),
        "batch_norm",
        "it reads tokens.T; map, row, vector, tokens behind one axis",
    ),
    "a product of four": (
        lambda s: ((q := heads(s)), (q @ q.mT) @ (q @ q.mT))[1].flatten(2, 3)[..., None],
        "matmul",
        "a product of four values",
    ),
    "a product of tokens": (
        lambda s: ((q := s.flatten(3)), places(q @ (q.mT @ q)))[1],
        "matmul",
        "these axes: tokens, tokens.T, tokens; those of q, k and v in heads",
    ),
    "a product of real values": (
        lambda s: attention(s * 0.5, lambda product: product),
        "matmul",
        "q, k and v must be spikes of one shape",
    ),
    "a product with a constant": (lambda s: s @ torch.ones(4, 4), "matmul", "its argument y is a constant tensor; it"),
    "a bound that is not finite": (lambda s: F.hardtanh(s, 0, math.inf), "hardtanh", "its high inf: Input should be"),
    # --- arithmetic
    "a value as divisor": (lambda s: 2 / (s + 1), "reciprocal", "unknown operation"),
    "a constant by a value": (lambda s: torch.div(torch.ones(C, 1, 1), s + 1), "div", "what depends on the input"),
    "a quotient that is rounded": (lambda s: torch.div(s, 2, rounding_mode="floor"), "div", "rounding_mode='floor'"),
    "a number of steps": (lambda s: s * s.shape[0], "mul", "the number of images or steps"),
    "as a quotient": (lambda s: s / (s.shape[0] / 2), "div", "the number of images or steps"),
    "as alpha": (lambda s: torch.add(s, s, alpha=s.shape[0]), "add", "the number of images or steps"),
    "as alpha of a difference": (lambda s: torch.sub(s, s, alpha=s.shape[0]), "sub", "the number of images or steps"),
    "as a sum": (lambda s: s.mean(0).expand(s.shape).sum(0).expand(s.shape), "sum", "the number of images or steps"),
    "infinity": (lambda s: s * math.inf, "mul", "the constant inf; a finite one"),
    "a complex number": (lambda s: (s * 1j).abs(), "mul", "its argument y is 1j; it must be"),
    "a complex tensor": (lambda s: (s * torch.tensor(1j)).abs(), "mul", "a complex constant"),
    "a scaled product": (lambda s: attention(s, lambda product: product * 2), "mul", "is a product of two values; it"),
    "operands of other axes": (
        lambda s: ((t := pooled(s, F.avg_pool2d, 2).flatten(3)), t + t.mT)[1][..., None],
        "add",
        "a tokens and a tokens.T",
    ),
    "a constant of an axis more": (lambda s: (s + torch.ones(2, *[1] * 5))[0], "add", "a constant of 6 axes, more"),
    "another constant at every step": (
        lambda s: s * torch.arange(1.0, T + 1)[:, None, None, None, None],
        "mul",
        "a constant [3, 1, 1, 1, 1] that differs from step to step",
    ),
    "a constant of more tokens": (
        lambda s: places(s.mean((3, 4), keepdim=True).flatten(3) + torch.ones(C, 16)),
        "add",
        "a constant of more elements, [4, 16], than the tokens [4, 1]",
    ),
    "a mean over channels": (lambda s: s * s.mean(2, keepdim=True), "mean", "axes [2] of a map; over all places,"),
    "a mean over all": (lambda s: s + s.mean(), "mean", "a mean over all axes of a map"),
    "a sum over places": (lambda s: s + s.sum((3, 4), keepdim=True), "sum", "axes [3, 4] of a map; over all steps"),
    "a sum over all": (lambda s: s + s.sum(), "sum", "a sum over all axes of a map"),
}


def refusal(model: nn.Module, x: Tensor) -> Unsupported:
    with pytest.raises(Unsupported) as info:
        lower(model, x)
    return info.value


@pytest.mark.parametrize("case", REFUSED)
def test_an_operation_that_is_not_supported(case: str) -> None:
    function, op, reason = REFUSED[case]
    error = refusal(unit(lambda s, m: function(s)), images(T, N, 2, SIDE, SIDE))
    assert (error.layer, error.op) == ("the model", op)
    assert reason in error.reason


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], str, str]] = {
    "the batch for time": (lambda m, x: net(m, x[:, None])[:, 0], (N, 2, 4, 4), "unsqueeze", "these axes: [N, 1, 2"),
    "no axis for time": (
        lambda m, x: F.linear(m.neuron(F.conv2d(x, m.conv.weight, padding=1)).flatten(1), m.head.weight),
        (N, 2, 4, 4),
        "spikeloom::scan",
        "neurons take [T, N",
    ),
    "neurons behind a mean over time": (
        lambda m, x: m.head(m.second(m.flatten(m.neuron(m.conv(x))).mean(0))),
        (T, N, 2, 4, 4),
        "spikeloom::scan",
        "neurons take [T, N",
    ),
    "steps and images swapped": (
        lambda m, x: net(m, x.flatten(0, 1).unflatten(0, (x.shape[1], x.shape[0]))).sum(1),
        (T, N, 2, 4, 4),
        "unflatten",
        "these axes: [N, T, 2, 4, 4] of a map [2, 4, 4]",
    ),
    "one of the steps": (lambda m, x: net(m, x)[1], (T, N, 2, 4, 4), "select", "a part of a sequence"),
    "a sum over the number of steps": (
        lambda m, x: net(m, x).sum(0) / x.shape[0],
        (T, N, 2, 4, 4),
        "div",
        "the number of images or steps",
    ),
    "images of three axes": (
        lambda m, x: net(m, x.unflatten(1, (T, 2)).transpose(0, 1)),
        (N, 2 * T, 4, 4),
        "unflatten",
        "these axes: [N, 3, 2, 4, 4]",
    ),
}


@pytest.mark.parametrize("case", FORWARDS)
def test_a_forward_that_is_not_supported(case: str) -> None:
    function, shape, op, reason = FORWARDS[case]
    error = refusal(on_a_grid(Graph(function, **layers(), second=IF())), images(*shape))
    assert error.op == op
    assert reason in error.reason


def test_a_norm_of_batch_statistics() -> None:
    model = unit(lambda s, m: each_step(m.norm, s))
    model.norm = nn.BatchNorm2d(C, track_running_stats=False)
    error = refusal(model, images(T, N, 2, SIDE, SIDE))
    assert (error.layer, error.op) == ("norm", "batch_norm")
    assert "a norm of batch statistics" in error.reason


def test_what_the_error_holds() -> None:
    model = unit(lambda s, m: m.deep.last(s))
    model.deep = nn.ModuleDict({"last": Conv2d(C, 7, 3, dilation=2, padding=1)})
    model.head = Linear(7, 5)
    error = refusal(model, images(T, N, 2, SIDE, SIDE))
    assert (error.layer, error.op, error.shape) == ("deep.last", "conv2d", ("T*N", 7, 2, 2))
    assert str(error) == (
        f"deep.last: the event engine has no step for conv2d: {error.reason}; run the model itself, "
        "see docs/deploying.md#the-event-engine"
    )
    assert error.reason.startswith("stride [1, 1], dilation [2, 2], padding [1, 1]; ")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TypeError, KeyError, AttributeError, ValueError])
def test_a_bug_of_ours_is_not_the_networks(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(low: Any, x: Any) -> Any:
        raise kind("a bug")

    monkeypatch.setitem(OPERATIONS, torch.ops.aten.relu, broken)
    with pytest.raises(kind, match="a bug") as info:
        lower(unit(lambda s, m: s.relu()), images(T, N, 2, SIDE, SIDE))
    assert type(info.value) is kind


def test_arguments_that_a_handler_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, torch.ops.aten.mul, lambda low, x: x)
    error = refusal(unit(lambda s, m: s * 2), images(T, N, 2, SIDE, SIDE))
    assert (error.op, error.reason) == ("mul", "its arguments: too many positional arguments")


PACKETS = {packet.__name__: packet for packet in OPERATIONS if hasattr(packet, "overloads")}


@pytest.mark.parametrize("name", PACKETS)
def test_a_handler_takes_all_arguments_of_its_operation(name: str) -> None:
    packet, found = PACKETS[name], 0
    for overload in packet.overloads():
        arguments = getattr(packet, overload)._schema.arguments
        if "Tensor" not in str(arguments[0].type) or any(argument.is_out for argument in arguments):
            continue
        positional = [None for argument in arguments if not argument.kwarg_only]
        named = {argument.name: None for argument in arguments if argument.kwarg_only}
        inspect.signature(OPERATIONS[packet]).bind(None, *positional, **named)
        found += 1
    assert found > 0


def test_changes_in_place_are_in_the_table() -> None:
    twins = {name: getattr(torch.ops.aten, f"{name}_", None) for name in PACKETS if not name.endswith("_")}
    missing = [name for name, twin in twins.items() if twin and OPERATIONS.get(twin) is not OPERATIONS[PACKETS[name]]]
    assert not missing
    assert sum(twin is not None for twin in twins.values()) >= 12


def test_the_network_around_the_functions_above_is_supported() -> None:
    plan = lower(unit(lambda s, m: s), images(T, N, 2, SIDE, SIDE)).plan
    assert [step.op for step in plan.steps] == ["conv", "mean", "conv"]
