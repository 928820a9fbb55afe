"""`load_spikingjelly`: SpikingJelly's networks with their weights, neurons and options, and the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.spikingjelly_networks import build, neuron, prepared, same, surrogate
from safetensors.torch import save_file
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.models import load_spikingjelly
from spikeloom.neurons import IF, LIF, PLIF
from spikeloom.surrogates import ATan

LIF_OPTIONS = {"spiking_neuron": neuron.LIFNode, "tau": 1.5, "decay_input": False, "detach_reset": True}
PLIF_OPTIONS = {"spiking_neuron": neuron.ParametricLIFNode, "init_tau": 1.5, "v_reset": None}
IF_OPTIONS = {"spiking_neuron": neuron.IFNode, "v_threshold": 0.75, "surrogate_function": surrogate.ATan()}


def images(side: int = 32, scale: float = 2.0, T: int = 4) -> Tensor:
    return torch.randn(T, 1, 3, side, side, dtype=torch.float64) * scale


def depths(*quick: int) -> list[Any]:
    return [d if d in quick else pytest.param(d, marks=pytest.mark.slow) for d in (18, 34, 50, 101, 152)]


@pytest.mark.parametrize("depth", depths(18, 50))
@pytest.mark.parametrize("options", [LIF_OPTIONS, PLIF_OPTIONS], ids=["LIF", "PLIF"])
def test_sew_resnet(depth: int, options: dict[str, Any]) -> None:
    x = images()
    theirs = prepared(build("sew_resnet", f"sew_resnet{depth}", num_classes=10, cnf="ADD", **options), x, shift=1.0)
    same(load_spikingjelly(theirs, f"sew_resnet{depth}"), theirs, x)


@pytest.mark.parametrize("depth", depths(18, 50))
def test_spiking_resnet(depth: int) -> None:
    x = images()
    theirs = prepared(build("spiking_resnet", f"spiking_resnet{depth}", num_classes=10, **IF_OPTIONS), x)
    same(load_spikingjelly(theirs, f"spiking_resnet{depth}"), theirs, x)


@pytest.mark.parametrize("depth", depths(18)[:2])
def test_ms_resnet(depth: int) -> None:
    x = images()
    theirs = prepared(build("ms_resnet", f"ms_resnet{depth}", num_classes=10), x)
    same(load_spikingjelly(theirs, f"ms_resnet{depth}"), theirs, x)


def narrow(theirs: Any, width: int = 64) -> Any:
    """A VGG whose linear layers are narrow: two of them hold 119 million weights."""
    _, first, drop, _, second, _, last = theirs.classifier
    layers = (nn.Linear(512 * 49, width), first, drop, nn.Linear(width, width), second, drop)
    theirs.classifier = nn.Sequential(*layers, nn.Linear(width, last.out_features))
    return theirs


@pytest.mark.parametrize(
    ("depth", "norms", "side"),
    [
        (11, True, 32),
        (11, False, 64),
        pytest.param(11, True, 224, marks=pytest.mark.slow),  # the map is 7x7: nothing is pooled to that size
        *(pytest.param(depth, norms, 64, marks=pytest.mark.slow) for depth in (13, 16, 19) for norms in (True, False)),
    ],
)
def test_spiking_vgg(depth: int, norms: bool, side: int) -> None:
    x = images(side)
    name = f"spiking_vgg{depth}" + "_bn" * norms
    theirs = narrow(build("spiking_vgg", name, num_classes=10, **IF_OPTIONS))
    for module in theirs.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 2 / module.in_features**0.5)
        elif isinstance(module, nn.Conv2d) and not norms:
            module.weight.data.mul_(1.5)  # without norms the deepest layers would be silent
    theirs = prepared(theirs, x)
    same(load_spikingjelly(theirs, f"spiking_vgg{depth}", hidden=64), theirs, x)


SPIKFORMER = {"embed_dims": 64, "num_heads": 4, "depths": 2, "num_classes": 10}


@pytest.mark.parametrize("options", [{}, PLIF_OPTIONS], ids=["LIF", "PLIF"])
@pytest.mark.parametrize(("patch", "name"), [(4, "spikformer_4_384"), (16, "spikformer_8_384")])
def test_spikformer(patch: int, name: str, options: dict[str, Any]) -> None:
    x = images(64)
    theirs = build("spikformer", "Spikformer", img_size_h=64, img_size_w=64, patch_size=patch, **SPIKFORMER, **options)
    theirs = prepared(theirs, x, shift=1.5)
    ours = load_spikingjelly(theirs, name)
    same(ours, theirs, x, one_to_one=False)
    # The stem's order is part of it: the paper's gives other logits.
    other = load_spikingjelly(theirs, name, pool_first=False)
    with torch.no_grad():
        assert (other(x) - ours(x)).abs().max() > 1e-3


def test_published_spikformers_have_the_layers_of_ours() -> None:
    theirs = build("spikformer", "spikformer_cifar10")
    model = load_spikingjelly(theirs, "spikformer_4_384")
    assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in theirs.parameters()) > 9e6


# --- weights alone ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 3, 32, 32, dtype=torch.float64) * 2
    return prepared(build("sew_resnet", "sew_resnet18", num_classes=7, cnf="ADD", **IF_OPTIONS), x), x


@pytest.mark.parametrize("file", ["a.pth", "a.safetensors", "wrapped.pt"])
def test_from_a_file(small: Any, tmp_path: Path, file: str) -> None:
    theirs, x = small
    state = theirs.state_dict()
    if file.endswith("safetensors"):
        save_file(state, tmp_path / file)
    else:
        torch.save({"model": state, "epoch": 3} if "wrapped" in file else state, tmp_path / file)
    ours = load_spikingjelly(tmp_path / file, "sew_resnet18", neuron=lambda: IF(v_threshold=0.75))
    with torch.no_grad():
        expected = load_spikingjelly(theirs, "sew_resnet18")(x)
        assert torch.equal(ours(x), expected)
        assert expected.shape[-1] == 7
    assert not ours.training


def test_a_file_that_sorts_names_keeps_the_order_of_layers(tmp_path: Path) -> None:
    """Of 23 blocks of one stage the tenth comes before the second there; their shapes are the same."""
    theirs = build("sew_resnet", "sew_resnet101", num_classes=2, cnf="ADD", **PLIF_OPTIONS)
    for p in theirs.parameters():
        nn.init.normal_(p)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    with torch.device("cpu"):
        ours = load_spikingjelly(tmp_path / "a.safetensors", "sew_resnet101", neuron=PLIF).state_dict()
    expected = load_spikingjelly(theirs, "sew_resnet101").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


@pytest.mark.parametrize("family", ["spikformer", "ms_resnet", "spiking_vgg"])
def test_every_family_from_a_file_that_sorts_names(family: str, tmp_path: Path) -> None:
    if family == "spikformer":
        theirs, name, own = build(family, "Spikformer", patch_size=4, **SPIKFORMER), "spikformer_4_384", True
    elif family == "ms_resnet":
        theirs, name, own = build(family, "ms_resnet18", num_classes=10), "ms_resnet18", False
    else:
        theirs = narrow(build(family, "spiking_vgg11_bn", num_classes=10, **IF_OPTIONS))
        name, own = "spiking_vgg11", False
    for p in theirs.parameters():
        nn.init.normal_(p)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    options: dict[str, Any] = {"channels": 64, "depth": 2, "heads": 4} if own else {}
    options |= {"hidden": 64} if family == "spiking_vgg" else {}
    ours = load_spikingjelly(tmp_path / "a.safetensors", name, **options).state_dict()
    expected = load_spikingjelly(theirs, name, **options).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in expected.items())


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('run')",))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match=r"^load_spikingjelly: .*evil.pth holds objects that only code could make"):
        load_spikingjelly(tmp_path / "evil.pth", "sew_resnet18")


def test_random_numbers_stay(small: Any) -> None:
    before = torch.get_rng_state()
    load_spikingjelly(small[0], "sew_resnet18")
    assert torch.equal(torch.get_rng_state(), before)


# --- what has no equal ------------------------------------------------------------------------------------------------


def made(kind: str = "IFNode", **options: Any) -> Any:
    return build(
        "sew_resnet", "sew_resnet18", num_classes=10, cnf="ADD", spiking_neuron=getattr(neuron, kind), **options
    )


def odd_eps() -> Any:
    theirs = made()
    theirs.bn1.eps = 1e-3
    return theirs


def mixed() -> Any:
    theirs = made()
    theirs.sn1 = neuron.LIFNode()
    return theirs


WRONG: dict[str, tuple[Any, str, str]] = {
    "another depth": (made, "sew_resnet34", r"sew_resnet34: only part of the weights fits: 122 tensors .*strict=False"),
    "another network": (made, "shd_net", "shd_net: (no weights fit|only part of the weights fits)"),
    "a neuron": (lambda: made("EIFNode"), "sew_resnet18", "EIFNode has no equal here: give neuron="),
    "a surrogate": (
        lambda: made(surrogate_function=surrogate.Erf()),
        "sew_resnet18",
        "surrogate Erf has no equal here: give neuron=",
    ),
    "mixed neurons": (mixed, "sew_resnet18", r"the neurons of the source differ, layer1.0.sn1 from the first"),
    "eps": (odd_eps, "sew_resnet18", "the eps of bn1 is 0.001; norms here have 1e-05"),
    "a bottleneck's IAND": (
        lambda: build("sew_resnet", "sew_resnet50", cnf="IAND", spiking_neuron=neuron.IFNode),
        "sew_resnet50",
        r"SpikingJelly's bottleneck with IAND is A \(1 - S\)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_has_no_equal_is_one_line(kind: str) -> None:
    make, name, message = WRONG[kind]
    with pytest.raises(UsageError, match=rf"^load_spikingjelly: {message}") as found:
        load_spikingjelly(make(), name)
    assert "\n" not in str(found.value)


def test_a_neuron_given_instead() -> None:
    model: Any = load_spikingjelly(made("EIFNode"), "sew_resnet18", neuron=lambda: LIF(tau=3.0))
    assert model.stem_spike.neuron.tau == 3.0


def test_constants_of_neurons() -> None:
    options = {"v_threshold": 0.5, "v_reset": -0.25, "surrogate_function": surrogate.ATan(alpha=3.0)}
    node: Any = load_spikingjelly(made("ParametricLIFNode", init_tau=4.0, **options), "sew_resnet18").stem_spike.neuron
    assert type(node) is PLIF
    assert (node.v_threshold, node.v_reset, node.surrogate, node.detach_reset) == (0.5, -0.25, ATan(3.0), False)
    assert (1 / node.w.detach().sigmoid()).item() == pytest.approx(4.0)
