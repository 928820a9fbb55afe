"""Links that leave docs/ work on the pages of a repository; here they become pages of the site, or names of files."""

from __future__ import annotations

import re
from typing import Any

PAGES = {"../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md", "../README.md": "index.md"}
LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")


def _resolved(app: Any, name: str, source: list[str]) -> None:
    depth = name.count("/")

    def replace(link: re.Match[str]) -> str:
        text, up, path, anchor = link[1], link[2].count("../"), link[3], link[4] or ""
        if up <= depth:
            return link[0]  # inside of docs/
        page = PAGES.get(f"../{path}")
        return f"[{text}]({'../' * depth}{page}{anchor})" if page else f"{text} (`{path}`)"

    source[0] = LINK.sub(replace, source[0])


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _resolved)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
