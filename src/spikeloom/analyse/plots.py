"""Figures as data: JSON that is recorded beside numbers, and pages that are drawn from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spikeloom.errors import DataFileError
from spikeloom.files import PathLike, atomic, make_folder, read_json

Json = dict[str, Any]
FOLDER = "figures"  # beside the numbers, so that no reader of these takes figures for numbers
_DIGITS = 6  # significant ones, more than a plot shows


def figure_data(figure: Any) -> Json:
    """Series, and title and axes, of a plotly figure as `data` and `layout`: plotly's own JSON without the template.

    Floats are rounded to 6 significant digits; values that JSON cannot hold (NaN, infinite) become None, a gap.
    """
    layout = figure.layout.to_plotly_json()
    layout.pop("template", None)
    return {"data": [_plain(trace.to_plotly_json()) for trace in figure.data], "layout": _plain(layout)}


def write_figure(path: PathLike, figure: Any) -> None:
    """Records a plotly figure as `figure_data`, a line a series; makes the file's folder.

    Raises:
        UsageError: the file cannot be written.
    """
    found = figure_data(figure)
    data = ",\n".join(_text(trace) for trace in found["data"])
    make_folder(Path(path).parent)
    with atomic(path) as temporary:
        temporary.write_text(f'{{"data":[\n{data}\n],\n"layout":{_text(found["layout"])}}}\n')


def read_figure(path: PathLike) -> Any:
    """The plotly figure that `write_figure` recorded.

    Raises:
        DataFileError: the file is missing, damaged, or no figure.
    """
    import plotly.graph_objects as go

    found = read_json(path)
    if not isinstance(found, dict) or set(found) != {"data", "layout"}:
        raise DataFileError(f"{path} is no recorded figure: it needs the keys data and layout, and no others")
    try:
        return go.Figure(found).update_layout(template="plotly_white")
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataFileError(f"{path} is no figure that plotly can draw: {reason}") from None


def draw_figures(recorded: Iterable[PathLike], out: PathLike) -> list[Path]:
    """Draws recorded figures as HTML pages that need no network; all are read before the first is drawn.

    Args:
        recorded: files of `write_figure`.
        out: the folder where `<stem>.html` of each goes; made if it is not there.

    Returns:
        The pages.

    Raises:
        UsageError: a figure cannot be read, or a page cannot be written.
    """
    figures = {Path(out) / f"{Path(path).stem}.html": read_figure(path) for path in recorded}
    make_folder(out)
    for page, figure in figures.items():
        with atomic(page) as temporary:
            temporary.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
    return list(figures)


def _plain(value: Any) -> Any:
    """Values of a figure as JSON has them: lists for arrays, rounded floats, whole ones as integers."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
