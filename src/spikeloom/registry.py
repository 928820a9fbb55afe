"""Names for things that recipes and the command line choose."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import Generic, TypeVar, cast

from spikeloom.errors import UsageError

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the known names most like it, or all of a few."""
    names = sorted(known)
    as_written = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), as_written, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(as_written[each] for each in close)}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown or 'none'}"


class Registry(Generic[Entry]):
    """Entries by name, in the order of their registration.

    Args:
        kind: what an entry is called in messages, such as "model".
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, entry: Registered, name: str | None = None) -> Registered:
        """Adds an entry under `name`, or its own `__name__`; usable as a decorator."""
        key = name or getattr(entry, "__name__", "")
        if not key or key in self._entries:
            raise ValueError(f"a {self.kind} named {key!r} cannot be registered: the name is empty or taken")
        # Typed as what came in, so that a decorated class keeps its own type.
        self._entries[key] = cast("Entry", entry)
        return entry

    def named(self, name: str) -> Callable[[Registered], Registered]:
        """The decorator form of `register` with a name."""
        return lambda entry: self.register(entry, name)

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}; {nearest(name, self._entries)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a shell pattern, sorted."""
        return sorted(fnmatch.filter(self._entries, pattern))


def list_recipes() -> list[str]:
    """Names of the recipes in the package, such as "report/table2"."""
    root = resources.files("spikeloom") / "recipes"
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.toml')}"
        for folder in root.iterdir()
        if folder.is_dir()
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    )


def recipe_text(name: str) -> str:
    """The TOML of a recipe of the package.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in (known := list_recipes()):
        raise UsageError(f"unknown recipe {name!r}; {nearest(name, known)}")
    return (resources.files("spikeloom") / "recipes" / f"{name}.toml").read_text()
