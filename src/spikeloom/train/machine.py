"""What results depend on besides settings: versions, the processor, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

Json = dict[str, Any]


def peak_memory() -> float | None:
    """The most memory that this process held so far, in MB: on a GPU of tensors, otherwise resident.

    None where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def environment() -> Json:
    """Versions and machine, as far as results depend on them."""
    import spikeloom
    from spikeloom.ops import _dispatch

    return {
        "spikeloom": spikeloom.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "native": None if _dispatch.native is None else _dispatch.native.level(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _commit() -> str | None:
    # Only of a checkout of Spikeloom itself, not of whatever repository it is installed in.
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or os.environ.get("GIT_DIR"):
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
