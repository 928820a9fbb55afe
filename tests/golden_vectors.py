"""Cases of the golden vectors: inputs, outputs and gradients computed with the original authors' code."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Golden:
    """Cases of the golden vectors: settings, tolerances and arrays as tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        with (folder / "manifest.csv").open(newline="") as file:
            self.rows = {row["id"]: row for row in csv.DictReader(file)}

    def case(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        row = self.rows[name]
        with np.load(self.folder / row["file"], allow_pickle=False) as arrays:
            case = {k.split("/", 1)[1]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(f"{name}/")}
        return json.loads(row["settings"]), case


def shared_folder() -> Path:
    return Path(os.environ.get("SPIKELOOM_SHARED", Path(__file__).parents[2] / "shared"))


def golden_cases(*files: str) -> list[str]:
    """Ids of the golden cases in some files; one id that skips, loudly, where they are not installed."""
    folder = shared_folder() / "golden" / "neurons"
    if not (folder / "manifest.csv").exists():
        return ["missing"]
    return [name for name, row in Golden(folder).rows.items() if row["file"].removesuffix(".npz") in files]
