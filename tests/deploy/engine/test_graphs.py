"""What the forward of a network may do around its layers: the engine gives its numbers, or says what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.engine_networks import C, H, N, T, W, images, layers, net, on_a_grid, unit
from helpers.small_networks import Graph
from torch import Tensor, nn

from spikeloom.deploy import compile, exact, fold
from spikeloom.deploy.engine.bind import bind_step
from spikeloom.deploy.engine.ir import Affine, Attention, Conv, Join
from spikeloom.deploy.engine.lower import lower
from spikeloom.errors import UsageError
from spikeloom.layers import BatchNorm, Conv1d, Conv2d, Flatten, GlobalAvgPool, Linear, NormSpike, TdBN
from spikeloom.layers.stateless import each_step
from spikeloom.neurons import IF, LIF
from spikeloom.ops import _dispatch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(_dispatch.native is None, reason="NO NATIVE KERNELS: the event engine is not tested"),
]


def check(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """The engine of a model, which gives the model's numbers."""
    engine = compile(model, x, tune=False, **options)
    with torch.no_grad():
        expected = model(x)
    assert expected.abs().max() > 0, "a silent network shows nothing"
    torch.testing.assert_close(engine(x), expected, rtol=1e-6, atol=1e-6)
    return engine


# --- arithmetic -------------------------------------------------------------------------------------------------------

CONSTANTS: dict[str, Callable[[], Any]] = {
    "number": lambda: -0.75,
    "integer": lambda: 3,
    "one": lambda: 1,
    "tensor without axes": lambda: torch.tensor(0.625),
    "every channel": lambda: images(C, 1, 1),
    "every place": lambda: images(1, H, W),
    "every column": lambda: images(W),
    "every element": lambda: images(1, 1, C, H, W),
    "one number in four axes": lambda: images(1, 1, 1, 1),
}


def expressions(s: Tensor, u: Tensor, k: Any) -> Iterator[Tensor]:
    """Spikes s, real values u and a constant k in all orders."""
    k = torch.as_tensor(k, dtype=torch.float32) if not isinstance(k, (int, float)) else k
    tensor = isinstance(k, Tensor)
    for x in (s, u):
        yield from (x + k, k + x, x - k, k - x, x * k, k * x, -x, x / 2, x / torch.tensor(4.0))
        yield from (torch.add(x, k, alpha=2), torch.sub(x, k, alpha=3), torch.rsub(x, k, alpha=2))
        yield x.clone().add_(k).mul_(k).sub_(0.5)
        if tensor:
            yield from (torch.add(k, x, alpha=2), torch.sub(k, x, alpha=-0.5), torch.rsub(k, x, alpha=4))
            yield x / (2.0 ** (4 * k).round().clamp(-3, 3))
    yield from (s + u, s - u, u - s, s * u, s + s, s - s * s, s + s - s * s, (s + s) * s)
    yield from (torch.add(s, u, alpha=2), torch.sub(u, s, alpha=0.5), torch.rsub(u, s, alpha=2))


@pytest.mark.parametrize("kind", CONSTANTS)
def test_arithmetic(kind: str) -> None:
    k = CONSTANTS[kind]()

    def forward(m: Any, x: Tensor) -> Tensor:
        u = m.conv(x)
        constant = m.k if isinstance(k, Tensor) else k
        return m.head(m.flatten(torch.cat(list(expressions(m.neuron(u), u, constant)), 2)))

    with torch.no_grad():
        count = len(list(expressions(torch.zeros(1, 1, C, H, W), torch.zeros(1, 1, C, H, W), k)))
    model = Graph(
        forward, conv=Conv2d(2, C, 3, padding=1), neuron=IF(), flatten=Flatten(), head=Linear(count * C * H * W, 9)
    )
    on_a_grid(model)
    if isinstance(k, Tensor):
        model.k = nn.Parameter(k)
    check(model, images(T, N, 2, H, W))


def test_a_constant_may_be_larger_than_the_value() -> None:
    model = unit(lambda s, m: m.k - s.mean((3, 4), keepdim=True))
    model.k = nn.Parameter(images(C, 4, 4))  # pyright: ignore
    check(model, images(T, N, 2, 4, 4))


def test_an_or_is_taken_for_nothing_else() -> None:
    def both(s: Tensor, m: Any) -> Tensor:
        r = m.neuron(s + 0.25)
        return torch.sub(s + r, s * r, alpha=2) + (s + r - s * r)

    check(unit(both), images(T, N, 2, 4, 4))


def test_copies_and_changes_in_place() -> None:
    def change(s: Tensor, m: Any) -> Tensor:
        x = F.dropout(s.clone().contiguous().detach().float(), 0.5, training=False)
        x.mul_(2).sub_(1.5).div_(0.5).neg_().add_(torch.tensor(0.25))
        y = F.hardtanh_(x.flatten(3).transpose_(2, 3).mT.unflatten(3, x.shape[3:]), -1.0, 0.75)
        z = torch.sigmoid_(y.sub(0.5)) - torch.relu_(s * 0.5)
        mean = F.dropout(z.mean((3, 4)), 0.5, training=False, inplace=True).unsqueeze_(3).squeeze_(3)
        return z + mean.view(*s.shape[:3], 1, 1)

    check(unit(change), images(T, N, 2, 4, 4))


def test_a_scale_of_attention_that_something_else_reads() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (
            neuron(conv(x)).flatten(3).unflatten(2, (2, 2)) for conv, neuron in zip(m.convs, m.neurons, strict=True)
        )
        product = q.mT @ (k @ v.mT)
        y = (product * 0.125 + product).transpose(-1, -2).flatten(2, 3).unflatten(3, (2, 3))
        return m.head(m.pool(y))

    model = Graph(
        forward,
        convs=nn.ModuleList(Conv2d(2, 4, 1) for _ in range(3)),
        neurons=nn.ModuleList(IF() for _ in range(3)),
        pool=GlobalAvgPool(),
        head=Linear(4, 5),
    )
    engine = check(on_a_grid(model), images(T, N, 2, 2, 3))
    assert [step.scale for step in engine.steps if isinstance(step, Attention)] == [1.0]


# --- norms that stay --------------------------------------------------------------------------------------------------

STAYING: dict[str, Callable[[], nn.Module]] = {
    "before a padded convolution": lambda: Graph(
        lambda m, x: m.last(m.norm(m.neuron(m.conv(x)))),
        conv=Conv2d(2, C, 3, padding=1),
        norm=BatchNorm(C),
        neuron=IF(),
        last=Conv2d(C, C, 3, padding=1),
    ),
    "beside another reader": lambda: Graph(
        lambda m, x: m.neuron((y := m.conv(x)) + m.norm(y)),
        conv=Conv2d(2, C, 3, padding=1),
        norm=BatchNorm(C),
        neuron=IF(),
    ),
    "on the input": lambda: Graph(lambda m, x: m.conv(m.norm(x)), norm=BatchNorm(2), conv=Conv2d(2, C, 3, padding=1)),
    "tdBN with eps outside": lambda: Graph(
        lambda m, x: m.norm(m.neuron(m.conv(x))),
        conv=Conv2d(2, C, 3, padding=1),
        norm=TdBN(C, eps_outside=True),
        neuron=IF(),
    ),
    "of torch.nn": lambda: Graph(
        lambda m, x: each_step(m.norm, m.neuron(m.conv(x))),
        conv=Conv2d(2, C, 3, padding=1),
        norm=nn.BatchNorm2d(C),
        neuron=IF(),
    ),
    "in a unit with its neuron": lambda: Graph(
        lambda m, x: m.unit(m.neuron(m.conv(x))), conv=Conv2d(2, C, 3, padding=1), neuron=IF(), unit=NormSpike(C, LIF)
    ),
}


@pytest.mark.parametrize("case", STAYING)
def test_a_norm_that_stays_is_a_step(case: str) -> None:
    model = on_a_grid(
        Graph(lambda m, x: m.head(m.pool(m.body(x))), body=STAYING[case](), pool=GlobalAvgPool(), head=Linear(C, 5))
    )
    engine = check(model, images(T, N, 2, 4, 4))
    assert any(isinstance(step, Affine) for step in engine.steps)


# --- forwards ---------------------------------------------------------------------------------------------------------


IMAGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "expand and mean": lambda m, x: net(m, x.expand(T, *x.shape)).mean(0),
    "unsqueeze and repeat": lambda m, x: net(m, x.unsqueeze(0).repeat(T, 1, 1, 1, 1)),
    "repeat alone": lambda m, x: net(m, x.repeat(T, 1, 1, 1, 1)).sum(0),
    "stack": lambda m, x: net(m, torch.stack([x] * T)).sum(0) / T,
    "cat": lambda m, x: net(m, torch.cat([x[None]] * T))[-1],
    "unsqueeze and expand": lambda m, x: net(m, x[None].expand(T, -1, -1, -1, -1)).mean(dim=0),
    "one step": lambda m, x: net(m, x[None])[0],
    "mean before the head": lambda m, x: m.head(m.flatten(m.neuron(m.conv(x.expand(T, *x.shape)))).mean(0)),
    "mean of steps and places": lambda m, x: m.short(m.neuron(m.conv(x.expand(T, *x.shape))).mean((0, 3, 4))),
    "views": lambda m, x: m.head(m.neuron(m.conv(x.expand(T, *x.shape))).reshape(T * x.shape[0], -1)).view(
        T, x.shape[0], 5
    ),
    "without neurons": lambda m, x: m.head(m.flatten(m.conv(x[None])))[0],
}
SEQUENCES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logits of every step": net,
    "mean": lambda m, x: net(m, x).mean(0),
    "sum": lambda m, x: net(m, x).sum(0),
    "last": lambda m, x: net(m, x)[-1],
    "mean before the head": lambda m, x: m.head(m.flatten(m.neuron(m.conv(x))).mean(0)),
    "other neurons behind a repeated mean": lambda m, x: m.head(
        m.second((y := m.flatten(m.neuron(m.conv(x)))).mean(0).expand(y.shape))
    ),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_that_is_repeated(case: str) -> None:
    model = on_a_grid(Graph(IMAGES[case], **layers(), short=nn.Linear(C, 5)))
    x = images(N, 2, 4, 4)
    engine = check(model, x)
    assert engine.values[0].static
    one = torch.cat([engine(image[None]) for image in x], -2)
    torch.testing.assert_close(one, engine(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", SEQUENCES)
def test_a_sequence(case: str) -> None:
    """Of any length, whatever that of the example."""
    model = on_a_grid(Graph(SEQUENCES[case], **layers(), second=IF()))
    engine = check(model, images(T, N, 2, 4, 4))
    for steps in (1, 2, 7):
        x = images(steps, 5, 2, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_sequence_of_one_step_makes_an_engine_for_any() -> None:
    model = on_a_grid(Graph(lambda m, x: net(m, x).mean(0), **layers()))
    engine, x = compile(model, images(1, 1, 2, 4, 4), tune=False), images(4, 3, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_network_of_a_fixed_number_of_steps() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.shape[0] != T:
            raise ValueError("not my steps")
        return net(m, x).sum(0) / T

    engine = check(on_a_grid(Graph(forward, **layers())), images(T, N, 2, 4, 4))
    with pytest.raises(ValueError, match=f"takes sequences of {T} steps, got 5"):
        engine(images(5, N, 2, 4, 4))


def test_a_stream_of_a_network_that_joins_its_steps() -> None:
    model = on_a_grid(Graph(lambda m, x: net(m, x).sum(0), **layers()))
    x = images(4, N, 2, 4, 4)
    stream = check(model, x).stream()
    with torch.no_grad():
        torch.testing.assert_close(stream(x[:1]) + stream(x[1:]), model(x), rtol=1e-6, atol=1e-6)


def test_one_weight_in_two_orders() -> None:
    """A linear layer on a flattened map has its columns reordered; on features it has not."""

    def forward(m: Any, x: Tensor) -> Tensor:
        s = m.flatten(m.neuron(m.conv(x)))
        return m.out(m.mix(m.neuron2(m.mix(s))) + m.mix(s))

    mix = Linear(C * 4, C * 4)
    model = Graph(
        forward, conv=Conv2d(2, C, 1), neuron=IF(), flatten=Flatten(), mix=mix, neuron2=IF(), out=Linear(C * 4, 5)
    )
    check(on_a_grid(model), images(T, N, 2, 2, 2))


def test_a_window_of_tokens() -> None:
    def model(kernel: int) -> nn.Module:
        return on_a_grid(
            Graph(
                lambda m, x: m.head(m.over(m.neuron(m.conv(x)).flatten(3)).mean(3)),
                conv=Conv2d(2, C, 1),
                neuron=IF(),
                over=Conv1d(C, C, kernel, padding=kernel // 2),
                head=Linear(C, 5),
            )
        )

    check(model(1), images(T, N, 2, 4, 4))
    with pytest.raises(UsageError, match=r"^over: .* a window of tokens that are places of a map"):
        compile(model(3), images(T, N, 2, 4, 4))


# --- the comparison at the end of compile -----------------------------------------------------------------------------


def test_an_engine_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from spikeloom.deploy.engine import lower_arithmetic, verify
    from spikeloom.deploy.engine.lower import OPERATIONS

    model, x = unit(lambda s, m: m.norm.bias.view(C, 1, 1) - s), images(T, N, 2, 4, 4)
    model.norm = BatchNorm(C)
    nn.init.constant_(model.norm.bias, 0.5)
    check(model, x)
    wrong = lower_arithmetic.sub
    monkeypatch.setitem(OPERATIONS, torch.ops.aten.sub, lambda low, a, b, alpha=1: wrong(low, b, a, alpha))
    with pytest.raises(UsageError, match=r"^the model: the engine's affine gives .* where the network has"):
        compile(model, x)
    monkeypatch.undo()
    spikes = verify._spikes
    monkeypatch.setattr(verify, "_spikes", lambda step, sums, T: 1 - spikes(step, sums, T))
    with pytest.raises(UsageError, match=r"^neuron|^conv: the engine's conv gives other spikes than the network in"):
        compile(model, x)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_right_engine_is_never_refused(weights: Any) -> None:
    """Weights are multiples of 0.1, thresholds sums of them: rounding decides whether a neuron fires."""
    flips = 0
    for seed in range(6):
        torch.manual_seed(seed)
        layers = [layer for n in (2, 16, 16) for layer in (Conv2d(n, 16, 3, padding=1), IF(v_threshold=0.3))]
        model = Graph(
            lambda m, x: m.head(m.pool(m.body(x))),
            body=nn.Sequential(*layers),
            pool=GlobalAvgPool(),
            head=Linear(16, 5),
        )
        with torch.no_grad():
            for parameter in model.body.parameters():  # pyright: ignore
                parameter.copy_(torch.randint(-3, 4, parameter.shape) * 0.1)
            x = torch.randint(0, 2, (8, 2, 2, 6, 6)).float()
            flips += not torch.allclose(compile(model, x, tune=False, weights=weights)(x), model(x), 1e-4, 1e-4)
    assert flips > 0, "rounding changed nothing"


def test_an_exact_network_with_a_norm_that_stays() -> None:
    model = STAYING["in a unit with its neuron"]()
    whole = Graph(lambda m, x: m.head(m.pool(m.body(x))), body=model, pool=GlobalAvgPool(), head=Linear(C, 5)).eval()
    x = torch.rand(T, N, 2, 4, 4)
    twin = exact(whole, x)
    with torch.no_grad():
        assert torch.equal(compile(twin, x, tune=False)(x), twin(x))


def test_padding_of_features_is_a_map() -> None:
    """A linear layer whose plan has padding: what surrounds it has the bias."""
    from spikeloom.deploy import Engine
    from spikeloom.deploy.engine.ir import Fire, Neuron, Plan, Value

    neuron = Neuron(decay=0.0, gain=1.0, threshold=(1.0,), v_reset=None, strict_firing=False)
    weight, bias = images(5, 3, 1, 1), images(5)
    x = torch.randint(0, 2, (T, N, 3)).float()
    wanted = F.conv2d(x.flatten(0, 1)[..., None, None], weight, bias, padding=(1, 2)).mean((2, 3)).unflatten(0, (T, N))
    for way in ("event", "dense"):
        conv = Conv(layer="conv", out=(2,), x=1, weight="w", bias="b", padding=(1, 2), way=way)
        steps = (Fire(layer="in", out=(1,), x=0, keep_sum=False, neuron=neuron), conv, _mean(2, 3))
        engine = Engine(Plan(input=Value(height=1, width=1, channels=3), T=T, steps=steps), {"w": weight, "b": bias})
        torch.testing.assert_close(engine(x), wanted, rtol=1e-6, atol=1e-6)


def _mean(x: int, out: int) -> Any:
    from spikeloom.deploy.engine.ir import Mean

    return Mean(layer="mean", out=(out,), x=x)


def test_folding_is_by_the_graph_here_too() -> None:
    """A convolution whose norm does not follow it is what it was."""
    model = on_a_grid(STAYING["before a padded convolution"]())
    conv = model.conv  # pyright: ignore
    lowered = lower(Graph(lambda m, x: m.body(x).flatten(3).mean(3), body=model).eval(), images(T, N, 2, 4, 4))
    assert torch.equal(lowered.tensors["body.conv.weight"], conv.weight)
    assert isinstance(fold(model, images(T, N, 2, 4, 4)).norm, BatchNorm)


def test_neurons_on_channels_side_by_side_run_on_every_part() -> None:
    """Ghost modules: what is joined are spikes, not the sums of the two convolutions."""

    def forward(m: Any, x: Tensor) -> Tensor:
        u = m.conv(x)
        return m.head(m.flatten(m.neuron(torch.cat([u, m.cheap(u), 2 * u], 2))))

    model = Graph(
        forward,
        conv=Conv2d(2, C, 3, padding=1),
        cheap=Conv2d(C, 3, 3, padding=1),
        neuron=LIF(),
        flatten=Flatten(),
        head=Linear((2 * C + 3) * 16, 5),
    )
    engine = check(on_a_grid(model), x := images(T, N, 2, 4, 4))
    (joined,) = [step for step in engine.steps if step.op == "cat"]
    assert [engine.values[index].most for index in (*joined.xs, *joined.out)] == [1, 1, 1, 1]
    stream = engine.stream()
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([stream(x[:1]), stream(x[1:])]), model(x), rtol=1e-6, atol=1e-6)


def test_sums_side_by_side_that_another_step_reads_stay() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        u = m.conv(x)
        joined = torch.cat([u, 2 * u], 2)
        return m.head(m.flatten(m.neuron(joined) - 0.5 * joined))

    parts = {**layers(), "head": Linear(2 * C * 16, 5)}
    check(on_a_grid(Graph(forward, **parts)), images(T, N, 2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_maps_of_any_width_are_joined(dtype: torch.dtype) -> None:
    """A few channels at a time are copied in one or two moves, more of them by rows, many in tiles."""
    for widths in ((1, 2, 7), (8, 9, 15), (16, 17, 31), (32, 33, 63), (64, 65), (700, 3), (1, 1300)):
        parts = [torch.randint(0, 9, (3, 5, 4, 7, width)).to(dtype) for width in widths]
        values = torch.full((3, 5, 4, 7, sum(widths)), 9).to(dtype)
        step = Join(layer="side by side", out=(len(widths),), op="cat", xs=tuple(range(len(widths))))
        bound = bind_step(step, parts, values, {}, 2)
        for call in bound.calls:
            call()
        assert torch.equal(values, torch.cat(parts, -1))
