"""Weights of a network from elsewhere: its layers are matched with those of a model by order and shape, not by name."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikeloom.errors import UsageError
from spikeloom.models import snntorch
from spikeloom.models.weight_source import COUNTER, Layer, Source, layers_of

_SHOWN = 4


@dataclass(frozen=True)
class WeightMatch:
    """What `copy_weights` did.

    Attributes:
        matched: names in the source, each with the model's name of it.
        zeroed: biases of the model whose layer has none in the source; they are 0 now.
        source_left: names in the source that the model has no place for.
        model_left: names in the model that kept their values.
    """

    matched: dict[str, str]
    zeroed: tuple[str, ...]
    source_left: tuple[str, ...]
    model_left: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} tensors matched; left over in the source: {_names(self.source_left)}; left over in "
            f"the model: {_names(self.model_left)}"
        )


def copy_weights(source: Source | list[Layer], model: nn.Module, strict: bool = True) -> WeightMatch:
    """Fills a model with the weights of another network whose layers come in the same order.

    Convolutions, norms and linear layers are matched by their order and their shapes, and so are, by themselves, what
    neurons learn (PLIF's `w`). The order is that in which modules were made, the one of a state dict. A convolution or
    linear layer without a bias fills one that has it: the bias becomes 0. Neurons, strides and pools are not compared;
    but the constants of snnTorch's `Leaky`, which its state dicts hold, must be those of our neurons (`strict`).

    Args:
        source: a module, a state dict, or a safetensors or `torch.save` file of one, of which no code is run.
        model: is filled in place.
        strict: what is left over on either side is an error, and the model stays as it was; otherwise a warning.

    Returns:
        Which names were matched, and which are left over on either side.

    Raises:
        UsageError: names are left over or snnTorch's neurons are others (`strict`), or no layer fits.
        DataFileError: a file that cannot be read.
    """
    everything = source if isinstance(source, list) else layers_of(source, "copy_weights")
    constants = [layer for layer in everything if snntorch.is_neuron(layer)]
    given = [layer for layer in everything if not snntorch.is_neuron(layer)]
    if constants and strict:
        snntorch.check_neurons(constants, model)
    own = layers_of(model, "copy_weights")
    pairs = [
        pair
        for weighted in (True, False)  # modules of neurons stand in another order than those of layers
        for pair in _align([s for s in given if _weighted(s) == weighted], [o for o in own if _weighted(o) == weighted])
    ]
    copies: list[tuple[Tensor, Tensor | None]] = []
    matched: dict[str, str] = {}
    zeroed: list[str] = []
    for theirs, ours in pairs:
        for kind, target in ours.tensors.items():
            if kind in theirs.tensors:
                copies.append((target, theirs.tensors[kind]))
                matched[theirs.key(kind)] = ours.key(kind)
            elif kind == "bias" and "running_mean" not in ours.tensors:
                copies.append((target, None))
                zeroed.append(ours.key(kind))
    done = {*matched.values(), *zeroed}
    source_left = [s.key(k) for s in given for k in s.tensors if s.key(k) not in matched and k != COUNTER]
    model_left = [o.key(k) for o in own for k in o.tensors if o.key(k) not in done and k != COUNTER]
    found = WeightMatch(matched, tuple(zeroed), tuple(source_left), tuple(model_left))
    _check(found, given, own, strict)
    with torch.no_grad():
        for target, value in copies:
            target.zero_() if value is None else target.copy_(value.reshape(target.shape))
    return found


def _check(found: WeightMatch, given: list[Layer], own: list[Layer], strict: bool) -> None:
    if not found.matched:
        raise UsageError(
            f"no weights fit: the source begins with {_shapes(given)}, the model with {_shapes(own)}; give the network "
            "with the layers of the source"
        )
    if not (found.source_left or found.model_left):
        return
    if strict:
        raise UsageError(
            f"only part of the weights fits: {found}; build the model with the source's options (such as num_classes "
            "and in_channels); in Python, strict=False leaves these as they are"
        )
    warnings.warn(f"only part of the weights was taken: {found}", stacklevel=3)


def _align(given: list[Layer], own: list[Layer]) -> list[tuple[Layer, Layer]]:
    """The layers of equal shapes that come in the same order on both sides."""
    a, b = [layer.signature for layer in given], [layer.signature for layer in own]
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return [(given[i + n], own[j + n]) for i, j, size in blocks for n in range(size)]


def _weighted(layer: Layer) -> bool:
    return "weight" in layer.tensors


def _shapes(layers: list[Layer]) -> str:
    weighted = [layer for layer in layers if _weighted(layer)]
    return ", ".join(f"{x.key('weight')} {tuple(x.tensors['weight'].shape)}" for x in weighted[:2]) or "no weights"


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return shown or "none"
