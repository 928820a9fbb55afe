"""Arguments of constructors, checked in one wording, and inputs that neurons would take for silence."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a network also runs where there is no PyTorch
    from torch import Tensor

_KINDS: dict[float | None, str] = {None: "a finite number", 0: "a positive number"}


def number(name: str, value: Any, above: float | None = None, hint: str = "") -> float:
    """A finite number, greater than `above` if given, as a float.

    Raises:
        ValueError: it is none; the message has the name, the limit, the value and the hint.
    """
    if isinstance(value, Real) and math.isfinite(value):
        found = float(value)
        if above is None or found > above:
            return found
    kind = _KINDS.get(above) or f"greater than {above}"
    raise ValueError(f"{name} must be {kind}, got {_shown(value)}{hint and f'; {hint}'}")


def count(name: str, value: Any) -> int:
    """An integer of at least 1.

    Raises:
        ValueError: it is none; the message has the name and the value.
    """
    whole = type(value) is not bool and isinstance(value, Integral)
    if whole and int(value) >= 1:
        return value if isinstance(value, int) else int(value)  # `encode.Frames` stays what it is
    raise ValueError(f"{name} must be {'' if whole else 'an integer of '}at least 1, got {_shown(value)}")


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: it is neither, such as a number that was meant for another argument.
    """
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} is True or False, got {_shown(value)}")


def frames(name: str, side: int, x: Any) -> None:
    """Refuses frames [..., H, W] that are not `side` high and wide, as the network's argument `name` says.

    Raises:
        ValueError: they are not; the message has both sizes.
    """
    if tuple(x.shape[-2:]) != (side, side):
        raise ValueError(
            f"this network is made for frames of {side}x{side}, got {x.shape[-2]}x{x.shape[-1]}: set model.{name}, or "
            "the size of the data"
        )


def _shown(value: Any) -> str:
    """A value as a message can hold it, in one line: a tensor or an object by its type."""
    return repr(value) if isinstance(value, Real | str) or value is None else f"a {type(value).__name__}"


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers. One sum tells, unless it overflows."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())
