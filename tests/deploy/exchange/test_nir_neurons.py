"""NIR's neurons with any constants: as NIR's equations say in double precision, and as snnTorch runs its exports."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spikeloom import Stream
from spikeloom.deploy import from_nir, read_nir, to_nir, to_onnx, write_nir
from spikeloom.errors import DataFileError, UsageError
from spikeloom.neurons import IF, LIF, SynapticLIF

nir: Any = pytest.importorskip("nir", reason="the extra `exchange` is not installed: NIR is not tested")
pytestmark = pytest.mark.usefixtures("one_thread")

DT, N, STEPS = 1e-4, 5, 40
KINDS = {
    "IF": ("r", "v_threshold", "v_reset"),
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "LI": ("tau", "r", "v_leak"),
    "CubaLI": ("tau_mem", "tau_syn", "r", "v_leak", "w_in"),
    "CubaLIF": ("tau_mem", "tau_syn", "r", "v_leak", "w_in", "v_threshold", "v_reset"),
}
RANGES = {
    "tau": (DT, 20 * DT),
    "tau_mem": (DT, 20 * DT),
    "tau_syn": (DT, 20 * DT),
    "r": (-1.0, 5.0),
    "w_in": (-1.0, 5.0),
    "v_leak": (-0.5, 0.5),
    "v_threshold": (0.3, 2.0),
    "v_reset": (-0.5, 0.2),
}
COMMON = {"v_leak": 0.25, "v_reset": 0.25, "r": 1.5, "w_in": 0.75}
"""Constants that the neurons of `spikeloom.neurons` can take over; v_leak is v_reset."""


def node_of(kind: str, many: bool, rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float64) -> Any:
    """A node whose neurons have constants of their own, or share them."""
    constants: dict[str, Any] = {}
    for name in KINDS[kind]:
        low, high = RANGES[name]
        value = rng.uniform(low, high, shape) if many else COMMON.get(name, rng.uniform(low, high))
        constants[name] = np.broadcast_to(value, shape).astype(dtype)
    if kind == "IF":
        constants["r"] = constants["r"] / dtype(DT)
    return getattr(nir, kind)(**constants)


def euler(
    node: Any, x: np.ndarray, strict: bool, reset: str, weights: Callable[[Any], Any] | None = None
) -> np.ndarray:
    """NIR's differential equations in steps of DT, as they stand in its documentation."""
    kind = type(node).__name__
    v = np.broadcast_to(node.v_reset if kind == "IF" else node.v_leak, x.shape[1:]).astype(np.float64)
    current, late, outputs = np.zeros_like(v), np.zeros_like(v), []
    spikes = np.zeros_like(v)
    for x_t in x:
        received = x_t if weights is None else x_t + weights(spikes)
        if kind.startswith("Cuba"):
            current = current + DT / node.tau_syn * (node.w_in * received - current)
        else:
            current = received
        if kind == "IF":
            v = v + DT * node.r * current
        else:
            tau = node.tau_mem if kind.startswith("Cuba") else node.tau
            v = v + DT / tau * ((node.v_leak - v) + node.r * current)
        v = v - late
        if kind in ("LI", "CubaLI"):
            outputs.append(v)
            continue
        spikes = (v > node.v_threshold if strict else v >= node.v_threshold).astype(np.float64)
        outputs.append(spikes)
        if reset == "set":
            v = np.where(spikes > 0, node.v_reset, v)
        elif reset == "subtract":
            v = v - node.v_threshold * spikes
        else:
            late = node.v_threshold * spikes
    return np.stack(outputs)


def chain(*nodes: Any) -> Any:
    return nir.NIRGraph.from_list(*nodes)


@pytest.mark.parametrize("many", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_by_the_equations_of_nir(kind: str, many: bool) -> None:
    resets = ["set", "subtract", "subtract_later"] if "v_threshold" in KINDS[kind] else ["set"]
    for seed, reset in itertools.product(range(12), resets):
        rng = np.random.default_rng(seed)
        shape = [(N,), (2, 3, N), (N, 1)][seed % 3]
        node = node_of(kind, many, rng, shape)
        x = rng.normal(0.5, 1, (STEPS, 3, *shape))
        expected = euler(node, x, True, reset)
        if many:
            assert len(np.unique(node.r)) > 1
        network = from_nir(chain(node), reset=reset)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            double = network(torch.from_numpy(x))
        np.testing.assert_allclose(double, expected, rtol=1e-9, atol=1e-12)
        if "v_threshold" not in KINDS[kind]:
            single = network(torch.from_numpy(x).float())
            np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-4)


def test_shared_constants_run_in_the_scans() -> None:
    """Threads of kernels, not steps of Python, for what most files hold."""
    rng = np.random.default_rng(0)
    layers = {kind: from_nir(chain(node_of(kind, False, rng, (N,)))).layers for kind in ("IF", "LIF", "CubaLIF")}
    assert {kind: type(layer).__name__ for kind, (layer,) in ((k, v.values()) for k, v in layers.items())} == {
        "IF": "Charged",
        "LIF": "Charged",
        "CubaLIF": "SynapticLIF",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    """Through a file, and written again for steps of another length."""
    rng = np.random.default_rng(3)
    node = node_of(kind, True, rng, (4, N))
    x = torch.from_numpy(rng.normal(0.5, 1, (STEPS, 2, 4, N)))
    network = from_nir(chain(node), strict=False, reset="subtract")
    for dt in (DT, 5e-3):
        write_nir(to_nir(network, x.float(), dt), tmp_path / "net.nir")
        again = from_nir(read_nir(tmp_path / "net.nir"))
        torch.testing.assert_close(again(x), network(x), rtol=1e-9, atol=1e-12)
        assert not torch.equal(from_nir(read_nir(tmp_path / "net.nir"), dt=dt / 2)(x), network(x))


@pytest.mark.parametrize("kind", ["LIF", "CubaLIF"])
def test_recurrent_weights(kind: str) -> None:
    rng = np.random.default_rng(1)
    for many, reset in itertools.product((False, True), ("set", "subtract_later")):
        node = node_of(kind, many, rng, (N,))
        weights, bias = rng.normal(0, 1, (N, N)), rng.normal(0, 1, N)
        for back in (nir.Linear(weights), nir.Affine(weights, bias)):
            ends = {"in": nir.Input(np.array([N])), "out": nir.Output(np.array([N]))}
            edges = [("in", "n"), ("n", "w"), ("w", "n"), ("n", "out")]
            graph = nir.NIRGraph({"w": back, "n": node, **ends}, edges)
            x = rng.normal(1, 4, (STEPS, 3, N))
            both = functools.partial(_apply, weights, bias if back is not None and hasattr(back, "bias") else 0.0)
            expected = euler(node, x, True, reset, both)
            network = from_nir(graph, reset=reset).double()  # pyright: ignore[reportArgumentType]
            assert len(network.layers) == 1
            np.testing.assert_array_equal(network(torch.from_numpy(x)).detach(), expected)
            assert np.any(expected != euler(node, x, True, reset))
            again = from_nir(to_nir(network, torch.zeros(1, 1, N)))
            assert torch.equal(again.double()(torch.from_numpy(x)), network(torch.from_numpy(x)))


def _apply(weights: np.ndarray, bias: Any, spikes: np.ndarray) -> np.ndarray:
    return spikes @ weights.T + bias


def test_other_cycles_are_refused() -> None:
    rng = np.random.default_rng(1)
    ends = {"in": nir.Input(np.array([N])), "out": nir.Output(np.array([N]))}
    nodes = {name: node_of("LIF", True, rng, (N,)) for name in "ab"} | {"w": nir.Linear(np.eye(N)), **ends}
    edges = [("in", "a"), ("a", "b"), ("b", "w"), ("w", "a"), ("b", "out")]
    with pytest.raises(UsageError, match=r"has a cycle .* a linear layer from them to themselves"):
        from_nir(nir.NIRGraph(nodes, edges))


def test_a_stream_steps_through_them() -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(0.5, 1, (STEPS, 2, N)))
    for kind in KINDS:
        network = from_nir(chain(node_of(kind, True, rng, (N,))))
        stream = Stream(network)
        parts = torch.cat([stream(part) for part in x.split([1, 7, 20, 12])])
        assert torch.equal(parts, network(x))
    with pytest.raises(ValueError, match=r"these CubaLIF neurons take \[T, N, 5\], got"):
        network(x[..., :1])


def test_gradients_reach_weights_through_them() -> None:
    rng = np.random.default_rng(5)
    nodes = (nir.Affine(rng.normal(0, 1, (N, 3)), np.zeros(N)), node_of("CubaLIF", True, rng, (N,)))
    network = from_nir(chain(nir.Input(np.array([3])), *nodes, nir.Output(np.array([N]))))
    network(torch.rand(STEPS, 2, 3)).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert len(gradients) == 2
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients)


def test_layers_of_one_kind_keep_their_constants_in_onnx(tmp_path: Path) -> None:
    """Arrays so large that they are printed in part, and differ where nobody prints them."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra `exchange` is not installed: ONNX is not tested")
    many, rng = 2000, np.random.default_rng(2)
    first = node_of("LIF", True, rng, (many,))
    other = nir.LIF(**{name: getattr(first, name).copy() for name in KINDS["LIF"]})
    other.v_threshold[1000] += 1e-3
    network = from_nir(chain(first, other))
    network.layers["1_lif_1"].constants["v_threshold"][900:1000] *= 3
    x = torch.rand(4, 2, many) * 3
    to_onnx(network, x, tmp_path / "net.onnx")
    (got,) = runtime.InferenceSession(tmp_path / "net.onnx").run(["logits"], {"input": x.numpy()})
    expected = network(x)
    assert 0.001 < expected[..., 900:1000].mean() < expected.mean()
    assert (torch.from_numpy(got) != expected).float().mean() < 1e-3


# --- what metadata say ------------------------------------------------------------------------------------------------


def test_a_soft_reset_in_the_metadata(tmp_path: Path) -> None:
    for neuron in (IF(v_threshold=0.75, v_reset=None), LIF(tau=4 / 3, decay_input=False, v_reset=None, strict=True)):
        x = torch.randint(-8, 17, (30, 4, 6)) / 8
        graph = to_nir(nn.Sequential(neuron), x, soft_reset=True)
        write_nir(graph, tmp_path / "net.nir")
        assert [node.metadata["reset"] for node in graph.nodes.values() if "reset" in node.metadata] == ["subtract"]
        network = from_nir(read_nir(tmp_path / "net.nir"))
        torch.testing.assert_close(network(x), neuron(x), rtol=0, atol=0)
        assert not torch.equal(from_nir(read_nir(tmp_path / "net.nir"), reset="set")(x), neuron(x))
        (layer,) = network.layers.values()
        assert isinstance(layer, nn.Module)
        assert type(layer).__name__ == "Charged"


def test_at_the_threshold() -> None:
    """`>` where nobody says otherwise, as NIR's equations; files from here say it of every neuron."""
    x = torch.ones(1, 1, 1)
    for strict, neuron in itertools.product((False, True), (IF, functools.partial(SynapticLIF, tau_syn=None))):
        own = neuron(v_threshold=1.0, strict=strict)
        graph = to_nir(nn.Sequential(own), x)
        assert [n.metadata["strict"] for n in graph.nodes.values() if "strict" in n.metadata] == [strict]
    graph = chain(nir.IF(r=np.full(1, 1 / DT), v_threshold=np.ones(1)))
    assert from_nir(graph)(x).item() == 0
    assert from_nir(graph, strict=False)(x).item() == 1
    graph.metadata = {"dt": DT, "T": 4}  # as files from here once were
    assert from_nir(graph)(x).item() == 1
    with pytest.raises(UsageError, match="unknown reset 'zero'; known: set, subtract, subtract_later"):
        from_nir(graph, reset="zero")  # pyright: ignore[reportArgumentType]


# --- snnTorch ---------------------------------------------------------------------------------------------------------

Neurons = Callable[[tuple[int, ...]], nn.Module]


@pytest.fixture(scope="module")
def snntorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("snntorch", reason="snnTorch is not installed: its exports are not read")


def constant(shape: tuple[int, ...], low: float, high: float, grid: bool) -> Tensor:
    """Of every neuron; on a grid where arithmetic is exact, one half."""
    return torch.full(shape, 0.5) if grid else torch.empty(shape).uniform_(low, high)


def neurons(snn: Any, kind: str, shape: tuple[int, ...], grid: bool, more: dict[str, Any]) -> nn.Module:
    options = {
        "beta": constant(shape, 0.3, 0.95, grid),
        "threshold": constant(shape, 0.2, 1.0, grid),
        "init_hidden": True,
        **more,
    }
    if "Synaptic" in kind:
        options["alpha"] = constant(shape, 0.3, 0.95, grid)
    if kind.startswith("R"):
        options["linear_features"] = shape[0]
    return getattr(snn, kind)(**options)


def export(network: nn.Module, x: Tensor, path: Path) -> None:
    """Writes what snnTorch makes of a network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the interfaces that it takes
        from snntorch.export_nir import export_to_nir  # pyright: ignore

        nir.write(path, export_to_nir(network, x[0], ignore_dims=[0]))


def theirs(network: nn.Module, x: Tensor) -> Tensor:
    """What the network says of a sequence, from rest."""
    for module in network.modules():
        for name in ("mem", "syn", "spk"):
            if hasattr(module, name):
                setattr(module, name, torch.zeros(0))
    with torch.no_grad():
        return torch.stack([network(x_t) for x_t in x])


RESETS = {
    "to zero": ({"reset_mechanism": "zero", "reset_delay": False}, None),
    "as by default": ({}, "subtract_later"),
}


@pytest.mark.parametrize("grid", [False, True], ids=["random", "on a grid"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky"])
def test_networks_of_snntorch(snntorch: Any, tmp_path: Path, kind: str, reset: str, grid: bool) -> None:
    more, ours = RESETS[reset]
    make = functools.partial(neurons, snntorch, kind, grid=grid, more=more)
    network = nn.Sequential(nn.Linear(6, 16), make((16,)), nn.Linear(16, 12, bias=False), make((12,)))
    x = torch.randint(-8, 25, (30, 5, 6)) / 8
    for parameter in network.parameters():
        if grid:
            parameter.data = (parameter.data * 8).round() / 4
        elif parameter.dim() > 1:
            parameter.data *= 2
    expected = theirs(network, x)
    assert 0.05 < expected.mean() < 0.9
    assert set(expected.unique().tolist()) == {0.0, 1.0}
    export(network, x, tmp_path / "theirs.nir")
    got = from_nir(read_nir(tmp_path / "theirs.nir"), reset=ours)(x)  # pyright: ignore[reportArgumentType]
    assert torch.equal(got, expected)
    if grid and kind != "RLeaky":  # thresholds are met exactly, here and there
        loose = from_nir(read_nir(tmp_path / "theirs.nir"), reset=ours, strict=False)  # pyright: ignore
        assert not torch.equal(loose(x), expected)


def test_a_convolutional_network_of_snntorch(snntorch: Any, tmp_path: Path) -> None:
    make = functools.partial(neurons, snntorch, "Leaky", grid=False, more={"reset_mechanism": "zero"})
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        make((6, 8, 8)),
        nn.AvgPool2d((2, 2), (2, 2)),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        make((8, 2, 2)),
        nn.Flatten(),
        nn.Linear(32, 10),
        make((10,)),
    )
    x = 3 * torch.rand(20, 3, 2, 8, 8)
    expected = theirs(network, x)
    assert 0.02 < expected.mean() < 0.9
    export(network, x, tmp_path / "theirs.nir")
    assert torch.equal(from_nir(read_nir(tmp_path / "theirs.nir"))(x), expected)


def test_scalars_stand_for_all_neurons(tmp_path: Path) -> None:
    """As exporters without NIR's check of shapes write them."""
    rng = np.random.default_rng(0)
    tau, r, v_leak, v_threshold, v_reset = np.float32([3e-4, 2, 0, 0.5, 0])
    node = nir.LIF(tau, r, v_leak, v_threshold, v_reset)
    nodes = {
        "i": nir.Input(np.array([3])),
        "w": nir.Linear(rng.normal(0, 1, (N, 3))),
        "n": node,
        "o": nir.Output(np.array([N])),
    }
    graph = nir.NIRGraph(nodes, [("i", "w"), ("w", "n"), ("n", "o")], type_check=False)
    nir.write(tmp_path / "net.nir", graph)
    x = rng.normal(0.5, 1, (STEPS, 2, 3))
    expected = euler(node, x @ nodes["w"].weight.T, True, "set")
    got = from_nir(read_nir(tmp_path / "net.nir"))(torch.from_numpy(x).float())
    assert (got.detach().numpy() != expected).mean() < 0.01


def test_shapes_that_do_not_fit_are_found_when_a_file_is_read(tmp_path: Path) -> None:
    nodes = {
        "i": nir.Input(np.array([3])),
        "w": nir.Linear(np.ones((4, 3))),
        "o": nir.Output(np.array([N])),
        "n": node_of("LIF", True, np.random.default_rng(0), (N,)),
    }
    graph = nir.NIRGraph(nodes, [("i", "w"), ("w", "n"), ("n", "o")], type_check=False)
    nir.write(tmp_path / "net.nir", graph)
    with pytest.raises(
        DataFileError, match=r"net.nir is no NIR graph: .*type mismatch: w.output: \[\[4\]\] -> n.input"
    ):
        read_nir(tmp_path / "net.nir")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b", "c", "d"),
        ("output", "b", "c", "input"),
        ("a", "input", "output", "d"),
        ("input", "output", "c", "d"),
        ("metadata", "type", "nodes", "edges"),
        ("a.b", "a_b", "", "0"),
    ],
)
def test_nodes_of_any_name(names: tuple[str, ...], tmp_path: Path) -> None:
    start, one, other, end = names
    rng = np.random.default_rng(0)
    nodes = {
        end: nir.Output(np.array([N])),
        other: node_of("LIF", True, rng, (N,)),
        one: nir.Linear(rng.normal(0, 1, (N, 3))),
        start: nir.Input(np.array([3])),
    }
    graph = nir.NIRGraph(nodes, [(other, end), (one, other), (start, one)])
    x = rng.normal(0.5, 1, (STEPS, 2, 3))
    expected = euler(nodes[other], x @ nodes[one].weight.T, True, "set")
    assert np.array_equal(from_nir(graph).double()(torch.from_numpy(x)).detach(), expected)
    if "" not in names:  # no name of a file's folder
        write_nir(graph, tmp_path / "net.nir")
        assert np.array_equal(from_nir(read_nir(tmp_path / "net.nir")).double()(torch.from_numpy(x)).detach(), expected)


def test_layers_of_any_name(tmp_path: Path) -> None:
    network = nn.Sequential()
    for name, layer in {"input": nn.Linear(3, 4), "output": LIF(), "a/b": nn.Linear(4, 4), "a_b": LIF()}.items():
        network.add_module(name, layer)
    x = 3 * torch.rand(6, 2, 3)
    write_nir(to_nir(network, x), tmp_path / "net.nir")
    torch.testing.assert_close(from_nir(read_nir(tmp_path / "net.nir"))(x), network(x))
