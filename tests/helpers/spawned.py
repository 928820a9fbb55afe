"""What runs in a spawned process: by a name that the process can import, however pytest was called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SMALL: dict[str, dict[str, Any]] = {
    "sew_resnet_cifar": {"n": 1},
    "spikformer_v2_2_64": {"depth": 1},
    "ds_resnet14": {},
    "syna_resnet18": {"T": 2},
}


def described(model: nn.Module) -> dict[str, Any]:
    """Its modules and tensors by their names."""
    return {name: type(module).__name__ for name, module in model.named_modules()} | {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }


def run_them(models: dict[str, nn.Module], x: Tensor, file: Path) -> None:
    """In the new process: the first models say what they are, the small ones what they make of x."""
    whole, small = (list(models)[: -len(SMALL)], list(models)[-len(SMALL) :])
    found = {"described": [described(models[name]) for name in whole]}
    with torch.no_grad():
        found["logits"] = [models[name].eval()(x) for name in small]
    torch.save(found, file)
