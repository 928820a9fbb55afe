"""A user's own modules: models, neurons, data sets and losses that they register when they are imported.

An installed package names its module in the entry-point group `spikeloom.plugins`, and the command line imports it.
Any other module is named with `--import`. A run remembers these names, and nothing that a run names is imported
because of that: who continues or opens it names them again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from spikeloom.errors import UsageError

GROUP = "spikeloom.plugins"
_named: list[str] = []


def import_modules(names: Iterable[str]) -> None:
    """Imports modules by their names, also from the present folder, and notes them for the runs of this process.

    Raises:
        UsageError: a file instead of a module, no such module, or an error while one is imported.
    """
    for name in names:
        if name.endswith(".py") or os.sep in name:
            raise UsageError(
                f"--import takes a module's name, such as my_neurons, got {name}: leave out the folder and .py"
            )
        _import(name)
        if name not in _named:
            _named.append(name)


def _import(name: str) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` has it; last, so that a file there hides no installed package
    try:
        importlib.import_module(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"--import {name}: {reason}; it is looked for in {os.getcwd()} and among what is installed"
        ) from None


def load_installed() -> None:
    """Imports the modules of installed packages; one that fails is a warning, and what it registers is not there."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"the plugin {entry.name} ({entry.value}) cannot be imported: {reason}", stacklevel=2)


def named() -> list[str]:
    """The modules that were named with `--import` in this process."""
    return list(_named)


def saved_names(value: Any) -> tuple[str, ...]:
    """The modules that a run's settings remember."""
    if not (isinstance(value, Sequence) and all(isinstance(name, str) for name in value)):
        raise TypeError("imports must be a list of names")
    return tuple(value)


def require(names: Iterable[str], where: str) -> None:
    """Refuses what was made with a user's modules while these are not imported.

    Raises:
        UsageError: names the options that are missing.
    """
    missing = [name for name in names if name not in sys.modules]
    if missing:
        options = " ".join(f"--import {shlex.quote(name)}" for name in missing)
        raise UsageError(
            f"{where} was made with modules of your own: give {options} (or import them in Python); nothing that a "
            "run names is imported by itself"
        )
