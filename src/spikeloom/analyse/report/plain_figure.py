"""A plotly figure as plain values, which the report's page draws in its own looks."""

from __future__ import annotations

import json
from typing import Any

Json = dict[str, Any]


def plain_figure(figure: Any) -> Json:
    """A figure as plain values, without the title and the looks, which are the page's."""
    values = json.loads(figure.to_json())
    for key in ("template", "title"):
        values["layout"].pop(key, None)
    return _literal(values)


def _literal(value: Any, key: str = "") -> Any:
    """Names of classes, layers and runs as they are: plotly would read tags and entities in them."""
    if isinstance(value, dict):
        return {k: _literal(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(each, key) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")  # a screen shows no more, and the page is smaller
    if isinstance(value, str) and not key.endswith("template"):
        return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return value
