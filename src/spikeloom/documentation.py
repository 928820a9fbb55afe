"""Where the documentation is: one setting, for messages and `spikeloom doctor`.

The site is built from docs/ and is not part of the package. Without an address, pages are named as files of the
repository; the environment variable SPIKELOOM_DOCS names a built site, such as https://example.org/spikeloom or
file:///home/me/spikeloom/docs/_build/html.
"""

from __future__ import annotations

import os
from types import TracebackType

ADDRESS = os.environ.get("SPIKELOOM_DOCS", "docs").rstrip("/")


def page(name: str, section: str = "") -> str:
    """The address of a page, such as "docs/training.md#recipes".

    Args:
        name: of the page, as in docs/, without its ending.
        section: the anchor of one of its headings.
    """
    ending = "html" if "://" in ADDRESS else "md"
    return f"{ADDRESS}/{name}.{ending}" + (f"#{section}" if section else "")


# What was being done, as the module that raises knows it; the first that fits counts.
PAGES = {
    "spikeloom.analyse.audit": ("measuring", "what-a-network-is-fed-and-what-it-costs"),
    "spikeloom.analyse.neurobench": ("measuring", "neurobench"),
    "spikeloom.analyse.report": ("measuring", "the-report-of-a-run"),
    "spikeloom.data.formats": ("events", "reading-a-recording"),
    "spikeloom.data.own_files": ("own-data", "what-is-an-error"),
    "spikeloom.data.recording_frames": ("deploying", "a-live-sensor"),
    "spikeloom.data.sets": ("own-data", "what-is-there-and-what-is-missing"),
    "spikeloom.deploy.engine": ("deploying", "the-event-engine"),
    "spikeloom.deploy.exchange.onnx": ("deploying", "onnx"),
    "spikeloom.deploy.exchange.nir": ("deploying", "nir"),
    "spikeloom.deploy.exchange": ("deploying", "exchange-formats"),
    "spikeloom.deploy.sensor": ("deploying", "a-live-sensor"),
    "spikeloom.models.spikingjelly": ("from-spikingjelly-and-snntorch", "weights"),
    "spikeloom.models.weight_matching": ("from-spikingjelly-and-snntorch", "weights"),
    "spikeloom.models.weight_source": ("weights", "what-weights-may-be"),
    "spikeloom.models.trained_weights": ("weights", "what-weights-may-be"),
    "spikeloom.play": ("deploying", "a-live-sensor"),
    "spikeloom.plugins": ("own-data", "models-neurons-and-data-sets-of-your-own-by-name"),
    "spikeloom.reproduce": ("training", "published-tables"),
    "spikeloom.sweep": ("training", "sweeps-and-comparisons"),
    "spikeloom.train.checkpoint": ("training", "interrupted-runs"),
    "spikeloom.train.methods": ("training", "methods-that-do-not-go-back-in-time"),
    "spikeloom.train.recipe": ("training", "recipes"),
    "spikeloom.train.run": ("training", "the-run-folder"),
    "spikeloom.train.sharding": ("scale", "models-that-are-too-large-for-one-device"),
}


def page_of(traceback: TracebackType | None) -> str:
    """The page on what was being done when an exception rose: of its innermost frame that has one, or ""."""
    found = ""
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        known = next((place for prefix, place in PAGES.items() if module.startswith(prefix)), None)
        found, traceback = page(*known) if known else found, traceback.tb_next
    return found
