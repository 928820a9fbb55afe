"""Networks of SpikingJelly (Fang et al. 2023, Science Advances 9) as registered ones, with their weights.

SpikingJelly's Spikformer differs from the paper's in its stem, where a pool stands before its neuron, and makes Q, K
and V by one layer. IAND of its SEW bottlenecks is `A (1 - S)`, which the paper and our blocks do not have.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.models.registry import MODELS, create_model
from spikeloom.models.weight_matching import copy_weights
from spikeloom.models.weight_source import Layer, Source, layers_of
from spikeloom.neurons import IF, LIF, PLIF
from spikeloom.surrogates import ATan, Rectangular, Sigmoid, Surrogate

_EPS = 1e-5  # of norms
_HERE = "load_spikingjelly"
_GIVE = "give neuron=, a factory of the neuron that it has"


def load_spikingjelly(source: Source, name: str, *, strict: bool = True, **arguments: Any) -> nn.Module:
    """A registered network with the weights of SpikingJelly's, or of any module whose layers come in the same order.

        model = load_spikingjelly(their_model, "sew_resnet34")
        model = load_spikingjelly("sew34.pth", "sew_resnet34", neuron=lambda: LIF(tau=2.0), T=4)

    Layers are matched by order and shape (`copy_weights`). Networks with an equal of SpikingJelly's release: the ones
    called `sew_resnet*`, `spiking_resnet*` and `spiking_vgg*`, `ms_resnet18` and `ms_resnet34`, and `spikformer_*` (of
    `channels`, `depth` and `heads`). `in_channels` and `num_classes` are taken from the first and last weights.

    Args:
        source: a module, a state dict, or a safetensors or `torch.save` file of one, of which no code is run. Of a
            module of SpikingJelly the neurons, T, g of SEW blocks and the number of heads are taken as well; of weights
            alone they are the registered network's own unless they are given.
        name: in `list_models()`.
        strict: what is left over on either side is an error; otherwise a warning that names it.
        arguments: of the network's builder.

    Returns:
        The network in eval mode, in double precision where the weights are.

    Raises:
        UsageError: weights are left over (`strict`) or none fits; an unknown name or argument; neurons or blocks of the
            module that have no equal here.
        DataFileError: a file that cannot be read.
    """
    layers, found = read_layers(source, name)
    found |= _sizes(layers)
    if isinstance(source, nn.Module):
        found |= _of_module(source)
        if "neuron" not in arguments and (neuron := _neuron(source)):
            found["neuron"] = neuron
    known = inspect.signature(MODELS[name]).parameters
    options = {key: value for key, value in found.items() if key in known} | arguments
    with torch.random.fork_rng(devices=[]):  # the weights are replaced: the caller's random numbers stay as they are
        model = create_model(name, **options)
    if any(value.dtype == torch.float64 for layer in layers for value in layer.tensors.values()):
        model.double()
    try:
        copy_weights(layers, model, strict)
    except UsageError as error:
        raise UsageError(f"{_HERE}: {name}: {error}") from None
    return model.eval()


def read_layers(source: Source, name: str, owner: str = _HERE) -> tuple[list[Layer], dict[str, Any]]:
    """The layers of a source as the registered networks have them, and the options that these must be built with.

    Args:
        source: as `load_spikingjelly`.
        name: of the registered network.
        owner: who asks, for messages.

    Raises:
        UsageError: no such network, or values that are no tensors.
        DataFileError: a file that cannot be read.
    """
    layers = layers_of(source, owner)
    options: dict[str, Any] = {
        "pool_first": any("patch_embed.stages." in layer.name for layer in layers),
        "batch_norm": any("running_mean" in layer.tensors for layer in layers),
    }
    known = inspect.signature(MODELS[name]).parameters
    return _split(layers), {key: value for key, value in options.items() if key in known}


def _sizes(layers: list[Layer]) -> dict[str, Any]:
    """What the first and the last weights say of a network."""
    weights = [layer.tensors["weight"] for layer in layers if "weight" in layer.tensors]
    matrices = [weight for weight in weights if weight.dim() > 1]
    if not matrices:
        return {}
    return {"in_channels": matrices[0].shape[1], "num_classes": matrices[-1].shape[0]}


def _split(layers: list[Layer]) -> list[Layer]:
    """The layers with those that make Q, K and V together as three each."""
    split: list[Layer] = []
    joint: list[Layer] = []
    for layer in (*layers, Layer("", {})):
        if "attn.qkv_" in layer.name:
            joint.append(layer)
            continue
        split += [_third(each, part) for part in range(3) for each in joint]
        joint = []
        if layer.tensors:
            split.append(layer)
    return split


def _third(layer: Layer, part: int) -> Layer:
    def take(tensor: Tensor) -> Tensor:
        return tensor.chunk(3)[part] if tensor.dim() else tensor  # what a neuron learns is one number for all three

    return Layer(f"{layer.name}[{'qkv'[part]}]", {kind: take(tensor) for kind, tensor in layer.tensors.items()})


def _of_module(source: nn.Module) -> dict[str, Any]:
    """The builder's arguments that a module of SpikingJelly tells.

    Raises:
        UsageError: blocks or norms that have no equal here.
    """
    found: dict[str, Any] = {}
    for key, attribute in (("T", "T"), ("heads", "num_heads"), ("channels", "embed_dims"), ("depth", "depths")):
        if isinstance(value := getattr(source, attribute, None), int):
            found[key] = value
    for name, module in source.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.eps != _EPS:  # pyright: ignore[reportPrivateUsage]
            raise UsageError(f"{_HERE}: the eps of {name} is {module.eps}; norms here have {_EPS}")
        if isinstance(cnf := getattr(module, "cnf", None), str):
            if cnf == "IAND" and hasattr(module, "conv3"):
                raise UsageError(
                    f"{_HERE}: SpikingJelly's bottleneck with IAND is A (1 - S), which SEW blocks here do not have: "
                    "they have the paper's (1 - A) S"
                )
            found["combine"] = cnf.lower()
    return found


def _neuron(source: nn.Module) -> Callable[..., nn.Module] | None:
    """Makes the neurons that a module of SpikingJelly has everywhere; None of a module without any.

    Raises:
        UsageError: they have no equal here, or are of several kinds.
    """
    nodes = {n: m for n, m in source.named_modules() if type(m).__module__.startswith("spikingjelly.") and _fires(m)}
    if not nodes:
        return None
    behind = {
        name for name in nodes if name.endswith("attn_lif")
    }  # the product of attention has a threshold of its own
    kinds = {name: _settings(node) for name, node in nodes.items()}
    common = next(kinds[name] for name in nodes if name not in behind)
    for name, kind in kinds.items():
        if kind != (common | {"v_threshold": kind["v_threshold"]} if name in behind else common):
            raise UsageError(f"{_HERE}: the neurons of the source differ, {name} from the first: {_GIVE}")
    options = {key: value for key, value in common.items() if key != "class"}
    factory = functools.partial(common["class"], **options)
    thresholds = {kinds[name]["v_threshold"] for name in behind}
    if thresholds <= {0.5}:  # which our attention sets as well
        return factory
    if thresholds != {common["v_threshold"]}:
        raise UsageError(f"{_HERE}: attention has neurons of threshold {min(thresholds)}: {_GIVE}")
    return _fixed(factory)


def _fixed(factory: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """A factory without a threshold to set: attention then has the same neurons as all other layers."""
    return lambda: factory()


def _fires(module: nn.Module) -> bool:
    return hasattr(module, "surrogate_function") and hasattr(module, "v_threshold")


def _settings(node: Any) -> dict[str, Any]:
    """The class and the arguments of our neuron that is a node of SpikingJelly."""
    kind = type(node).__name__
    found: dict[str, Any] = {
        "v_threshold": float(node.v_threshold),
        "v_reset": None if node.v_reset is None else float(node.v_reset),
        "detach_reset": bool(node.detach_reset),
        "surrogate": _surrogate(node.surrogate_function),
    }
    if kind == "IFNode":
        return {"class": IF, **found}
    if kind == "LIFNode":
        return {"class": LIF, "tau": float(node.tau), "decay_input": bool(node.decay_input), **found}
    if kind == "ParametricLIFNode":
        return {"class": PLIF, "decay_input": bool(node.decay_input), **found}
    raise UsageError(f"{_HERE}: {kind} has no equal here: {_GIVE}; known: IFNode, LIFNode, ParametricLIFNode")


def _surrogate(function: Any) -> Surrogate:
    kind, alpha = type(function).__name__, getattr(function, "alpha", None)
    if kind in ("ATan", "Sigmoid") and alpha is not None:
        return (ATan if kind == "ATan" else Sigmoid)(float(alpha))
    if kind == "Rect" and alpha is not None:
        return Rectangular(width=1 / float(alpha))
    raise UsageError(f"{_HERE}: surrogate {kind} has no equal here: {_GIVE}; known: ATan, Sigmoid, Rect")
