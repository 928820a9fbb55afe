"""The state of an optimiser as tensors and JSON, which a checkpoint can hold."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Json = dict[str, Any]


def pack_optimizer(state: Json) -> tuple[dict[str, Tensor], Json]:
    """Splits an optimizer's `state_dict` into tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Json] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def unpack_optimizer(tensors: dict[str, Tensor], information: Json) -> Json:
    """The inverse of `pack_optimizer`."""
    state: dict[int, Json] = {int(index): dict(values) for index, values in information["plain"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": information["groups"]}
