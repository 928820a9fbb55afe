"""A part of a data set: some of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spikeloom.data.base import LabelledDataset
from spikeloom.data.options import check_integer
from spikeloom.errors import UsageError


class Part(LabelledDataset):
    """Some samples of a data set; all its other attributes are those of the whole.

    Args:
        whole: the data set.
        indices: int64 [N], the samples.
        title: what results are labelled with.
    """

    def __init__(self, whole: Any, indices: Tensor, title: str):
        self.whole, self.indices, self.title = whole, indices, title
        self.labels = whole.labels[indices]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.whole.input_shape

    def encode(self, x: Tensor) -> Tensor:
        """As the whole data set encodes."""
        return self.whole.encode(x)

    def batch(self, indices: Sequence[int]) -> Any:
        """A batch, as the whole data set gives it."""
        return self.whole.batch(self.indices[torch.as_tensor(indices)].tolist())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "whole":  # not there yet while an object is unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)


def stratified(labels: Tensor, share: float, seed: int, least: int = 0) -> Tensor:
    """Which samples a random share of every class holds, bool [N].

    Args:
        labels: int64 [N].
        share: of every class, rounded to whole samples.
        seed: of the choice, which depends on the labels and the share alone beside it.
        least: samples of every class that are held at least, and left at least.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        held[members[: min(max(round(share * len(members)), least), len(members) - least)]] = True
    return held


def hold_out(whole: Any, share: float) -> tuple[Part, Part]:
    """Splits a training part into one to train on and one to validate on, each class by the same share.

    The split depends on the data and the share alone: runs with different seeds validate on the same samples.

    Args:
        whole: a data set with `labels` [N].
        share: of every class that is held out, between 0 and 1.

    Raises:
        UsageError: one of the two would be empty, or the data set holds several environments.
    """
    if getattr(whole, "environments", 1) > 1:
        raise UsageError(f"data.validation cannot split {whole.title}: it holds several environments; leave it out")
    labels = torch.as_tensor(whole.labels)
    held = stratified(labels, share, 0)
    if not 0 < int(held.sum()) < len(held):
        raise UsageError(f"data.validation={share} leaves one side of the {len(held)} samples of {whole.title} empty")
    percent = f"{100 * share:.3g} %"
    return (
        Part(whole, (~held).nonzero().flatten(), f"{whole.title} without {percent} for validation"),
        Part(whole, held.nonzero().flatten(), f"{percent} of {whole.title}"),
    )


def chosen(title: str, count: int, subset: int | None) -> tuple[list[int], str]:
    """Which recordings to take: all, or `subset` of them evenly spread over the sorted ones, so over the classes.

    Returns:
        their indices, and the title that results carry.
    """
    if subset is None:
        return list(range(count)), title
    check_integer("subset", subset, 1, count, f", the number of samples of {title}")
    if subset == count:
        return list(range(count)), title
    return [i * count // subset for i in range(subset)], f"{title}, {subset} of {count} recordings"
