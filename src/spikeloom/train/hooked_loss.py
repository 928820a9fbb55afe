"""Losses with a term for what happens inside a network, seen by hooks."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch import Tensor

from spikeloom.train.losses import Loss


class HookedLoss:
    """A loss with a term added for what hooks see of a model that is called between; used as a context.

    Args:
        loss: of a batch.
    """

    def __init__(self, loss: Loss):
        self._loss = loss
        self._handles: list[Any] = []
        self._sum, self._count = 0.0, 0

    def _hooks(self) -> list[Any]:
        """Registers the hooks, and returns their handles."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._handles = self._hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, value: Tensor) -> None:
        """Counts a value for `take`."""
        self._sum, self._count = self._sum + float(value.detach()), self._count + 1

    def take(self) -> float:
        """The mean of what was noted since it was last asked for."""
        mean, self._sum, self._count = self._sum / max(self._count, 1), 0.0, 0
        return mean
