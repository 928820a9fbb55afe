"""Where data files are, and what to say when they are not there."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from spikeloom.errors import DataFileError, UsageError


def data_root(root: str | os.PathLike[str] | None, title: str, source: str) -> Path:
    """The folder of data files: the argument, or SPIKELOOM_DATA."""
    place = root or os.environ.get("SPIKELOOM_DATA")
    if not place:
        raise UsageError(
            f"no folder to read {title} from: give it as data.root=FOLDER or in the environment variable "
            f"SPIKELOOM_DATA; if {title} is not there yet, {source}"
        )
    return Path(place).expanduser()


def missing(title: str, folder: Path, path: Path, source: str) -> DataFileError:
    """The error for a data set that is not in a folder."""
    return DataFileError(
        f"{title} is not in {folder}: no file {path}; give another folder as data.root=FOLDER or in SPIKELOOM_DATA, "
        f"or {source}"
    )


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
