"""Where a run's curves go beside metrics.jsonl: TensorBoard, or another of accelerate's trackers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from accelerate import Accelerator, tracking

from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import read_json, write_json
from spikeloom.train.recipe import flatten
from spikeloom.train.run import Run

Json = dict[str, Any]
PROJECT = "spikeloom"


class Tracker(Protocol):
    """Takes the record of each epoch."""

    def write(self, record: Json) -> None: ...
    def close(self) -> None: ...


def check_tracker(name: str) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        UsageError: it is not; the message says what to install.
    """
    if name != "tensorboard" and name not in map(str, tracking.get_available_trackers()):
        raise UsageError(
            f"train.tracker={name} needs a package that is not installed: pip install {_PACKAGES.get(name, name)}"
        )


def open_tracker(run: Run, accelerator: Accelerator, epochs_done: int) -> Tracker:
    """The tracker that `train.tracker` names, which goes on where it was in a run that is resumed.

    Raises:
        UsageError: it does not start, or its files cannot be written.
    """
    if run.settings.train.tracker == "tensorboard":
        return _TensorBoard(run, epochs_done)
    return _Accelerated(run, accelerator)


def _curves(record: Json) -> Json:
    """`train_loss` as `train/loss`, by which trackers group."""
    return {key.replace("_", "/", 1): value for key, value in record.items() if key != "epoch" and value is not None}


class _TensorBoard:
    def __init__(self, run: Run, epochs_done: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        try:
            # purge_step hides what an interrupted run wrote beyond its checkpoint.
            self._writer = SummaryWriter(str(folder), purge_step=epochs_done + 1)
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror or error}; remove what is there") from None

    def write(self, record: Json) -> None:
        """Adds an epoch's record."""
        for key, value in _curves(record).items():
            self._writer.add_scalar(key, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class _Accelerated:
    """A tracker of accelerate. The run's tracker.json keeps its identity there, and so a resumed run goes on."""

    def __init__(self, run: Run, accelerator: Accelerator):
        from accelerate.tracking import filter_trackers

        name = run.settings.train.tracker
        accelerator.log_with = filter_trackers([name], str(run.folder))
        file = run.folder / "tracker.json"
        known = _known(file, name)
        identify, find = _IDENTITY.get(name, (lambda run, known: {}, lambda tracker: None))
        settings = {key: str(value) for key, value in flatten(run.settings.model_dump()).items() if value is not None}
        try:
            accelerator.init_trackers(PROJECT, config=settings, init_kwargs={name: identify(run, known)})
        except Exception as error:  # of the tracker's package: no server, no login
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"train.tracker={name} does not start: {reason}; or go on with tensorboard") from None
        found = find(accelerator.get_tracker(name, unwrap=True))
        if found is not None and found != known:
            write_json(file, {"tracker": name, "id": found})
        self._accelerator = accelerator

    def write(self, record: Json) -> None:
        """Logs an epoch's record."""
        self._accelerator.log(_curves(record), step=record["epoch"])

    def close(self) -> None:
        """Ends the tracker's run; accelerate does so at the end of training."""


def _known(file: os.PathLike[str], name: str) -> str | None:
    """The identity of a run at a tracker, if it has one."""
    if not os.path.exists(file):
        return None
    saved = read_json(file)
    if not isinstance(saved, dict) or not isinstance(saved.get("id"), str):
        raise DataFileError(f"{file} is not the identity of a run at a tracker: delete it to begin a new one there")
    return saved["id"] if saved.get("tracker") == name else None


def _mlflow(run: Run, known: str | None) -> Json:
    return {"run_name": run.folder.name} if known is None else {"run_id": known}


def _wandb(run: Run, known: str | None) -> Json:
    place = {"name": run.folder.name, "dir": str(run.folder)}
    return place if known is None else {**place, "id": known, "resume": "allow"}


def _trackio(run: Run, known: str | None) -> Json:
    return {"name": run.folder.name if known is None else known, "resume": "allow"}


# How a run is named at a tracker that can continue one, and where its identity stands afterwards.
_IDENTITY: dict[str, tuple[Callable[[Run, str | None], Json], Callable[[Any], str | None]]] = {
    "mlflow": (_mlflow, lambda active: active.info.run_id),
    "wandb": (_wandb, lambda run: run.id),
    "trackio": (_trackio, lambda run: run.name),
}
_PACKAGES = {"comet_ml": "comet-ml", "mlflow": "mlflow-skinny"}
