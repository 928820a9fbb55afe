"""Folding norms into the convolutions before them (Spikingformer, document 004, appendix B)."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
Linear = nn.Conv1d | nn.Conv2d | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d


def fold(model: Model) -> Model:
    """A copy in eval mode whose norms are part of the convolutions and linear layers right before them.

        y = gamma (w x + b - mu) / sqrt(var + eps) + beta = W x + B,
        W = w a,  B = a b + c,  a = gamma / sqrt(var + eps),  c = beta - gamma mu / sqrt(var + eps)

    per output channel, with the running statistics; padding with zeros stays exact, because the norm comes after it.
    A folded norm is replaced by `nn.Identity`, a convolution without bias gets one. Norms that do not stand right
    behind a convolution of as many channels stay as they are.

    Args:
        model: of layers that are registered in the order in which they run, as all models here are.
    """
    folded = copy.deepcopy(model).eval()
    for layer_name, norm_name in pairs(folded):
        layer, norm = folded.get_submodule(layer_name), folded.get_submodule(norm_name)
        assert isinstance(layer, Linear)
        assert isinstance(norm, Norm)
        scale, shift = affine(norm)
        with torch.no_grad():
            weight, dtype = layer.weight.double(), layer.weight.dtype
            bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
            layer.weight.copy_(weight * scale.view(-1, *(1,) * (weight.dim() - 1)))
            layer.bias = nn.Parameter((scale * bias + shift).to(dtype), requires_grad=layer.weight.requires_grad)
        parent, _, own = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), own, nn.Identity())
    return folded


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions and linear layers that a norm follows, each with that norm's."""
    found: list[tuple[str, str]] = []
    last: tuple[str, int] | None = None
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            last = (name, module.weight.shape[0])
        elif isinstance(module, Norm):
            if last is not None and last[1] == module.num_features:
                found.append((last[0], name))
            last = None
        elif not any(True for _ in module.children()):
            last = None  # something else stands between
    return found


def affine(norm: Norm) -> tuple[Tensor, Tensor]:
    """(a, c) of a norm in eval mode, which is `a x + c` in every channel; float64, [C] each.

    Asked of the norm itself, so that it holds for every kind of batch norm.
    """
    exact = copy.deepcopy(norm).double().eval()
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=norm.running_mean.device)  # pyright: ignore
    with torch.no_grad():
        # As a sequence of one step: [T = 1, N = 2, C, 1, 1] of time-first norms.
        values = exact(ends.view(1, 2, 1, 1, 1).expand(1, 2, norm.num_features, 1, 1)).flatten(0, 1).flatten(1)
    return values[1] - values[0], values[0]
