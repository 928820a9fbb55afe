"""A page of ours in a browser, which the fixture `browser` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


class Opened:
    """A page, what it wrote to the console, and what it asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        self.page, self.said, self.asked = context.new_page(), list[str](), list[str]()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.resolve().as_uri())
        drawn = "[...document.querySelectorAll('.plot')].every(box => box.querySelector('.main-svg'))"
        self.until(drawn)

    def __call__(self, script: str) -> Any:
        return self.page.evaluate(script)

    def until(self, script: str) -> None:
        """Waits up to ten seconds; the page's own policy forbids Playwright's way, which evaluates in it."""
        for _ in range(200):
            if self(script):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never came true: {script}")
