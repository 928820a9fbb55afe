"""Settings from recipes and the command line, checked before they reach a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from spikeloom.errors import UsageError
from spikeloom.registry import nearest


class OptionError(UsageError):
    """A value that an option does not take.

    Args:
        name: of the option.
        limit: what its value must be, and is.
    """

    def __init__(self, name: str, limit: str):
        super().__init__(name, limit)
        self.name, self.limit = name, limit

    def __str__(self) -> str:
        return f"{self.name} {self.limit}"


def check_options(owner: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Checks options against a function's keyword-only parameters.

    Args:
        owner: whose options they are, for messages, such as "dataset 'mnist'".

    Raises:
        UsageError: an option the function does not take, or one it needs and does not get.
    """
    accepted = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in accepted:
            raise UsageError(f"{owner} has no option {name!r}; {nearest(str(name), accepted)}")
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"{owner} needs the option {name!r}")


def check_integer(name: str, value: object, low: int, high: int | None = None, why: str = "") -> None:
    """Checks that low <= value <= high.

    Raises:
        OptionError: the value is not an integer (a boolean is not one) or lies outside.
    """
    limit = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise OptionError(name, f"must be {limit}{why}, got {value!r}")
