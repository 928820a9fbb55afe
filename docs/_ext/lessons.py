"""Lessons in docs/lessons can be downloaded as notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext

FOLDER = "lessons/"


def _link(app: Any, name: str, source: list[str]) -> None:
    if not name.startswith(FOLDER) or "kernelspec:" not in source[0]:
        return
    head, title, body = source[0].partition("\n# ")
    heading, _, rest = body.partition("\n")
    file = f"{Path(name).name}.ipynb"
    link = f'<p class="download"><a href="{file}" download>Download this lesson as a notebook</a></p>'
    source[0] = f"{head}{title}{heading}\n\n```{{raw}} html\n{link}\n```\n{rest}"


def _write(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for page in sorted((Path(app.srcdir) / FOLDER).glob("*.md")):
        if "kernelspec:" in page.read_text():
            target = Path(app.outdir) / FOLDER / f"{page.stem}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            jupytext.write(jupytext.read(page), target)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
