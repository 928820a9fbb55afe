"""Measurements that recipes name: tables and figures that are computed, not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spikeloom.registry import Registry

Json = dict[str, Any]


@dataclass
class Measured:
    """What a measurement found.

    Attributes:
        values: single numbers and verdicts, set beside the published ones; None: these data cannot tell.
        tables: rows by the title of their table.
        figures: plotly figures by name, of which `reproduce` records the data.
    """

    values: dict[str, float | str | bool | None] = field(default_factory=dict)
    tables: dict[str, list[Json]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


MEASUREMENTS: Registry[Callable[..., Measured]] = Registry("measurement")
"""Functions from a recipe's options to what they found."""
