"""What a run's folder holds for its report, however broken, and what is measured for it once."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shlex
import sys
import time
import tomllib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from spikeloom.analyse.audit.api import Audit, audit
from spikeloom.analyse.audit.cost import count_cost, evaluating, steps_of
from spikeloom.analyse.confusion import Confusion, confusion
from spikeloom.analyse.load import Target, open_target
from spikeloom.analyse.report.raster import Raster, rasters
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, atomic, read_json
from spikeloom.record import RateMeter
from spikeloom.train.pretrain import Reconstructs
from spikeloom.train.recipe import Row, load_recipe, parse_overrides
from spikeloom.train.run import IMPORTED, Run, read_metrics
from spikeloom.train.settings import Settings

Json = dict[str, Any]
_FILES = ("settings.json", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoint.safetensors")
_AUDITED = 64  # test images
_T = TypeVar("_T")


class Work(Protocol):
    """Who is told how the measuring goes."""

    def work(self, what: str, total: int) -> None: ...
    def advance(self, count: int) -> None: ...


@dataclass(frozen=True)
class Measurements:
    """What is measured of a finished run for its report, kept as `report.json`.

    Attributes:
        weights: checksum of the weights that ran.
        data: what they ran on.
        audited: images of the audit.
        seconds: what it took.
        cost: parameters, MACs and FLOPs as `reproduce` counts them.
        rates: firing rates by layer.
        confusion, audit: None of a model without classes; or where `problems` says why.
        rasters: one an image.
        problems: what could not be measured, and why.
    """

    weights: str = ""
    data: str = ""
    audited: int = 0
    seconds: float = 0.0
    cost: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    confusion: Confusion | None = None
    audit: Audit | None = None
    rasters: tuple[Raster, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Plain values."""
        values = {key: value for key, value in vars(self).items() if key not in ("confusion", "audit", "rasters")}
        return {
            **values,
            "confusion": None if self.confusion is None else asdict(self.confusion),
            "audit": None if self.audit is None else self.audit.to_json(),
            "rasters": list(map(asdict, self.rasters)),
        }

    @classmethod
    def from_json(cls, values: Json) -> Measurements:
        """The measurements of which these are the `to_json`.

        Raises:
            KeyError, TypeError, ValueError, IndexError: they are of no measurements.
        """
        matrix, audited = values["confusion"], values["audit"]
        drawn: list[Json] = [
            {**r, "spikes": tuple((int(t), int(n)) for t, n in r["spikes"])} for r in values["rasters"]
        ]
        rasters = [Raster(**each) for each in drawn]
        plain: Json = {
            **values,
            "problems": tuple(map(str, values["problems"])),
            "rasters": tuple(rasters),
            "rates": {str(name): float(rate) for name, rate in values["rates"].items()},
            "audit": None if audited is None else Audit.from_json(audited),
            "confusion": None
            if matrix is None
            else Confusion(tuple(map(str, matrix["classes"])), tuple(tuple(map(int, row)) for row in matrix["counts"])),
        }
        found = cls(**plain)
        for raster in rasters:
            raster.tensor()
            base64.b64decode(raster.png, validate=True)
        return found


@dataclass
class RunData:
    """A run as far as its folder tells.

    Attributes:
        folder: as it was named.
        title: its recipe and row, or the folder's name.
        budget: its budget.
        run: None where the settings cannot be read.
        records: of its epochs.
        summary: empty of an unfinished run.
        environment: where it ran.
        measured: empty where nothing could be measured.
        about: title and paper of its recipe.
        row: of its recipe; None where the recipe is not there.
        full: the settings of the row's full budget.
        command: repeats the run; None where no single command does.
        problems: what is broken or missing, in words.
    """

    folder: Path
    title: str
    budget: str = ""
    run: Run | None = None
    records: list[Json] = field(default_factory=list)
    summary: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    measured: Measurements = Measurements()
    about: str = ""
    row: Row | None = None
    full: Settings | None = None
    command: str | None = None
    problems: list[str] = field(default_factory=list)

    def read(self, what: Callable[[], _T], default: _T) -> _T:
        """What a function returns, or the default and a problem."""
        try:
            return what()
        except (UsageError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self.problems.append(" ".join(str(error).split()) or type(error).__name__)
            return default


def gather_run(folder: PathLike, values: Json, work: Work) -> RunData:
    """Reads a run's folder, and measures what its report needs unless that was done before.

    Args:
        folder: of a run, perhaps unfinished or damaged.
        values: `data.*` and `images` (of the test part; all by default); with either, it is measured anew.
        work: is told how it goes.

    Raises:
        UsageError: the folder holds nothing of a run.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _FILES):
        raise UsageError(f"{folder} is not a run: it has no {_FILES[0]} and no other file of a run")
    found = RunData(folder, folder.name or str(folder))
    found.run = found.read(lambda: Run.open(folder), None)
    found.records = found.read(lambda: _records(folder, found.problems), [])
    found.summary = found.read(lambda: _summary(folder), {})
    run = found.run
    if run is not None:
        found.title, found.budget = str(run.title), str(run.budget)
        if not (folder / "summary.json").is_file():
            found.problems.append(
                f"unfinished: {len(found.records)} of {run.settings.train.epochs} epochs; "
                f"continue with: spikeloom train --resume {shlex.quote(str(folder))}"
            )
        found.environment = found.read(lambda: dict(read_json(folder / "settings.json")["environment"]), {})
        found.read(lambda: _origin(found, run), None)
        found.measured = found.read(lambda: _measurements(found, run, values, work), found.measured)
    found.problems += found.measured.problems
    return found


def _summary(folder: Path) -> Json:
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    if not isinstance(summary, dict):
        raise DataFileError(f"{path} is not the summary of a run")
    return summary


def _records(folder: Path, problems: list[str]) -> list[Json]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records = read_metrics(folder)
    whole = [{k: v if is_number(v) else None for k, v in record.items()} for record in records if record is not None]
    if len(whole) < len(records):
        missing = len(records) - len(whole)
        problems.append(f"{path}: {missing} of {len(records)} lines cannot be read and are left out")
    return whole


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be computed with: finite, and not too large for a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# --- where it comes from ----------------------------------------------------------------------------------------------


def _origin(found: RunData, run: Run) -> None:
    if run.recipe == IMPORTED:
        found.about = f"imported from {found.summary.get('imported_from', 'elsewhere')}"
        return
    recipe = load_recipe(run.recipe)
    found.full = recipe.resolve(run.row, "full")
    found.row, found.about = recipe.rows[run.row], f"{recipe.title} ({recipe.paper})"
    budget: Any = run.budget
    words = changes(recipe.resolve(run.row, budget).model_dump(), run.settings.model_dump())
    if not run.changes and recipe.resolve(run.row, budget, parse_overrides(words)) == run.settings:
        name = run.recipe if len(recipe.rows) == 1 else f"{run.recipe}#{run.row}"
        found.command = shlex.join(["spikeloom", "train", name, f"budget={run.budget}", *words])


def changes(base: Mapping[str, Any], target: Mapping[str, Any], path: str = "") -> list[str]:
    """The `key=value` words that make settings of others; keys that are only in `base` have none."""
    words: list[str] = []
    for key, value in target.items():
        old = base.get(key)
        if value == old:  # None stands for what is not there
            continue
        if isinstance(value, dict) and set(value) == {"name"}:
            words.append(f"{path}{key}={_toml(value['name'], bare=True)}")
        elif isinstance(value, dict):
            words += changes(old if isinstance(old, dict) else {}, value, f"{path}{key}.")
        else:
            words.append(f"{path}{key}={_toml(value, bare=True)}")
    return words


def _toml(value: Any, bare: bool = False) -> str:
    if isinstance(value, str):
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            if bare and re.fullmatch(r"[\w./~+-]+", value):
                return value
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if value is None:
        return _toml("none", bare)
    return json.dumps(value)


# --- what is measured -------------------------------------------------------------------------------------------------


def _measurements(found: RunData, run: Run, values: Json, work: Work) -> Measurements:
    if not run.weights.is_file():
        if found.summary:
            found.problems.append(f"there is no {run.weights.name}: nothing could be measured with it")
        return Measurements()
    path, weights = run.folder / "report.json", _checksum(run.weights)
    if not values and path.is_file():
        try:
            kept = Measurements.from_json(read_signed(path))
            if kept.weights == weights:
                return kept
        except (DataFileError, KeyError, TypeError, ValueError, IndexError, AttributeError):
            pass  # written by another version, or damaged: measured anew and replaced
    target = open_target(str(run.folder), {"images": 1 << 30, **values})
    measured = _measure(target, weights, work)
    try:
        write_signed(path, measured.to_json())
    except UsageError as error:
        found.problems.append(f"what was measured could not be kept: {error}")
    return measured


def write_signed(path: PathLike, values: Json) -> None:
    """Writes JSON with a checksum of it."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({**values, "crc32": _crc(values)}) + "\n")


def read_signed(path: PathLike) -> Json:
    """What `write_signed` wrote.

    Raises:
        DataFileError: the file is missing or damaged.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("crc32", None) != _crc(values):
        raise DataFileError(f"{path} is damaged: its checksum does not match its contents")
    return values


def _crc(values: Json) -> int:
    return zlib.crc32(json.dumps(values).encode())


def _checksum(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("crc32", "")
    except (SafetensorError, OSError, ValueError) as error:
        raise DataFileError(f"{path} is truncated or not a safetensors file: {str(error).splitlines()[0]}") from None


def _measure(target: Target, weights: str, work: Work) -> Measurements:
    start = time.monotonic()
    parts: Json = {"weights": weights, "data": target.data, "audited": min(target.images, _AUDITED)}
    problems: list[str] = []

    def part(name: str, compute: Callable[[], Any]) -> None:
        try:
            parts[name] = compute()
        except (UsageError, RuntimeError, ValueError) as error:
            problems.append(f"{name} could not be measured: {' '.join(str(error).split())}")

    work.work("measuring for the report", target.images)
    with RateMeter(target.model) as meter:
        if isinstance(target.model, Reconstructs):
            part("rates", lambda: _run(target))
        else:
            part("confusion", lambda: confusion(target.model, _ticking(target, work), target.classes))
        parts["rates"] = meter.rates()
    few = -(-_AUDITED // 32)
    part("audit", lambda: audit(target.model, itertools.islice(target.batches(), few)))
    part("rasters", lambda: rasters(target))
    if not isinstance(target.model, Reconstructs):  # it takes images, not steps
        part("cost", lambda: _cost(target))
    return Measurements(**parts, seconds=round(time.monotonic() - start, 3), problems=tuple(problems))


def _ticking(target: Target, work: Work) -> Any:
    for x, y in target.batches():
        yield x, y
        work.advance(len(y))


@torch.no_grad()
def _run(target: Target) -> None:
    with evaluating(target.model):
        for x, _ in itertools.islice(target.batches(), 2):
            target.model(x)


def _cost(target: Target) -> Json:
    steps = steps_of(target.model, next(target.batches())[0], target.sequence)
    cost = count_cost(target.model, target.input_shape, steps)
    return {"params_M": cost.parameters / 1e6, "macs_M": cost.macs / 1e6, "flops_M": cost.flops_s0 / 1e6}
