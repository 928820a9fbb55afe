"""Where data files are, and what to say when they are not there."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spikeloom.documentation import page
from spikeloom.errors import DataFileError, UsageError


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, how its files lie under data.root, and how much it holds.

    Args:
        title: what messages call it.
        get: how to get it, with the page to get it from; the end of a message.
        layout: its files under data.root, `<...>` standing for any name; one of these distributions is enough.
        published: samples of "train" and "test", or of "both" where it is published without a split.
        classes: published.
    """

    title: str
    get: str
    layout: tuple[tuple[str, ...], ...] = ()
    published: Mapping[str, int] = field(default_factory=dict[str, int])
    classes: int | None = None

    def found(self, root: Path) -> list[dict[str, bool]]:
        """Which files of each distribution are in a folder; one match is enough for a name that stands for many."""
        return [{path: _matches(root, path) for path in paths} for paths in self.layout]

    def is_in(self, root: Path) -> bool:
        """Whether a folder has a file for each line of a distribution."""
        return any(all(files.values()) for files in self.found(root))


def _matches(root: Path, path: str) -> bool:
    return any(found.is_file() for found in root.glob(re.sub("<[^>]*>", "*", path)))


def data_root(root: str | os.PathLike[str] | None, source: Source) -> Path:
    """The folder of data files: the argument, or SPIKELOOM_DATA."""
    place = root or os.environ.get("SPIKELOOM_DATA")
    if not place:
        raise UsageError(
            f"no folder to read {source.title} from: give it as data.root=FOLDER or in the environment variable "
            f"SPIKELOOM_DATA; if {source.title} is not there yet, {source.get} "
            f"(see {page('own-data', 'what-is-there-and-what-is-missing')})"
        )
    return Path(place).expanduser()


def missing(source: Source, folder: Path, path: Path, found: str = "") -> DataFileError:
    """The error for a data set that is not in a folder.

    Args:
        source: the data set.
        folder: data.root.
        path: a file that is expected.
        found: what is there instead.
    """
    above = folder.absolute().parent
    if not source.is_in(folder) and source.is_in(above):
        fix = f"it is in the folder above, data.root={above}"
    else:
        fix = f"give another folder as data.root=FOLDER or in SPIKELOOM_DATA, or {source.get}"
    return DataFileError(f"{source.title} is not in {folder}: no file {path}{found}; {fix}")


def fetch_with_tonic(name: str, folder: Path, **options: object) -> None:
    """Downloads a data set into folder/<name> by making tonic's data set of that name.

    Raises:
        UsageError: tonic is not installed, or the download failed.
    """
    try:
        datasets = importlib.import_module("tonic.datasets")
    except ImportError:
        raise UsageError("data.download=true for event data needs tonic: pip install 'spikeloom[events]'") from None
    try:
        getattr(datasets, name)(str(folder), **options)
    except Exception as error:  # what a network, a proxy, a disk and an archive can do has no common class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{name} could not be downloaded into {folder}: {reason}") from error
