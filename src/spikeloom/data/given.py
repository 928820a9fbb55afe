"""Data sets of PyTorch, the user's own, as the training loop reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from spikeloom.data.base import LabelledDataset, Sample, collate
from spikeloom.errors import UsageError


class _OfTorch(LabelledDataset):
    """What both kinds of data sets have: a user's data set, described by its first sample."""

    name = "given"

    def __init__(self, dataset: Any, title: str, is_sequence: bool, first: Sample):
        self._dataset, self.title, self.is_sequence = dataset, title, is_sequence
        self._shape = tuple(first[0].shape)
        self.in_channels = self.input_shape[0]
        self.fill = torch.zeros(self.in_channels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._shape[1:] if self.is_sequence else self._shape

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] as they are, sequences [B, T, ...] as [T, B, ...]."""
        return x.transpose(0, 1) if self.is_sequence else x


class GivenDataset(_OfTorch):
    """A map-style data set of samples (x, y): x an image [C, H, W], or a sequence [T, ...]; y the index of a class.

    Args:
        dataset: of the user's; `__getitems__`, `classes`, and `targets` or `labels` are used where it has them.
        part: "train" or "test", for messages and titles.
        is_sequence: whether samples are sequences.
        classes: their names, or how many; without them the data set's own, or as many as there are labels.

    Raises:
        UsageError: no samples, or samples of another kind.
    """

    def __init__(self, dataset: Any, part: str, is_sequence: bool, classes: Sequence[str] | int | None):
        if not len(dataset):
            raise UsageError(f"the {part} set has no samples")
        first = _checked(dataset[0], part, is_sequence)
        super().__init__(dataset, f"{type(dataset).__name__} ({part})", is_sequence, first)
        self._labels: Tensor | None = None
        self.classes = _class_names(classes, dataset, lambda: int(self.labels.max()) + 1)

    @property
    def labels(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """int64 [N]; where the data set does not list them, every sample is read once."""
        if self._labels is None:
            known = getattr(self._dataset, "targets", getattr(self._dataset, "labels", None))
            found = [int(self._dataset[i][1]) for i in range(len(self))] if known is None else known
            self._labels = torch.as_tensor(found).to(torch.int64)
        return self._labels

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs float32 [B, ...] and labels int64 [B]."""
        wanted = [int(i) for i in indices]
        read = getattr(self._dataset, "__getitems__", None)
        return _batch([self._dataset[i] for i in wanted] if read is None else read(wanted))


class StreamedDataset(_OfTorch):
    """The training part from an iterable data set: an epoch is as many of its samples as are asked for.

    Samples come in the stream's own order; a stream that ends begins again. A run that is resumed inside an epoch reads
    the samples before once more and leaves them out, so it is the same run if the stream is.

    Args:
        dataset: of samples as of `GivenDataset`; if it has a `set_epoch`, that is called when an epoch begins.
        samples: of an epoch.
        is_sequence, classes: as `GivenDataset`; the number of classes must be known.
    """

    def __init__(self, dataset: Any, samples: int, is_sequence: bool, classes: Sequence[str] | int | None):
        self._samples = samples
        self._epoch, self._position = 0, -1
        self._stream = _endless(dataset, 0)
        first = _checked(next(self._stream), "train", is_sequence)
        super().__init__(dataset, f"{type(dataset).__name__}, {samples} samples an epoch", is_sequence, first)
        self.classes = _class_names(classes, dataset, None)

    @property
    def labels(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise UsageError(
            "labels of a stream are not known before it is read: leave out validation and class_weights='balanced'"
        )

    def __len__(self) -> int:
        return self._samples

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, which is the stream's; the next batch is of this epoch."""
        self._epoch, self._position = epoch, -1
        return torch.arange(self._samples)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The samples at some positions of the epoch, which rise from call to call; samples between are left out."""
        first = int(indices[0])
        if not 0 <= self._position <= first:
            self._stream, self._position = _endless(self._dataset, self._epoch), 0
        for _ in range(first - self._position):
            next(self._stream)
        found = [next(self._stream) for _ in indices]
        self._position = first + len(found)
        return _batch(found)


def _endless(dataset: Any, epoch: int) -> Iterator[Any]:
    """The samples of an iterable data set from the beginning of an epoch on, again and again."""
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    while True:
        empty = True
        for sample in dataset:
            empty = False
            yield sample
        if empty:
            raise UsageError("the train set has no samples")


def given(
    dataset: Any, part: str, is_sequence: bool, classes: Sequence[str] | int | None, samples: int | None = None
) -> LabelledDataset:
    """A user's data set as the training loop reads it.

    Args:
        dataset: map-style or iterable. The test part of an iterable one is read once and kept.
        part: "train" or "test".
        is_sequence, classes: as `GivenDataset`.
        samples: of an epoch, of an iterable training part.

    Raises:
        UsageError: it cannot be read as such a data set.
    """
    if isinstance(dataset, LabelledDataset):
        return dataset
    iterable = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    if not iterable:
        return GivenDataset(dataset, part, is_sequence, classes)
    if not isinstance(dataset, Iterable):
        raise UsageError(f"the {part} set must be a PyTorch data set of pairs (x, y), got {type(dataset).__name__}")
    if part != "train":
        return GivenDataset(list(dataset), part, is_sequence, classes)
    if samples is None:
        raise UsageError("an iterable train set has no length: say how many samples make an epoch, epoch_samples=N")
    return StreamedDataset(dataset, samples, is_sequence, classes)


def _checked(sample: Any, part: str, is_sequence: bool) -> Sample:
    """A sample, if it is one."""
    wanted = "a sequence [T, ...]" if is_sequence else "an image [C, H, W]"
    if not (isinstance(sample, tuple | list) and len(sample) == 2 and isinstance(sample[0], Tensor)):
        raise UsageError(f"samples of the {part} set must be pairs (x, y) of {wanted} as a tensor and a class's index")
    x, y = sample
    if not x.is_floating_point():
        raise UsageError(f"x of the {part} set must be of a floating-point type, got {x.dtype}: divide pixels by 255")
    if x.dim() < 2 if is_sequence else x.dim() != 3:
        hint = "" if is_sequence else "; of sequences give sequences=True"
        raise UsageError(f"x of the {part} set must be {wanted}, got shape {tuple(x.shape)}{hint}")
    return x, int(y)


def _batch(samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    return collate([(x.float(), int(y)) for x, y in samples])


def _class_names(classes: Sequence[str] | int | None, dataset: Any, count: Callable[[], int] | None) -> list[str]:
    """The names of the classes: those that are given, the data set's own, or numbers as far as `count` finds them."""
    known = getattr(dataset, "classes", None) if classes is None else classes
    if known is None:
        if count is None:
            raise UsageError("the classes of a stream are not known before it is read: give classes=N or their names")
        known = count()
    return [str(i) for i in range(known)] if isinstance(known, int) else [str(name) for name in known]
