"""Run by each kernel that computes a lesson: figures become HTML that the site's own script draws."""

import html
import json

import plotly.io
from plotly.io.base_renderers import MimetypeRenderer


class SiteRenderer(MimetypeRenderer):
    """A figure as `<figure role="img" aria-label=...>` with its data as JSON.

    The label is `figure.layout.meta["alt"]`, or else the title.
    """

    def to_mimebundle(self, fig_dict: dict) -> dict[str, str]:
        layout = fig_dict.get("layout", {})
        meta = layout.get("meta")
        title = layout.get("title")
        alt = meta.get("alt") if isinstance(meta, dict) else None
        alt = alt or (title.get("text") if isinstance(title, dict) else title) or "A figure"
        layout.pop("template", None)  # the page's script gives its own, of its colours
        height = layout.get("height", 420)
        data = json.dumps(fig_dict).replace("</", "<\\/")
        figure = (
            f'<figure class="plot" role="img" aria-label="{html.escape(str(alt))}" style="min-height:{height}px">'
            f'<script type="application/json">{data}</script></figure>'
        )
        return {"text/html": figure}


plotly.io.renderers["site"] = SiteRenderer()
plotly.io.renderers.default = "site"
