"""NIR graphs: what is written computes what the network does, here, in SpikingJelly, and by NIR's own equations."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_networks import EVENTS, SHAPES, SMALL, Net
from torch import Tensor, nn

from spikeloom.deploy import fold, from_nir, read_nir, to_nir, write_nir
from spikeloom.encode import Frames
from spikeloom.errors import DataFileError, UsageError
from spikeloom.layers import (
    AvgPool1d,
    AvgPool2d,
    BatchNorm,
    Conv1d,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    NormSpike,
    PadShortcut,
    SEWBlock,
    VanillaBlock,
    basic_branch,
)
from spikeloom.models import create_model, list_models
from spikeloom.neurons import IF, KLIF, LIF, MLF, PLIF, PSN, LeakyIntegrator, SynapticLIF
from spikeloom.record import RateMeter

nir: Any = pytest.importorskip("nir", reason="the extra `exchange` is not installed: NIR is not tested")
pytestmark = pytest.mark.usefixtures("one_thread")

NEURONS: dict[str, Callable[[], nn.Module]] = {
    "IF": functools.partial(IF, v_threshold=0.75),
    "LIF": LIF,
    "LIF without input decay": functools.partial(LIF, tau=4 / 3, decay_input=False, v_reset=-0.25),
    "strict LIF": functools.partial(LIF, strict=True, v_threshold=0.5),
    "PLIF": functools.partial(PLIF, tau=1.7),
    "PLIF without input decay": functools.partial(PLIF, tau=3.0, decay_input=False),
    "SynapticLIF": functools.partial(SynapticLIF, v_threshold=0.1),
    "SynapticLIF without synapse": functools.partial(SynapticLIF, tau_syn=None, v_threshold=0.02),
}


def vgg(neuron: Callable[[], nn.Module] = LIF) -> nn.Module:
    return Net(
        Conv2d(2, 6, 3, padding=1, bias=False),
        NormSpike(6, neuron),
        AvgPool2d(2),
        Conv2d(6, 8, 3, stride=2, padding=1),
        NormSpike(8, neuron),
        Flatten(),
        Linear(32, 7),
        neuron(),
        Linear(7, 5, bias=False),
    )


def residual(block: Callable[..., nn.Module]) -> nn.Module:
    def make(width: int, stride: int, shortcut: nn.Module) -> nn.Module:
        return block(basic_branch(width, width * stride, stride, LIF), NormSpike(width * stride, LIF), shortcut)

    return Net(
        Conv2d(2, 4, 3, padding=1, bias=False),
        NormSpike(4, LIF),
        make(4, 1, nn.Identity()),
        make(4, 1, nn.Identity()),
        make(4, 2, PadShortcut(4, 8)),
        make(8, 1, nn.Identity()),
        GlobalAvgPool(),
        Linear(8, 5),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (functools.partial(vgg, neuron), (3, 2, 8, 8)) for name, neuron in NEURONS.items()},
    "sequence": (vgg, (5, 3, 2, 8, 8)),
    "SEW": (functools.partial(residual, SEWBlock), (3, 2, 8, 8)),
    "membrane": (functools.partial(create_model, "ms_resnet14", in_channels=2, num_classes=5, T=4), (3, 2, 16, 16)),
    "vanilla": (functools.partial(residual, VanillaBlock), (3, 2, 8, 8)),
    "one dimension": (
        lambda: Net(Conv1d(2, 4, 3, padding=1), LIF(), Flatten(2), Linear(36, 5), LeakyIntegrator(), dims=3),
        (3, 2, 9),
    ),
    "readout without synapse": (
        lambda: Net(Linear(6, 8), IF(), Linear(8, 3), LeakyIntegrator(tau_syn=None), dims=2),
        (3, 6),
    ),
}


@functools.cache
def made(name: str) -> tuple[nn.Module, Tensor]:
    """A net that fires, and an input."""
    torch.manual_seed(3)
    make, shape = NETS[name]
    model, x = make(), 3 * torch.rand(shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 3.0)
            nn.init.uniform_(module.bias, 0.0, 2.0)
            nn.init.uniform_(module.running_var, 0.1, 0.5)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            nn.init.normal_(module.weight, 0.2, 1.0)
    return fold(model.eval()), x


@pytest.mark.parametrize("name", NETS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    path = tmp_path / "net.nir"
    write_nir(to_nir(model, x), path)
    back = from_nir(read_nir(path))
    with torch.no_grad(), RateMeter(model) as meter:
        expected = model(x)
    assert all(rate != 0 for rate in meter.rates().values()), "a net that is silent shows nothing"
    with torch.no_grad():
        assert (back(x) - expected).abs().max() <= (1e-6 if "PLIF" in name or "out" in name or "Syn" in name else 0)
        again = from_nir(to_nir(back, x))
    torch.testing.assert_close(again(x), back(x))


def test_norms_are_folded_and_the_model_stays() -> None:
    model = vgg().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {type(node).__name__ for node in to_nir(model, torch.rand(2, 2, 8, 8)).nodes.values()}
    assert kinds == {"Input", "Conv2d", "LIF", "AvgPool2d", "Flatten", "Affine", "Linear", "Output"}
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["IF", "LIF", "LIF without input decay", "PLIF"])
def test_by_the_equations_of_nir(name: str) -> None:
    """Forward Euler on the constants of the file, in double precision, gives the spikes of the neurons."""
    neuron = NEURONS[name]()
    dt = 2e-3
    graph = to_nir(Net(neuron, dims=2), torch.zeros(1, 6), dt)
    (node,) = (node for node in graph.nodes.values() if isinstance(node, (nir.IF, nir.LIF)))
    x = torch.randn(30, 1, 6) + 0.5
    v, spikes = node.v_reset.copy(), []
    for current in x[:, 0].double().numpy():
        slope = node.r * current
        if isinstance(node, nir.LIF):
            slope = (node.v_leak - v + slope) / node.tau
        v = v + dt * slope
        spikes.append(v >= node.v_threshold)
        v = np.where(spikes[-1], node.v_reset, v)
    with torch.no_grad():
        expected = neuron(x)[:, 0].numpy()
    assert 0.02 < expected.mean() < 0.9
    np.testing.assert_array_equal(np.stack(spikes), expected)


def spikingjelly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import: of its optional parts
        return pytest.importorskip(
            "spikingjelly.activation_based.nir_exchange", reason="SpikingJelly is not installed: no comparison with it"
        )


@pytest.mark.parametrize("name", ["IF", "LIF", "LIF without input decay", "PLIF", "SEW", "membrane", "vanilla"])
def test_spikingjelly_runs_the_file(name: str, tmp_path: Path) -> None:
    exchange = spikingjelly()
    model, x = made(name)
    path = tmp_path / "net.nir"
    write_nir(to_nir(model, x), path)
    theirs, state, steps = exchange.import_from_nir(path), None, []
    with torch.no_grad():
        for _ in range(4):
            y, state = theirs(x, state)
            steps.append(y)
        expected = model(x)
    torch.testing.assert_close(torch.stack(steps), expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_spikingjelly(tmp_path: Path) -> None:
    exchange = spikingjelly()
    from spikingjelly.activation_based import functional, layer, neuron  # pyright: ignore

    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1),
        neuron.LIFNode(tau=3.0, v_reset=-0.25),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(96, 7),
        neuron.IFNode(v_threshold=0.25),
        layer.Linear(7, 4, bias=False),
    ).eval()
    x = 3 * torch.rand(5, 3, 2, 8, 8)
    exchange.export_to_nir(net, x[0], tmp_path / "theirs.nir")
    functional.reset_net(net)
    with torch.no_grad():
        expected = torch.stack([net(step) for step in x])
        got = from_nir(read_nir(tmp_path / "theirs.nir"), strict=False)(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


WRITTEN = [
    "ms_resnet104",
    "ms_resnet110",
    "ms_resnet14",
    "ms_resnet18",
    "ms_resnet20",
    "ms_resnet32",
    "ms_resnet34",
    "ms_resnet44",
    "ms_resnet482",
    "ms_resnet56",
    "report_ms_resnet34",
    "report_sew_resnet34",
    "report_vanilla_resnet34",
    "sew_resnet_cifar",
    "spiking_resnet_cifar",
    "tdbn_resnet19",
    "vggsnn",
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("report_sew_resnet34", "vggsnn", "shd_net") else [pytest.mark.slow])
        for name in list_models()
        if name != "masked_autoencoder"
    ],  # which is for pre-training alone
)
def test_registered_networks(name: str, tmp_path: Path) -> None:
    """Those that NIR can express give the same logits; of the others a layer is named."""
    torch.manual_seed(1)
    model = create_model(name, **SMALL.get(name, {}))
    shape = (SHAPES | EVENTS).get(name, (3, 32, 32))
    steps = (4,) if isinstance(model.T, Frames) else ()
    x = 3 * torch.rand(*steps, 2, *(shape if name != "paralif_gesture" else (8192,)))
    if name not in WRITTEN:
        with pytest.raises(UsageError, match=r"^layer \S+ \(\w+\): .*NIR"):
            to_nir(model, x)
        return
    path = tmp_path / "net.nir"
    write_nir(to_nir(model, x), path)
    with torch.no_grad():
        torch.testing.assert_close(from_nir(read_nir(path))(x), fold(model)(x), rtol=1e-5, atol=1e-5)


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "deploying.md").read_text()
    assert all(f"`{name}`" in page for name in WRITTEN)


class Made(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max pool": (lambda: MaxPool2d(2), r"layer layers.0 \(MaxPool2d\): NIR has no max pool"),
    "one-dimensional pool": (
        lambda: nn.Sequential(LIF(), Made(lambda x: x.flatten(3)), AvgPool1d(2)),
        "NIR has no node",
    ),
    "ceil": (lambda: AvgPool2d(3, 3, ceil_mode=True), r"\(AvgPool2d\): NIR's AvgPool2d has no ceil_mode"),
    "padding that does not count": (lambda: AvgPool2d(2, 2, 1, count_include_pad=False), "counts its padding"),
    "norm": (lambda: BatchNorm(2), r"layers.0 \(BatchNorm\): NIR has no norm"),
    "groups": (lambda: Conv2d(2, 2, 3, groups=2), r"layers.0 \(Conv2d\): .* groups and kernels that are not square"),
    "kernel": (lambda: Conv2d(2, 2, (1, 3)), "not square"),
    "tokens": (lambda: Linear(8, 2), "takes a vector"),
    "soft reset": (lambda: LIF(v_reset=None), r"layer layers.0 \(LIF\): .* soft reset; to_nir\(..., soft_reset=T"),
    "levels": (MLF, r"layer layers.0 \(MLF\)"),
    "rectified": (KLIF, "it has no KLIF"),
    "PSN": (lambda: PSN(4), r"layer layers.0 \(PSN\)"),
    "AND": (lambda: Made(lambda x: x * x), "no product of two signals"),
    "added twice": (lambda: Made(lambda x: x + x), "output twice"),
    "constant": (lambda: Made(lambda x: x + 1), "with a constant"),
    "padding": (lambda: Made(lambda x: nn.functional.pad(x, (1, 1))), "NIR pads with zeros inside"),
    "a part": (lambda: Made(lambda x: x[:, :, :1]), "NIR has no node for aten.slice"),
    "one step": (lambda: Made(lambda x: x.flatten(0, 1)[0]), "NIR cannot take a part"),
    "mixed": (lambda: Made(lambda x: x.flatten(1, 2)), "cannot mix the steps or the batch"),
    "mean": (lambda: Made(lambda x: x.mean(0, keepdim=True)), "averages over the positions"),
    "wrong input": (lambda: Conv2d(5, 2, 3), r"Net cannot be traced on an input \(1, 2, 8, 8\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as error:
        to_nir(Net(make()), torch.rand(1, 2, 8, 8))
    assert "\n" not in str(error.value)


def chain(*nodes: Any, **more: Any) -> Any:
    return nir.NIRGraph.from_list(*nodes, **more)


def lif(metadata: Any = None, **fields: Any) -> Any:
    values = {"tau": 2e-4, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0} | fields
    arrays = {name: np.broadcast_to(np.asarray(value, float), (3,)).copy() for name, value in values.items()}
    return nir.LIF(**arrays, metadata=metadata or {})


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "faster than a step": (
        lambda: chain(lif(tau=1e-5)),
        r"node lif \(LIF\): tau must be at least a step of 0.0001 s, got 1e-05 s",
    ),
    "many constants, one too fast": (lambda: chain(lif(tau=[2e-4, 5e-5, 1])), "at least a step .* got 5e-05 to 1 s"),
    "no leak": (lambda: chain(lif(tau=np.inf)), r"\(LIF\): tau must be finite, got inf"),
    "never silent": (lambda: chain(lif(v_reset=[0, 1.5, 0])), r"\(LIF\): v_reset must be below v_threshold"),
    "reset": (lambda: chain(lif(metadata={"reset": "half"})), "node lif .*: unknown reset 'half' in its metadata"),
    "delay": (lambda: chain(nir.Delay(np.ones(3))), "node delay: Delay has no counterpart"),
    "two inputs": (
        lambda: nir.NIRGraph(
            {"a": nir.Input(np.array([3])), "b": nir.Input(np.array([3])), "n": lif(), "o": nir.Output(np.array([3]))},
            [("a", "n"), ("b", "n"), ("n", "o")],
        ),
        "one input and one output can be read, this one has 2 and 1",
    ),
    "cycle": (
        lambda: nir.NIRGraph(
            {"a": nir.Input(np.array([3])), "n": lif(), "o": nir.Output(np.array([3]))},
            [("a", "n"), ("n", "n"), ("n", "o")],
        ),
        r"has a cycle \(n - n\)",
    ),
    "into the input": (
        lambda: nir.NIRGraph(
            {"a": nir.Input(np.array([3])), "n": lif(), "o": nir.Output(np.array([3]))},
            [("a", "n"), ("n", "a"), ("n", "o")],
        ),
        "has an edge from n to a, out of its output or into its input",
    ),
    "out of the output": (
        lambda: nir.NIRGraph(
            {"a": nir.Input(np.array([3])), "n": lif(), "o": nir.Output(np.array([3]))},
            [("a", "n"), ("n", "o"), ("o", "n")],
            type_check=False,
        ),
        "has an edge from o to n",
    ),
    "an edge to nowhere": (
        lambda: nir.NIRGraph(
            {"a": nir.Input(np.array([3])), "n": lif(), "o": nir.Output(np.array([3]))},
            [("a", "n"), ("n", "o"), ("n", "m")],
            type_check=False,
        ),
        "an edge of the NIR graph names 'm', which is none of its nodes",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read(name: str) -> None:
    make, message = UNREADABLE[name]
    with pytest.raises(UsageError, match=message):
        from_nir(make())


def test_nodes_of_others() -> None:
    """Nodes that no network here is written with, by what NIR says they compute; and more steps than the file says."""
    pair = np.array([2, 2])
    graph = chain(
        nir.Input(np.array([2, 4, 4])),
        nir.SumPool2d(kernel_size=pair, stride=pair, padding=np.array([0, 0])),
        nir.Scale(np.arange(8.0).reshape(2, 2, 2)),
        nir.Flatten(np.array([2, 2, 2]), 1, 2),
        nir.Output(np.array([2, 4])),
    )
    x = torch.rand(3, 2, 4, 4)
    expected = x.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) * torch.arange(8.0).view(2, 2, 2)
    got = from_nir(graph, T=2)(x)
    torch.testing.assert_close(got, expected.flatten(2).expand(2, 3, 2, 4))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.nir"
    graph = chain(lif())

    def break_off(file: Path, graph: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nir, "write", break_off)
    with pytest.raises(UsageError, match=r"cannot write .*net.nir: No space left"):
        write_nir(graph, path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "odd.nir").write_bytes(b"nothing")
    with pytest.raises(DataFileError, match=r"odd.nir is no NIR graph"):
        read_nir(tmp_path / "odd.nir")
    with pytest.raises(DataFileError, match="no such file"):
        read_nir(tmp_path / "none.nir")


def test_time_steps() -> None:
    with pytest.raises(UsageError, match="dt must be a positive number of seconds, got 0"):
        to_nir(vgg(), torch.rand(1, 2, 8, 8), dt=0)
    model, x = made("LIF")
    graph = to_nir(model, x, dt=0.5)
    assert graph.metadata == {"dt": 0.5, "T": 4}
    assert torch.equal(from_nir(graph)(x), model(x))
    assert not torch.equal(from_nir(graph, dt=0.4)(x), model(x))
