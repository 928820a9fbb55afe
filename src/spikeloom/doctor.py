"""What this installation and machine can do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import spikeloom
from spikeloom.data import SOURCES
from spikeloom.documentation import page
from spikeloom.ops import _dispatch
from spikeloom.ops._bf16 import bfloat16_is_emulated
from spikeloom.train.machine import environment


def examine() -> dict[str, Any]:
    """Versions, backends, threads and data, in the order in which a person would ask."""
    found = environment()
    found["installed in"] = str(Path(spikeloom.__file__).parent)
    if _dispatch.native is None:
        found["native"] = "missing: built without a C++ compiler; neurons run on the plain PyTorch reference, slower"
    else:
        found["native"] = f"{_dispatch.native.level()} (of {', '.join(_dispatch.native.levels())})"
        found["OpenMP"] = (
            "shared with PyTorch" if _shares_openmp() else "a second pool: expect slower steps; is torch loaded first?"
        )
    found["backend on cpu"] = _dispatch.choose("scan", torch.zeros(1), (torch.float32,))
    found["bfloat16 on cpu"] = (
        "no instructions for it: sums are float32, what is kept is bfloat16" if bfloat16_is_emulated() else "yes"
    )
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "not found"
    found["documentation"] = page("index")
    root = os.environ.get("SPIKELOOM_DATA")
    found["SPIKELOOM_DATA"] = root or "not set: give data.root=PATH to commands that need data"
    if root:
        published = {name: source for name, source in SOURCES.items() if source.classes and source.layout}
        names = [name for name, source in published.items() if source.is_in(Path(root))]
        found["data found"] = ", ".join(names) or "none"
    return {key: "unknown" if value is None else value for key, value in found.items()}


def _shares_openmp() -> bool:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return _dispatch.native.openmp_threads() == 1
    finally:
        torch.set_num_threads(threads)
