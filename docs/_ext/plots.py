"""plotly's figures in lessons: drawn by plotly's own script, which the site brings, on pages that have one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = 'class="plot"'


def _prepare(app: Any) -> None:
    """The profile of the kernels that run lessons, and plotly's script."""
    if app.builder.format != "html":
        return
    from plotly.offline import get_plotlyjs

    start = Path(app.srcdir) / "_build" / "ipython" / "profile_default" / "startup"
    start.mkdir(parents=True, exist_ok=True)
    (start / "00-figures.py").write_text((HERE / "figure_renderer.py").read_text())
    os.environ["IPYTHONDIR"] = str(start.parents[1])
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / "plotly.min.js").write_text(get_plotlyjs())


def _scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if MARK in context.get("body", ""):
        app.add_js_file("plotly.min.js")
        app.add_js_file("plots.js")


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", _prepare)
    app.connect("html-page-context", _scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
