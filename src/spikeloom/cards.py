"""Trained networks to share: their weights in fewer bytes, and a card that says what they are and what they do."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikeloom import deploy
from spikeloom.analyse import audit
from spikeloom.analyse.audit.energy import paper_rule
from spikeloom.analyse.load import Target, open_target
from spikeloom.bench.timing import medians
from spikeloom.errors import UsageError
from spikeloom.files import PathLike, atomic_folder, load_tensors, read_json, save_tensors, write_json
from spikeloom.models.trained_weights import FOLDER
from spikeloom.record import RateMeter
from spikeloom.registry import nearest
from spikeloom.train.build import build_datasets, make_accelerator
from spikeloom.train.evaluate import evaluate, load
from spikeloom.train.losses import LOSSES
from spikeloom.train.recipe import Budget, load_recipe
from spikeloom.train.run import Run
from spikeloom.train.settings import Settings
from spikeloom.train.stages import showing

Json = dict[str, Any]
SAMPLE = 500  # first test images, or all of fewer, of which the card says how many are right
_AUDITED = 64
_LOST = 2**-10  # of a tensor's norm; rounding to float16 loses at most half of it
_SCALED = 32  # values that share a scale, at least
_CALLS = 15
STORED = ("float16", "int8")


def write_weights(run: Run, settings: Settings, folder: PathLike, work: Any, stored: str = "float16") -> Json:
    """Writes the trained network of a run as a folder to share, and measures what was written.

    The folder is a run's (`model.safetensors`, `settings.json` without places, `summary.json`, `metrics.jsonl`) with a
    card, `README.md`. All that is measured is measured with the weights as written, in float32.

    Args:
        run: a finished one.
        settings: of the run, with the place of its data.
        folder: new or empty.
        work: shows progress.
        stored: how the file holds weights: as `float16`, or those of convolutions and linear layers as `int8` with a
            scale for each output channel.

    Returns:
        The summary that was written, with `bytes`.

    Raises:
        UsageError: the run is unfinished, does not classify, the folder is not empty or cannot be written, or `stored`
            is something else.
    """
    if stored not in STORED:
        raise UsageError(f"unknown type of weights {stored!r}; {nearest(stored, STORED)}")
    folder, summary = Path(folder), run.summary()
    if summary is None or summary["test_accuracy"] is None:
        raise UsageError(f"{run.folder} is not the folder of a finished run of a network that classifies")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: choose another --out")
    _, dataset = build_datasets(settings, train=False)
    with atomic_folder(folder) as new:
        types = _copy(run, dataset, new, stored)
        write_json(new / "summary.json", summary)
        found = _measure(new, settings, dataset, work)
        trained = summary.get("trained_accuracy", summary["test_accuracy"])  # the former, of weights shared before
        summary |= {"test_accuracy": found.accuracy, "trained_accuracy": trained, "card": found.as_json()}
        write_json(new / "summary.json", summary)
        card = _card(Run.open(new), summary, found, types, _place(folder, settings))
        (new / "README.md").write_text(card, encoding="utf-8")
    return {**summary, "bytes": (folder / "model.safetensors").stat().st_size}


def _copy(run: Run, dataset: Any, folder: Path, stored: str) -> str:
    """The run's files without the places of this machine, weights in fewer bytes. Returns their types, in words."""
    tensors, about = load_tensors(run.weights)
    int8 = [name for name, tensor in tensors.items() if stored == "int8" and _fits_int8(tensor)]
    kept = {name: tensor if name in int8 else _half(tensor) for name, tensor in tensors.items()}
    save_tensors(folder / "model.safetensors", kept, about | run.about_weights(dataset), int8)
    values = read_json(run.folder / "settings.json")
    values["settings"]["data"] |= {"root": None}
    values["settings"]["train"] |= {"start_from": None}
    write_json(folder / "settings.json", values)
    shutil.copyfile(run.folder / "metrics.jsonl", folder / "metrics.jsonl")
    others = {str(t.dtype).removeprefix("torch.") for n, t in kept.items() if t.is_floating_point() and n not in int8}
    return " and ".join(["int8 with a scale for each output channel"] * bool(int8) + sorted(others))


def _fits_int8(tensor: Tensor) -> bool:
    """Whether scales [C] of a tensor [C, ...] take little beside its integers."""
    return tensor.is_floating_point() and tensor.dim() > 1 and tensor[0].numel() >= _SCALED


def _half(tensor: Tensor) -> Tensor:
    """float32 as float16, unless a value is beyond its range, or all are so small that it loses bits of them."""
    if tensor.dtype != torch.float32:
        return tensor
    half, exact = tensor.half(), tensor.double()
    # Of the whole: nearly every large tensor has a few values so near to zero that float16 has few bits left for them.
    lost = torch.linalg.vector_norm(half.double() - exact)
    return half if bool(lost <= _LOST * torch.linalg.vector_norm(exact)) else tensor


@dataclass(frozen=True)
class Measured:
    """What a card says of a network, measured with its weights as they are shared.

    Attributes:
        accuracy: percent, on the whole test part.
        by_steps: the same by T, for networks that repeat an image.
        sample: how many of the first test images are right, and how many these are.
        rates: firing rates by layer.
        spike_driven: the audit's verdict.
        energies: of one image in microjoules, by rule.
        engine_ms: of one image, and an image of 64, by the event engine.
        sha256: of the file of weights.
    """

    accuracy: float
    by_steps: dict[int, float]
    sample: tuple[int, int]
    rates: dict[str, float]
    spike_driven: bool | None
    energies: dict[str, float]
    engine_ms: dict[int, float]
    sha256: str

    def as_json(self) -> Json:
        """For `summary.json`."""
        return {
            "sample": dict(zip(("right", "images"), self.sample, strict=True)),
            "by_steps": self.by_steps,
            "rates": self.rates,
            "spike_driven": self.spike_driven,
            "energies_uJ": self.energies,
            "engine_ms": self.engine_ms,
            "sha256": self.sha256,
        }


def _measure(folder: Path, settings: Settings, dataset: Any, work: Any) -> Measured:
    model, data = load(folder), {"data": settings.data.model_dump()}
    t = settings.train
    score = functools.partial(
        evaluate,
        model,
        t=t,
        loss=functools.partial(LOSSES[t.loss.name], **t.loss.options),
        accelerator=make_accelerator("fp32"),
    )
    steps = _steps(model, dataset)
    work.work("measuring the card", len(dataset) * max(1, len(steps)))
    meter = RateMeter(model)
    accuracy: float = score(dataset, tick=work.advance, meter=meter)["test_accuracy"]
    by_steps: dict[int, float] = {}
    for T in steps[:-1]:
        with showing(model, T):
            by_steps[T] = score(dataset, tick=work.advance)["test_accuracy"]
    if steps:  # the last is its own T
        by_steps[steps[-1]] = accuracy
    target = open_target(folder, {**data, "images": max(SAMPLE, 64), "batch": 64})
    found = audit(model, itertools.islice(target.batches(), -(-_AUDITED // 64)))
    return Measured(
        accuracy=accuracy,
        by_steps=by_steps,
        sample=count_right(model, target),
        rates=meter.rates(),
        spike_driven=found.spike_driven,
        energies={name: energy.pj / 1e6 for name, energy in found.energies().items()},
        engine_ms=_engine_times(model, target),
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )


def _steps(model: nn.Module, dataset: Any) -> list[int]:
    """The T at which a network can show a still image; none of a network for sequences, or with weights for one T."""
    own = getattr(model, "T", None)
    if dataset.is_sequence or not isinstance(own, int):
        return []
    steps, x = list(range(1, own + 1)), dataset.encode(dataset.batch([0])[0])
    for T in steps:
        with showing(model, T), torch.no_grad():
            try:
                model(x)
            except (ValueError, RuntimeError):
                return []
    return steps


@torch.no_grad()
def count_right(model: nn.Module, target: Target) -> tuple[int, int]:
    """How many of the first `SAMPLE` images are right, by the mean logits over time, and how many these are."""
    right = seen = 0
    for x, y in target.batches():
        y = y[: SAMPLE - seen]
        right += int((model(x).mean(0).argmax(1)[: len(y)] == y).sum())
        seen += len(y)
    return right, seen


def _engine_times(model: nn.Module, target: Target) -> dict[int, float]:
    """Milliseconds an image by the event engine, one alone and 64 together; none where the engine cannot run it."""
    x = next(target.batches())[0]
    try:
        engine = deploy.compile(model, x)
    except UsageError:
        return {}
    one = x[:, :1] if target.sequence else x[:1]
    found = medians({"one": lambda: engine(one), "all": lambda: engine(x)}, _CALLS)
    return {1: found["one"], 64: found["all"] / 64}


def _place(folder: Path, settings: Settings) -> tuple[str, str]:
    """What `create_model` takes for the weights in a folder, and an explanation."""
    if folder.resolve() == (FOLDER / settings.model.name / settings.data.name).resolve():
        return settings.data.name, ""
    return "FOLDER", ", where FOLDER is where this file lies"


def _card(run: Run, summary: Json, found: Measured, types: str, place: tuple[str, str]) -> str:
    """The card as Markdown; `types` says how weights are stored."""
    settings, environment = run.settings, summary["environment"]
    task, epochs = settings.data.name, summary["epochs"]
    commit = f", commit {environment['commit'][:12]}" if environment["commit"] else ""
    lines = [
        f"# {settings.model.name} on {task}",
        "",
        f"A spiking network for {summary['data']['test']}, trained by `spikeloom train {run.title}` (budget "
        f"{run.budget}{_changes(run)}). Load it with",
        f'`spikeloom.create_model("{settings.model.name}", weights="{place[0]}")`{place[1]}.',
        "",
        "| | |",
        "|---|---|",
        f"| accuracy | {found.accuracy:.2f} % on {summary['data']['test']} |",
    ]
    if found.by_steps:
        shown = ", ".join(f"{accuracy:.2f} % at T = {T}" for T, accuracy in found.by_steps.items())
        lines.append(f"| by steps | {shown} |")
    layers = list(found.rates.values())
    verdicts = {True: "yes", False: "no", None: "cannot be told from these inputs"}
    lines += [
        f"| parameters | {summary['parameters']:,} |",
        f"| firing rates | {100 * sum(layers) / len(layers):.1f} % on average over {len(layers)} layers, "
        f"{100 * min(layers):.1f} to {100 * max(layers):.1f} % |",
        f"| spike-driven behind its encoder | {verdicts[found.spike_driven]} |",
        f"| energy of an image | {_energy(run, found)} |",
    ]
    if found.engine_ms:
        one, many = found.engine_ms.values()
        lines.append(
            f"| event engine | {one:.3g} ms for one image, {many:.3g} ms an image of 64 ({environment['processor']}, "
            f"{torch.get_num_threads()} threads) |"
        )
    lines += [
        f"| training | {epochs} epoch{'s' * (epochs > 1)}, seed {summary['seed']}, "
        f"{summary['seconds'] / 60:.1f} minutes, {environment['threads']} threads, {environment['processor']}"
        f"{commit} |",
        f"| data | {summary['data']['train']} |",
        f"| epoch | {summary.get('rule', 'last epoch')} |",
        f"| SHA-256 of model.safetensors | `{found.sha256}` |",
        "",
        "Settings are in `settings.json`, the curves in `metrics.jsonl`. Accuracy, rates and energy are of the weights",
        f"as they are stored, computed in float32: {types}.",
        "",
        "It is a reference for research. It is not made for decisions about people or safety, and says nothing of data",
        "unlike its training data.",
        "",
    ]
    return "\n".join(lines)


def _changes(run: Run) -> str:
    """What the run's settings have of their own, beside its recipe's."""
    try:
        changed = load_recipe(run.recipe).changes(run.row, cast(Budget, run.budget), run.settings.model_dump())
    except UsageError:  # a recipe of the user's that is not here
        return ""
    return f", with `{shlex.join(changed)}`" if changed else ""


def _energy(run: Run, found: Measured) -> str:
    """As measured, and by the rule of the network's own document where it has one."""
    rules = dict.fromkeys(("measured", paper_rule(run.recipe, run.settings.model.name)))
    return ", ".join(f"{found.energies[rule]:.3g} uJ (rule `{rule}`)" for rule in rules)
