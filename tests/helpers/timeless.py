"""Records of epochs without what differs from run to run: how long they took."""

from __future__ import annotations

from typing import Any


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records less their times and speeds."""
    return [
        {key: value for key, value in record.items() if key != "seconds" and not key.endswith("_per_s")}
        for record in records
    ]
