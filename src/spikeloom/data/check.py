"""What is there of a data set: its files, its size beside the published one, and a few samples of each part."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikeloom.data.locate import Source, data_root
from spikeloom.data.picture import draw_sample
from spikeloom.data.registry import DATASETS, SOURCES, SPLITS, AnyDataset, create_dataset
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike

if TYPE_CHECKING:
    from PIL.Image import Image

_FEW = 3  # samples of a part that are loaded
_CHECKS = ("subset", "test_subset", "validation")  # a check is of whole parts


@dataclass(frozen=True)
class PartCheck:
    """A part of a data set.

    Attributes:
        samples: how many its files hold.
        published: how many there should be; None where no number is published.
        classes: how many of them have samples.
        fewest, most: samples of a class that has any.
        shape: of its first sample.
        low, high: of the values of the samples that were loaded.
        label: of the first sample.
    """

    samples: int
    published: int | None
    classes: int
    fewest: int
    most: int
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    label: str


@dataclass(frozen=True)
class DataCheck:
    """What `check_dataset` found.

    Attributes:
        name: of the data set.
        title: what messages call it.
        folder: that was looked in; None of a set without files.
        files: for each distribution, the files that it has by their names under the folder, and whether they are there.
        parts: the parts that load.
        published: samples of "train", "test" or "both".
        classes: published, or else found.
        errors: why a part does not load, by its name.
        picture: of a sample.
    """

    name: str
    title: str
    folder: Path | None
    files: list[dict[str, bool]]
    published: dict[str, int]
    classes: int
    parts: dict[str, PartCheck] = field(default_factory=dict[str, PartCheck])
    errors: dict[str, str] = field(default_factory=dict[str, str])
    picture: Image | None = None

    @property
    def usable(self) -> bool:
        """Whether every part loads."""
        return not self.errors

    def incomplete(self) -> list[str]:
        """The parts that hold another number of samples than published, in words."""
        held = {split: part.samples for split, part in self.parts.items()} | {
            "both": sum(part.samples for part in self.parts.values())
        }
        return [
            f"{split} {held[split]:,} of {count:,}"
            for split, count in self.published.items()
            if split in held and held[split] != count and self.usable
        ]


def check_dataset(name: str, root: PathLike | None = None, **options: Any) -> DataCheck:
    """Looks for a data set's files, counts its samples and loads a few of each part.

    Pictures and recordings are counted by their files' names; the frames of the few that are loaded are kept in the
    cache.

    Args:
        name, root: as `create_dataset`.
        options: of the data set, but for those that take a part of it.

    Raises:
        UsageError: an unknown name or option, or no root. What is wrong with files is in `errors`.
    """
    _ = DATASETS[name]  # an unknown name is said before anything else
    if taken := [key for key in _CHECKS if key in options]:
        raise UsageError(f"data.{taken[0]} has no place here: a check is of all samples; leave it out")
    source = SOURCES.get(name, Source(name, "see where it is registered"))
    folder = data_root(root, source) if source.layout else None
    parts: dict[str, PartCheck] = {}
    errors: dict[str, str] = {}
    picture, classes = None, source.classes or 0
    for split in SPLITS:
        try:
            few = _load_few(name, folder or root, split, options)
            parts[split] = _look(few, source.published.get(split))
            picture = picture or draw_sample(few)
        except DataFileError as error:
            errors[split] = str(error)
        else:
            classes = source.classes or max(classes, len(few.classes))
    files = source.found(folder) if folder else []
    return DataCheck(name, source.title, folder, files, dict(source.published), classes, parts, errors, picture)


def _load_few(name: str, root: PathLike | None, split: str, options: dict[str, Any]) -> AnyDataset:
    first = create_dataset(name, root, split, **options, subset=1)
    return create_dataset(name, root, split, **options, subset=min(_FEW, len(first.all_labels)))


def _look(few: AnyDataset, published: int | None) -> PartCheck:
    samples = [few[i] for i in range(len(few))]
    x, label = samples[0]
    counts = few.all_labels.unique(return_counts=True)[1]
    return PartCheck(
        samples=len(few.all_labels),
        published=published,
        classes=len(counts),
        fewest=int(counts.min()),
        most=int(counts.max()),
        shape=tuple(x.shape),
        dtype=str(x.dtype).removeprefix("torch."),
        low=min(float(each.min()) for each, _ in samples),
        high=max(float(each.max()) for each, _ in samples),
        label=few.classes[label],
    )
