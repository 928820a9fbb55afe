"""Where the documentation is: one setting, for messages and `spikeloom doctor`.

The site is built from docs/ and is not part of the package. Without an address, pages are named as files of the
repository; the environment variable SPIKELOOM_DOCS names a built site, such as https://example.org/spikeloom or
file:///home/me/spikeloom/docs/_build/html.
"""

from __future__ import annotations

import os

ADDRESS = os.environ.get("SPIKELOOM_DOCS", "docs").rstrip("/")


def page(name: str, section: str = "") -> str:
    """The address of a page, such as "docs/training.md#recipes".

    Args:
        name: of the page, as in docs/, without its ending.
        section: the anchor of one of its headings.
    """
    ending = "html" if "://" in ADDRESS else "md"
    return f"{ADDRESS}/{name}.{ending}" + (f"#{section}" if section else "")
