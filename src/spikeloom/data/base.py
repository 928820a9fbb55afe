"""What every data set is: labelled inputs, read one by one or as whole batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Sample = tuple[Tensor, int]


class LabelledDataset(Dataset[Sample]):
    """Labelled inputs. A loader needs no `collate_fn`: its batches [B, ...] become a model's input by `encode`.

        for x, y in DataLoader(dataset, batch_size=32, shuffle=True):
            logits = model(dataset.encode(x))  # [T, B, classes]

    Attributes:
        labels: int64 [N], an index into `classes` each.
        all_labels: int64, of everything that the files hold, of which `subset` takes a part.
        name: the name in `DATASETS`.
        title: what results are labelled with.
        classes: their names.
        is_sequence: whether `encode` makes sequences [T, B, ...]; otherwise it makes images [B, C, H, W].
        in_channels: of one input at one step.
    """

    labels: Tensor
    all_labels: Tensor
    name: str
    title: str
    classes: list[str]
    is_sequence: bool
    in_channels: int

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs float32 [B, ...] and labels int64 [B] of some indices."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """What a model takes, from the inputs of a batch, augmented or not."""
        raise NotImplementedError

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one input at one step, as a model sees it."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """One input, float32, and its label."""
        x, y = self.batch([index])
        return x[0], int(y[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of some indices, read at once: what a loader asks for."""
        x, y = self.batch(indices)
        return list(zip(x, y.tolist(), strict=True))

    def __repr__(self) -> str:
        kind = "sequences" if self.is_sequence else "images"
        shape = "x".join(map(str, self.input_shape))
        steps = " a step" if self.is_sequence else ""
        return (
            f"{type(self).__name__}({self.title}: {len(self):,} {kind} of {shape}{steps}, {len(self.classes)} classes)"
        )


class _Whole(Dataset[tuple[Tensor, Tensor]]):
    """A data set whose items are batches, by their indices."""

    def __init__(self, dataset: LabelledDataset):
        self._dataset = dataset

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self._dataset.batch(index)


def batches(dataset: LabelledDataset, order: Iterable[Sequence[int]]) -> DataLoader[tuple[Tensor, Tensor]]:
    """The batches x and y of a data set that have these indices, read whole: without a copy of each input."""
    return DataLoader(_Whole(dataset), batch_size=None, sampler=order)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Samples to a batch x and y, as a loader's own `collate_fn` does."""
    x, y = zip(*samples, strict=True)
    return torch.stack(x), torch.tensor(y)
