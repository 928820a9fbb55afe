"""The data sets by name: `spikeloom.data.sets` registers them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from spikeloom.data.frame_dataset import FrameDataset
from spikeloom.data.image_dataset import ImageDataset
from spikeloom.data.locate import Source
from spikeloom.data.options import check_options
from spikeloom.data.spike_dataset import SpikeDataset
from spikeloom.errors import UsageError
from spikeloom.registry import Registry, nearest

SPLITS = ("train", "test")
AnyDataset = ImageDataset | SpikeDataset | FrameDataset
DATASETS: Registry[Callable[..., AnyDataset]] = Registry("dataset")
"""Functions that open a data set, by the names that `create_dataset` takes."""
SOURCES: dict[str, Source] = {}
"""Of each data set, where its files come from and how they lie."""
Build = TypeVar("Build", bound=Callable[..., AnyDataset])


def register(source: Source) -> Callable[[Build], Build]:
    """Registers a data set in `DATASETS` under its function's name, and where it comes from in `SOURCES`."""

    def add(build: Build) -> Build:
        SOURCES[build.__name__] = source
        return DATASETS.register(build)

    return add


def create_dataset(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", **options: Any
) -> AnyDataset:
    """A data set by its name in `DATASETS`.

    Args:
        root: folder of data files; by default the environment variable SPIKELOOM_DATA. digits needs none.
        split: "train" or "test".
        options: as the function of that name takes them: subset, size, download, ...

    Raises:
        UsageError: unknown name, split or option, a value out of its limits, no root, or a failed download.
        DataFileError: a file is missing, truncated, corrupted or of another kind.
    """
    build = DATASETS[name]
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r} of dataset {name!r}; {nearest(str(split), SPLITS)}")
    check_options(f"dataset {name!r}", build, options)
    return build(root, split, **options)
