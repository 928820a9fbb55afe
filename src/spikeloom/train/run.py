"""A run's folder: what was asked for, how it went, and all that is needed to continue it.

settings.json            recipe, row, budget, settings, versions
metrics.jsonl            one line an epoch
tensorboard/             the same, for TensorBoard
checkpoint.safetensors   weights, optimiser and position of the last checkpoint
best.safetensors         weights of the best epoch so far, with data.validation
model.safetensors        the trained weights
summary.json             written at the end
report.html, report.json the page of `spikeloom report`, and what was measured for it
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spikeloom.errors import DataFileError, UsageError
from spikeloom.train.checkpoint import atomic, read_json, write_json
from spikeloom.train.recipe import Settings, check_settings

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run: its folder, and what decides its weights.

    Attributes:
        folder: its path.
        recipe, row, budget: where the settings come from.
        settings: all that decides the weights.
    """

    folder: Path
    recipe: str
    row: str
    budget: str
    settings: Settings

    @classmethod
    def plan(cls, folder: Path, recipe: str, row: str, budget: str, settings: Settings) -> Run:
        """A run that has not begun: nothing is written until `begin`, so that a mistake leaves nothing behind.

        Raises:
            UsageError: the folder exists with something in it.
        """
        run = cls(folder, recipe, row, budget, settings)
        with run._placing():
            if folder.exists() and any(folder.iterdir()):
                raise UsageError(f"{folder} is not empty: continue it with resume={folder}, or choose another run=PATH")
        return run

    def begin(self) -> None:
        """Makes the folder and writes the settings, unless the run has begun; clears what a killed process left.

        Raises:
            UsageError: the folder cannot be written.
        """
        with self._placing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        if not (self.folder / "settings.json").is_file():
            write_json(
                self.folder / "settings.json",
                {
                    "recipe": self.recipe, "row": self.row, "budget": self.budget,
                    "settings": self.settings.model_dump(), "environment": environment(),
                },
            )  # fmt: skip

    @contextlib.contextmanager
    def _placing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"cannot make the run folder {self.folder}: {error.strerror or error}; choose another with run=PATH"
            ) from None

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run.

        Raises:
            UsageError: the folder is no run.
        """
        if not (folder / "settings.json").is_file():
            raise DataFileError(f"{folder} is not a run: it has no settings.json")
        saved = read_json(folder / "settings.json")
        try:
            return cls(
                folder, saved["recipe"], saved["row"], saved["budget"],
                check_settings(saved["settings"], f"{folder / 'settings.json'}"),
            )  # fmt: skip
        except (KeyError, TypeError):
            raise DataFileError(f"{folder / 'settings.json'} is not the settings of a run") from None

    @property
    def title(self) -> str:
        """`report/table2#s0t2b`, or without the row where there is only one."""
        return self.recipe if self.row == "main" else f"{self.recipe}#{self.row}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def best(self) -> Path:
        """Weights of the best epoch on the validation part, while the run goes on."""
        return self.folder / "best.safetensors"

    def about_weights(self, dataset: Any) -> Json:
        """What a file of the run's weights says of them: the model, and for what data it was made."""
        made = {"in_channels": dataset.in_channels, "num_classes": len(dataset.classes)}
        return {"model": self.settings.model.model_dump(), "made_for": made}

    def summary(self) -> Json | None:
        """What the finished run measured, or None while it is unfinished."""
        path = self.folder / "summary.json"
        return read_json(path) if path.is_file() else None

    def metrics(self) -> list[Json]:
        """The records of the epochs so far; a last line cut short by a crash is left out."""
        return read_metrics(self.folder)

    def keep_metrics(self, epochs: int) -> None:
        """Drops the records of epochs that a resumed run will do again."""
        kept = [record for record in self.metrics() if record["epoch"] <= epochs]
        if (self.folder / "metrics.jsonl").is_file():
            with atomic(self.folder / "metrics.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def add_metrics(self, record: Json) -> None:
        """Appends one record."""
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UsageError(
                f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror or error}; "
                f"free some space and continue with resume={self.folder}"
            ) from None


def read_metrics(folder: Path) -> list[Json]:
    """The records of a run's epochs, up to the first line that is not JSON."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records: list[Json] = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


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
    from spikeloom.ops import dispatch

    return {
        "spikeloom": spikeloom.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "native": None if dispatch.native is None else dispatch.native.level(),
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
