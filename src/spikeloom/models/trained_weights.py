"""Weights of trained networks: those that come with the package, files, folders of runs, and the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeloom.documentation import page
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import PathLike, check_weights, load_tensors, read_json
from spikeloom.neurons import make_factory
from spikeloom.registry import nearest

Json = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "weights"
PREFIX = "weights:"
HUB = "hf-hub:"


def list_weights(pattern: str = "*") -> list[str]:
    """The trained networks that come with the package, as `model/task`, that match a shell pattern, sorted."""
    names = (path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob("*/*/model.safetensors"))
    return sorted(fnmatch.filter(names, pattern))


def describe_weights(name: str) -> str:
    """A line about a trained network of the package: accuracy, data, parameters, bytes."""
    folder = weights_folder(name)
    summary = read_json(folder / "summary.json")
    size = (folder / "model.safetensors").stat().st_size / 1e6
    accuracy = f"{summary['test_accuracy']:.2f} % on {summary['data']['test']}"
    return f"{accuracy}; {summary['parameters'] / 1e6:.2f} M parameters, {size:.1f} MB"


def weights_folder(name: str) -> Path:
    """The folder of a trained network of the package.

    Args:
        name: `model/task`, or the task alone: then the network of its quickstart, or the only one.

    Raises:
        UsageError: there is none, or a task has several.
    """
    known = list_weights()
    fitting = [each for each in known if name in (each, each.split("/")[1])]
    if len(fitting) > 1:
        recipes = {each: read_json(FOLDER / each / "settings.json")["recipe"] for each in fitting}
        fitting = [each for each in fitting if recipes[each] == f"quickstart/{name}"] or fitting
    if not fitting:
        tasks = sorted({each.split("/")[1] for each in known})
        raise UsageError(f"there are no weights {name!r}; {nearest(name, [*tasks, *known])}")
    if len(fitting) > 1:
        raise UsageError(f"several networks have weights for {name!r}: name one of {', '.join(fitting)}")
    return FOLDER / fitting[0]


def run_folder(name: PathLike) -> Path:
    """The folder of a run, or of the trained network of the package that `weights:NAME` names.

    Raises:
        UsageError: there are no such weights.
    """
    text = os.fspath(name)
    return weights_folder(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else Path(text)


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds.

    Attributes:
        path: of the file.
        tensors: by their names in the model.
        options: arguments of the model's builder, without a neuron if it has the network's own.
    """

    path: Path
    tensors: dict[str, Tensor]
    options: Json


def read_weights(model: str, weights: PathLike) -> Weights:
    """Reads the weights of a registered model.

    Args:
        model: its name.
        weights: the task of weights that the package has for it, a file, the folder of a run, or `hf-hub:owner/name`.

    Raises:
        UsageError: the package has no weights for this task, or the hub cannot be asked.
        DataFileError: the file is missing, damaged, of another model, or not from Spikeloom.
    """
    path = _locate(model, os.fspath(weights))
    tensors, about = load_tensors(path)
    try:
        named = dict(about["model"])
        owner = named.pop("name")
        neuron, made = about.get("neuron"), dict(about.get("made_for") or {})
    except (KeyError, TypeError, ValueError):
        raise DataFileError(f"{path} does not say of which model its weights are") from None
    if owner != model:
        raise DataFileError(f"{path} holds the weights of {owner}, not of {model}")
    options: Json = {**named, **made}
    if neuron is not None:
        if not isinstance(neuron, dict) or not isinstance(neuron.get("name"), str):
            raise DataFileError(f"{path} does not say which neurons its model has")
        options["neuron"] = make_factory(neuron["name"], {k: v for k, v in neuron.items() if k != "name"})
    return Weights(path, tensors, options)


def _locate(model: str, weights: str) -> Path:
    if weights.startswith(HUB):
        return _from_hub(weights.removeprefix(HUB))
    if weights.startswith(PREFIX):
        return weights_folder(weights.removeprefix(PREFIX)) / "model.safetensors"
    path = Path(weights)
    if path.is_dir():
        return path / "model.safetensors"
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    tasks = [name.split("/")[1] for name in list_weights(f"{model}/*")]
    if weights not in tasks:
        has = f"it has {', '.join(tasks)}" if tasks else "it has none"
        raise UsageError(
            f"model {model} comes without weights {weights!r}; {has}, and a file, a run's folder or hf-hub:owner/name "
            f"can be given, see {page('weights', 'what-weights-may-be')}"
        )
    return FOLDER / model / weights / "model.safetensors"


def _from_hub(repository: str) -> Path:
    """The weights of a repository of the Hugging Face Hub, downloaded once."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(f"cannot read weights of {HUB}{repository}: {str(error).splitlines()[0]}") from None


def build_trained(name: str, builder: Callable[..., nn.Module], weights: Weights, overrides: Json) -> nn.Module:
    """The model of some weights, in eval mode.

    Args:
        name: of the model.
        builder: makes it.
        weights: as `read_weights` gives them.
        overrides: arguments of the builder that replace those of the weights.

    Raises:
        DataFileError: weights of other names or shapes than the model's, or settings that it cannot have.
    """
    options = {**weights.options, **overrides}
    # Shapes are compared before memory is taken, and the caller's random numbers stay as they are.
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            expected = builder(**options).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataFileError(f"{weights.path} names settings that {name} cannot have: {reason}") from None
    check_weights(expected, weights.tensors, f"{weights.path} does not fit {name}")
    with torch.random.fork_rng(devices=[]):
        model = builder(**options)
    model.load_state_dict(weights.tensors)
    return model.eval()
