"""What a trained network says of a user's own files, and what it costs to say it: `spikeloom predict`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikeloom import deploy
from spikeloom.analyse import audit
from spikeloom.bench.timing import medians
from spikeloom.data.own_files import own_files
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike
from spikeloom.record import RateMeter
from spikeloom.train.evaluate import load_classifier

_CALLS = 5  # timed, of which the median counts


@dataclass(frozen=True)
class Prediction:
    """The answer for one file.

    Attributes:
        file: its path, as it was given or found in a folder.
        label: the class of the largest mean logit over time.
        name: of this class.
        probability: of this class, by the softmax of the mean logits; trained networks tend to be surer than right.
        top: names and probabilities of the first classes, the most likely first.
        spikes: of all layers in all steps.
        energy_uJ: of this input, by the audit's rule "measured".
        ms: milliseconds by the engine, or by the network where the engine cannot run it.
        by: "engine" or "network".
    """

    file: str
    label: int
    name: str
    probability: float
    top: tuple[tuple[str, float], ...]
    spikes: int
    energy_uJ: float
    ms: float
    by: str


def predict(run: PathLike, files: Sequence[PathLike], top: int = 3) -> list[Prediction]:
    """Classifies files with a trained network.

    Args:
        run: the folder of a finished run, or `weights:NAME`.
        files: pictures, event recordings or sound, as `own_files` takes them for the run's data set; of a folder all
            files in it.
        top: how many classes to name.

    Returns:
        One prediction a file, in the order of the files.

    Raises:
        UsageError: the run is unfinished or does not classify, a file is missing or not readable, or it does not fit.
    """
    trained = load_classifier(run)
    paths, model, data = list(find_files(files)), trained.model, trained.run.settings.data
    dataset = own_files(data.name, data.options, paths, trained.num_classes, trained.summary.get("classes"))
    answers: list[Prediction] = []
    engine: Callable[[Tensor], Tensor] | None = None
    for index, path in enumerate(paths):
        x = dataset.encode(dataset.batch([index])[0])
        logits, spikes = _answer(model, x, f"{trained.run.title} cannot take {path}")
        run_once = functools.partial(engine := engine or _engine(model, x), x)
        with torch.no_grad():
            ms = medians({"run": run_once}, _CALLS)["run"]
        probabilities, order = logits.softmax(0).sort(descending=True, stable=True)
        names = [dataset.classes[label] for label in order.tolist()[:top]]
        answers.append(
            Prediction(
                file=str(path),
                label=int(order[0]),
                name=names[0],
                probability=float(probabilities[0]),
                top=tuple(zip(names, probabilities.tolist(), strict=False)),
                spikes=spikes,
                energy_uJ=audit(model, [(x, torch.zeros(1, dtype=torch.int64))]).energy_pj / 1e6,
                ms=ms,
                by="network" if engine is model else "engine",
            )
        )
    return answers


def find_files(names: Sequence[PathLike]) -> Iterator[Path]:
    """Files as they are named, and of folders what is in them, by name; hidden files are left out.

    Raises:
        UsageError: no such file, or an empty folder.
    """
    for name in names:
        path = Path(os.fspath(name))
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise DataFileError(f"{path}: a folder without files")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise DataFileError(f"{path}: no such file")


@torch.no_grad()
def _answer(model: nn.Module, x: Tensor, refusal: str) -> tuple[Tensor, int]:
    """The mean logits [classes] of one input over time, and the spikes of all layers."""
    try:
        with RateMeter(model) as meter:
            logits = model(x).float().mean(0)[0]
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{refusal} of shape {tuple(x.shape)}: {str(error).splitlines()[0]}") from None
    return logits, round(sum(meter.spikes().values()))


def _engine(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    try:
        return deploy.compile(model, x)
    except UsageError:
        return model
