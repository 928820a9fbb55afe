"""Pages that need no network, filled in from the templates in `page/`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    sortable: bool = False


@dataclass(frozen=True)
class Plot:
    """A plotly figure as plain values, what it says in words, and its data as a table."""

    title: str
    words: str
    figure: Json
    table: Table
    square: bool = False


def fill(template: str, plots: bool, script: str | None = None, **values: Any) -> str:
    """A page that needs no network: its scripts and styles are inside, and no other script can run.

    Args:
        template: in the folder `page`.
        plots: whether it draws, for which it holds plotly.
        script: a script of its own, in the same folder.
        values: what the template names.
    """
    import jinja2

    files = resources.files("spikeloom.analyse.report") / "page"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (files / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    scripts = [(files / "report.js").read_text("utf-8")]
    if plots:
        from plotly.offline import get_plotlyjs

        scripts.insert(0, get_plotlyjs())
    if script is not None:
        scripts.append((files / script).read_text("utf-8"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    style = (files / "report.css").read_text("utf-8")
    return environment.get_template(template).render(scripts=scripts, hashes=hashes, style=style, **values)


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
