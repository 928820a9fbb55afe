"""Short tables for notebooks: what `_repr_html_` of a result gives."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any


def html_table(caption: str, rows: Sequence[Sequence[Any]], head: Sequence[str] = (), most: int = 40) -> str:
    """A table as HTML, all text escaped, numbers to the right; the first cell of a row is its heading.

    Args:
        caption: stands above it.
        rows: cells, as they are printed.
        head: headings of the columns.
        most: rows that are shown; of more, a last one says how many.
    """
    lines = [f'<table><caption style="text-align: left">{html.escape(caption)}</caption>']
    if head:
        cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for first, *others in rows[:most]:
        cells = "".join(f'<td style="{_style(str(cell))}">{html.escape(str(cell))}</td>' for cell in others)
        lines.append(f'<tr><th scope="row">{html.escape(str(first))}</th>{cells}</tr>')
    if len(rows) > most:
        lines.append(f'<tr><td colspan="{len(rows[0])}">and {len(rows) - most} more</td></tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _style(cell: str) -> str:
    number = re.fullmatch(r"[-+]?\d[\d.,e+-]*( ?%)?", cell)
    return f"padding: 0 0.6em; text-align: {'right' if number else 'left'}"
