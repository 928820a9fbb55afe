"""How the graph of a network sees the engine's values: which axes its tensors have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spikeloom.deploy.engine.ir import Value


@dataclass(frozen=True)
class View:
    """How the graph sees a value: its last axes are, channels first,

    map [C, H, W] · row [C, W] (H = 1) · vector [C] (one place) · tokens [C, L] · tokens.T [L, C] ·
    heads [h, d, L] · heads.T [h, L, d] · tokens.heads [L, h, d] · flat, features of a map in PyTorch's order.

    Before them stand [T, N], or T N as one axis; of a value that is the same at all steps also [1, N] or [N].
    """

    value: int
    form: str
    heads: int = 1

    @property
    def rank(self) -> int:
        ranks = {"map": 3, "row": 2, "vector": 1, "tokens": 2, "tokens.T": 2}
        return 3 if "heads" in self.form else ranks.get(self.form, 1)

    def sizes(self, value: Value) -> tuple[int, ...]:
        """The last axes of the tensors in the graph."""
        C, H, W = value.channels, value.height, value.width
        h, d, L = self.heads, C // self.heads, H * W
        return {
            "map": (C, H, W),
            "row": (C, W),
            "vector": (C,),
            "tokens": (C, L),
            "tokens.T": (L, C),
            "heads": (h, d, L),
            "heads.T": (h, L, d),
            "tokens.heads": (L, h, d),
            "flat": (C * L,),
        }[self.form]

    def to_map(self, x: Tensor, value: Value) -> Tensor:
        """A tensor [..., *sizes] of the graph as maps [..., H, W, C]."""
        lead = x.shape[: x.dim() - self.rank]
        if self.form == "flat":
            x = x.reshape(*lead, value.channels, -1)
        order = {"heads": (2, 0, 1), "heads.T": (1, 0, 2), "tokens.heads": (0, 1, 2), "tokens.T": (0, 1)}
        axes = order.get(self.form) or (*range(1, x.dim() - len(lead)), 0)
        n = len(lead)
        return x.permute(*range(n), *(n + axis for axis in axes)).reshape(*lead, *value.places, value.channels)


def plain(size: Any) -> Any:
    """A size of a traced tensor: a number where it is one for all inputs, else a symbol."""
    found: Any = size.node.expr if isinstance(size, torch.SymInt) else None
    return int(found) if found is not None and found.is_number else size


def same(size: Any, other: Any) -> bool:
    """Whether two sizes of traced tensors are the same for all inputs."""
    a, b = (one.node.expr if isinstance(one, torch.SymInt) else one for one in (plain(size), plain(other)))
    return bool(a == b)


def all_same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """`same` for every pair."""
    return len(sizes) == len(others) and all(map(same, sizes, others))
