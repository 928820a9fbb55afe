"""Tensors and settings on disk: safetensors, written whole or not at all, checked when read.

Nothing here unpickles: loading a file cannot run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle  # for the name of an error
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Collection, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spikeloom.errors import DataFileError, UsageError, cannot_write

Json = dict[str, Any]
PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic(path: PathLike) -> Generator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        UsageError: the place cannot be written, or is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except (OSError, SafetensorError) as error:
        # safetensors reports a full or read-only disk as its own error.
        raise cannot_write(path, error) from None


def make_folder(folder: PathLike, another: str = "folder") -> None:
    """Makes a folder and those above it, unless it is there.

    Args:
        folder: its path.
        another: how a user chooses another, behind the words "choose another".

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}; choose another {another}") from None


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Generator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends well; otherwise it is removed.

    Args:
        path: is not there, or an empty folder.

    Raises:
        UsageError: the place cannot be written, or is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.is_dir():
                path.rmdir()
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_json(path: PathLike, value: Any, rows: bool = False) -> None:
    """Writes JSON atomically.

    Args:
        path: of the file.
        value: what it holds.
        rows: objects and lists of plain values take one line each: tables are half as large, and read as such.
    """
    text = json.dumps(value, indent=2)
    if rows:
        text = _INNERMOST.sub(lambda part: part[1] + re.sub(r",\n\s+", ", ", part[2]) + part[3], text)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n")


# No string of JSON has a line break in it; one with a bracket keeps its object as it is.
_INNERMOST = re.compile(r"([\[{])\n\s+([^\[\]{}]*)\n\s+([\]}])")


def read_json(path: PathLike) -> Any:
    """Reads JSON; a missing or damaged file is a `DataFileError`."""
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataFileError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise DataFileError(f"{path} is not JSON that can be read: it is nested too deep") from None


def save_tensors(path: PathLike, tensors: dict[str, Tensor], information: Json, int8: Collection[str] = ()) -> None:
    """Writes tensors and JSON information as one safetensors file, atomically, with a checksum.

    Equal tensors and information give equal bytes.

    Args:
        path: of the file.
        tensors: by name.
        information: what else the file says; its key `int8` is taken.
        int8: names of float tensors [C, ...] that are stored as 8-bit integers, with a scale for each of the C: to
            the nearest of 255 values. The scales stand in the file as `NAME.scale`.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name in int8:
        kept[name], kept[name + _SCALE] = _to_int8(kept[name].float())
    text = json.dumps({**information, "int8": sorted(int8)} if int8 else information)
    write_safetensors(path, kept, {"spikeloom": text, "crc32": str(_checksum(kept, text))})


_SCALE = ".scale"


def _to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Integers from -127 to 127 and scales [C] of a float32 tensor [C, ...], nearest to integers * scale."""
    largest = tensor.flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, torch.ones(()))
    return (tensor / _along(scale, tensor)).round().to(torch.int8), scale


def _from_int8(path: PathLike, tensors: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    """What `save_tensors` stored as integers, as float32.

    Raises:
        DataFileError: they are no integers with a scale for each of the first axis.
    """
    if not isinstance(names, list):
        raise DataFileError(f"{path} is damaged: its header does not list its integers")
    for name in map(str, names):
        integers, scale = tensors.get(name), tensors.pop(f"{name}{_SCALE}", None)
        if integers is None or scale is None:
            raise DataFileError(f"{path} is damaged: it has no {name} of integers with scales")
        if integers.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != integers.shape[:1]:
            raise DataFileError(f"{path} is damaged: {name} is not int8 with a scale for each of its first axis")
        tensors[name] = integers.float() * _along(scale, integers)
    return tensors


def _along(scale: Tensor, tensor: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], as many axes as the tensor has."""
    return scale.reshape(-1, *[1] * (tensor.dim() - 1))


def write_safetensors(path: PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes contiguous tensors and a header as one safetensors file, atomically; equal ones give equal bytes."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata)
        _sort_metadata(temporary)
        # safetensors writes for its owner alone; the other files of a run follow the umask.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)


def _sort_metadata(path: Path) -> None:
    """Writes the metadata in the order of its keys: safetensors has the one of a hash map, another in every process."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "safetensors escapes fewer characters"
        file.seek(8)
        file.write(text.ljust(length))


def load_tensors(path: PathLike) -> tuple[dict[str, Tensor], Json]:
    """Reads what `save_tensors` wrote; what it stored as 8-bit integers is float32 again.

    Raises:
        DataFileError: the file is missing, truncated, changed, or not from Spikeloom.
    """
    tensors, metadata = read_safetensors(path)
    if "spikeloom" not in metadata or "crc32" not in metadata:
        raise DataFileError(f"{path} was not written by Spikeloom: its header has no checksum")
    if metadata["crc32"] != str(_checksum(tensors, metadata["spikeloom"])):
        raise DataFileError(f"{path} is damaged: its checksum does not match its contents")
    try:
        information = json.loads(metadata["spikeloom"])
    except ValueError:
        raise DataFileError(f"{path} is damaged: its header is not valid JSON") from None
    if isinstance(information, dict) and "int8" in information:
        tensors = _from_int8(path, tensors, information.pop("int8"))
    return tensors, information


def read_safetensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file, whoever wrote it.

    Raises:
        DataFileError: the file is missing, truncated or of another kind.
    """
    if not Path(path).is_file():
        raise DataFileError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataFileError(f"{path} is truncated or not a safetensors file: {str(error).splitlines()[0]}") from None


def read_state_dict(path: PathLike, owner: str = "weights") -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or one of `torch.save`; no code of the file is run.

    A state dict may stand alone, or in a dictionary under `model`, `state_dict`, `model_state_dict` or `net`.

    Args:
        path: of the file; safetensors by its ending.
        owner: whose file it is, for messages.

    Raises:
        DataFileError: it is not there, holds other things than tensors by name, or objects that only code could make.
    """
    path = Path(path)
    if not path.is_file():
        raise DataFileError(f"{owner}: there is no file {path}")
    try:
        saved: Any = (
            read_safetensors(path)[0]
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:  # torch's own advice is to run the code in the file
        raise DataFileError(
            f"{owner}: {path} holds objects that only code could make, and no code is run: save its weights "
            'alone with torch.save(checkpoint["model"], "weights.pth")'
            if zipfile.is_zipfile(path)
            else f"{owner}: {path} is no safetensors or torch.save file of weights: it was written by something else"
        ) from None
    except Exception as error:  # both readers raise what they like on a file that is not theirs
        reason = str(error).splitlines()[0]
        raise DataFileError(f"{owner}: {path} is no safetensors or torch.save file of weights: {reason}") from None
    for key in ("model", "state_dict", "model_state_dict", "net"):
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
            break
    if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise DataFileError(f"{owner}: {path} does not hold a state dict, tensors by name")
    return dict(saved)


def _checksum(tensors: dict[str, Tensor], information: str) -> int:
    crc = zlib.crc32(information.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode(), crc)
        data: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return crc


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's weights with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: PathLike, model_name: str) -> None:
    """Puts tensors into a model of the same names and shapes.

    Raises:
        DataFileError: they are of another model; names the first difference.
    """
    check_weights(model.state_dict(), tensors, f"{path} holds the weights of another model than {model_name}")
    model.load_state_dict(tensors)


def check_weights(expected: dict[str, Tensor], tensors: dict[str, Tensor], hint: str) -> None:
    """Compares the names, shapes and kinds of tensors (of integers or not) with those that a model has.

    Args:
        expected: the model's `state_dict`, of which no values are read.
        tensors: what was found.
        hint: what the message begins with.

    Raises:
        DataFileError: they differ; names the first difference.
    """
    for name, tensor in expected.items():
        if name not in tensors:
            raise DataFileError(f"{hint}: it has no {name}")
        if tensors[name].shape != tensor.shape:
            raise DataFileError(
                f"{hint}: {name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(tensor.shape)}"
            )
        # float16 fits float32, but integers are no weights: they would be taken as they are, without their scale.
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise DataFileError(f"{hint}: {name} holds {tensors[name].dtype}, the model's {tensor.dtype}")
    for name in tensors:
        if name not in expected:
            raise DataFileError(f"{hint}: the model has no {name}")
