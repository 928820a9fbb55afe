"""Files of tensors: whole or not at all, equal to the last bit, and never trusted."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from spikeloom import files
from spikeloom.errors import DataFileError, UsageError
from spikeloom.files import (
    atomic,
    load_tensors,
    load_weights,
    read_json,
    read_safetensors,
    save_tensors,
    write_json,
    write_safetensors,
)
from spikeloom.train.checkpoint import pack_optimizer, unpack_optimizer

INFORMATION = {"position": {"epoch": 12, "step": 345, "loss": 0.1}, "groups": [{"lr": 1e-3, "betas": [0.9, 0.999]}]}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and bits(a[name]) == bits(b[name])
        for name in a
    )


def tensors() -> dict[str, Tensor]:
    return {
        "fp32": torch.tensor([[0.1, -0.0, float("inf")], [float("nan"), 1e-45, 3e38]]),
        "fp64": torch.randn(3, dtype=torch.float64),
        "bf16": torch.randn(5).bfloat16(),
        "fp16": torch.randn(2, 1, 2).half(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "step": torch.tensor(7.0),
        "batches": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "strided": torch.randn(4, 6)[:, ::2],
    }


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_atomic_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("first", "second"):
        with atomic(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() != text
        assert path.read_text() == text
        assert leftovers(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(1)])
def test_atomic_keeps_the_old_file_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == ["file"]


def test_atomic_writes_beside_the_file(tmp_path: Path) -> None:
    # A rename within one folder never crosses file systems.
    with atomic(tmp_path / "file") as temporary:
        temporary.touch()
        assert temporary.parent == tmp_path
        assert temporary.name != "file"


@pytest.mark.parametrize("place", ["missing/file", "regular/file"])
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "regular").write_text("x")
    for write in (lambda path: write_json(path, 1), lambda path: save_tensors(path, {"a": torch.zeros(1)}, {})):
        with pytest.raises(UsageError) as info:
            write(tmp_path / place)
        assert str(info.value).startswith(f"cannot write {tmp_path / place}: ")
        assert "choose another place" in str(info.value)
    assert leftovers(tmp_path) == ["regular"]


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_then_full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata)
    os.truncate(path, path.stat().st_size // 2)
    full_disk()


@pytest.mark.parametrize("failing", ["save_file", "write", "fsync", "rename"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path, old = tmp_path / "checkpoint.safetensors", tensors()
    save_tensors(path, old, INFORMATION)
    with monkeypatch.context() as patch:
        if failing == "save_file":
            patch.setattr(files, "save_file", half_then_full_disk)
        elif failing == "write":
            patch.setattr(files, "save_file", full_disk)
        elif failing == "fsync":
            patch.setattr(os, "fsync", full_disk)
        else:
            patch.setattr(os, "replace", full_disk)
        with pytest.raises(UsageError) as info:
            save_tensors(path, {"new": torch.zeros(3)}, {})
    assert str(path) in str(info.value)
    assert "No space left on device" in str(info.value)
    assert "free some space" in str(info.value)
    assert leftovers(tmp_path) == [path.name]
    loaded, information = load_tensors(path)
    assert same(loaded, old)
    assert information == INFORMATION


def test_a_disk_that_is_full_for_the_library(tmp_path: Path) -> None:
    # A limit on the size of files stands in for a full disk: the error comes from the library that writes tensors.
    code = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\n"
        "from spikeloom.errors import UsageError\nfrom spikeloom.files import load_tensors, save_tensors\n"
        "path = Path(sys.argv[1])\nsave_tensors(path, {'a': torch.arange(4)}, {'old': True})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    save_tensors(path, {'a': torch.zeros(100_000)}, {})\n"
        "except UsageError as error:\n    print(error)\n"
        "assert load_tensors(path)[1] == {'old': True}\n"
    )
    path = tmp_path / "checkpoint.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert "free some space" in done.stdout
    assert leftovers(tmp_path) == [path.name]


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json(tmp_path: Path) -> None:
    value = {"a": [1, 0.1, None, True], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert leftovers(tmp_path) == ["x.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"\x00"])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataFileError, match=r"x\.json") as info:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(info.value)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"cannot read .*x\.json"):
        read_json(tmp_path / "x.json")


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == 1
    assert leftovers(tmp_path) == ["x.json"]


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    path, saved = tmp_path / "x.safetensors", tensors()
    save_tensors(path, saved, INFORMATION)
    loaded, information = load_tensors(path)
    assert same(loaded, saved)
    assert information == INFORMATION
    assert information["position"]["loss"] == 0.1
    assert leftovers(tmp_path) == [path.name]


def test_equal_contents_are_equal_bytes(tmp_path: Path) -> None:
    # The metadata lie in a hash map of the library, whose order is another for every file that is written.
    name = 'é "\\ / \t \x01 \x7f \u2028'
    tensors, metadata = (
        {"b": torch.arange(3), "a": torch.ones(2, 2).bfloat16()},
        {f"{n} {name}": name for n in range(9)},
    )
    contents: set[bytes] = set()
    for _ in range(5):
        write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
        save_tensors(tmp_path / "y.safetensors", tensors, {"of": name, **INFORMATION})
        contents |= {(tmp_path / f"{letter}.safetensors").read_bytes() for letter in "xy"}
        tensors, metadata = (dict(reversed(values.items())) for values in (tensors, metadata))
    assert len(contents) == 2
    loaded, header = read_safetensors(tmp_path / "x.safetensors")
    assert same(loaded, tensors)
    assert header == metadata
    assert load_tensors(tmp_path / "y.safetensors")[1] == {"of": name, **INFORMATION}


def test_parameters_are_saved_without_their_graph(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(3))
    save_tensors(tmp_path / "x.safetensors", {"a": parameter * 2}, {})
    loaded, _ = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], parameter.detach() * 2)
    assert not loaded["a"].requires_grad


def test_no_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {}, {"a": 1})
    assert load_tensors(tmp_path / "x.safetensors") == ({}, {"a": 1})


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(DataFileError, match="there is no file"):
            load_tensors(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Tensor]]:
    """A place to write damaged copies, a small whole file, and what is in it."""
    torch.manual_seed(0)
    folder, small = tmp_path_factory.mktemp("written"), tensors()
    save_tensors(folder / "whole.safetensors", small, INFORMATION)
    return folder / "damaged.safetensors", (folder / "whole.safetensors").read_bytes(), small


def check_damaged(written: tuple[Path, bytes, dict[str, Tensor]], content: bytes) -> None:
    """A damaged file is refused in one line, or what is read is what was written."""
    path, _, small = written
    path.write_bytes(content)
    try:
        loaded, information = load_tensors(path)
    except DataFileError as error:
        refused = str(error)
    else:
        assert same(loaded, small)
        assert information == INFORMATION
        return
    assert str(path) in refused
    assert "\n" not in refused


def test_an_undamaged_copy_is_read(written: tuple[Path, bytes, dict[str, Tensor]]) -> None:
    path, content, small = written
    path.write_bytes(content)
    assert same(load_tensors(path)[0], small)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_noticed(written: tuple[Path, bytes, dict[str, Tensor]], data: st.DataObject) -> None:
    content = bytearray(written[1])
    index = data.draw(st.integers(0, len(content) - 1), "index")
    content[index] ^= data.draw(st.integers(1, 255), "flip")
    check_damaged(written, bytes(content))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_is_noticed(written: tuple[Path, bytes, dict[str, Tensor]], data: st.DataObject) -> None:
    content = written[1]
    length = data.draw(st.integers(0, len(content) - 1), "length")
    path = written[0]
    path.write_bytes(content[:length])
    with pytest.raises(DataFileError):
        load_tensors(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b'"shape":[2,3]', b'"shape":[3,2]'),
        (b'\\"epoch\\": 12', b'\\"epoch\\": 13'),
        (b'\\"loss\\": 0.1', b'\\"loss\\": 0.9'),
        (b"0.999", b"0.899"),
        (b'"bf16"', b'"bf61"'),
    ],
)
def test_a_changed_header_is_noticed(written: tuple[Path, bytes, dict[str, Tensor]], old: bytes, new: bytes) -> None:
    path, content, _ = written
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(DataFileError, match="damaged"):
        load_tensors(path)


@pytest.mark.parametrize("extra", [b"\x00", b"trailing bytes"])
def test_trailing_bytes(written: tuple[Path, bytes, dict[str, Tensor]], extra: bytes) -> None:
    check_damaged(written, written[1] + extra)


@pytest.mark.parametrize("content", [b"", b"{}", bytes(8), bytes(1000), b"\xff" * 100, b"PK\x03\x04" + bytes(100)])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="truncated or not a safetensors file"):
        load_tensors(path)


def test_a_file_of_another_program(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DataFileError, match="not written by Spikeloom"):
        load_tensors(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"spikeloom": "{}"})
    with pytest.raises(DataFileError, match="not written by Spikeloom"):
        load_tensors(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"spikeloom": "{}", "crc32": "1"})
    with pytest.raises(DataFileError, match="damaged"):
        load_tensors(tmp_path / "x.safetensors")


class Exploit:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch, old format"])
def test_loading_runs_no_code(tmp_path: Path, kind: str) -> None:
    path, witness = tmp_path / "model.safetensors", tmp_path / "witness"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit(witness)))
    else:
        torch.save({"a": Exploit(witness)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(DataFileError, match="not a safetensors file"):
        load_tensors(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Exploit(witness)))  # the exploit itself works
    assert witness.exists()


# --- weights into a model ---------------------------------------------------------------------------------------------


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_load_weights() -> None:
    source, target = model(), model()
    load_weights(target, dict(source.state_dict()), Path("x"), "name")
    assert same(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("1.running_mean"), "it has no 1.running_mean"),
        (
            lambda weights: weights.update({"2.weight": torch.zeros(2, 5)}),
            r"2.weight has shape \(2, 5\), the model's has \(2, 4\)",
        ),
        (lambda weights: weights.update({"3.weight": torch.zeros(1)}), "the model has no 3.weight"),
        (dict.clear, "it has no 0.weight"),
    ],
)
def test_weights_of_another_model(change: Any, message: str) -> None:
    source, target = model(), model()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    weights = dict(source.state_dict())
    change(weights)
    with pytest.raises(DataFileError, match=f"^x/y holds the weights of another model than name: {message}$"):
        load_weights(target, weights, Path("x/y"), "name")
    assert same(dict(target.state_dict()), before)


# --- optimisers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4),
    "sgd without momentum": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = model()
    stopped = model()
    stopped.load_state_dict(whole.state_dict())
    optimizer = OPTIMIZERS[name](list(whole.parameters()))
    steps(whole, optimizer, range(6))

    optimizer = OPTIMIZERS[name](list(stopped.parameters()))
    steps(stopped, optimizer, range(3))
    optimizer.param_groups[0]["initial_lr"] = 0.1  # what schedulers leave there
    packed, information = pack_optimizer(optimizer.state_dict())
    save_tensors(tmp_path / "x.safetensors", packed, information)
    continued = model()
    continued.load_state_dict(stopped.state_dict())
    optimizer = OPTIMIZERS[name](list(continued.parameters()))
    optimizer.load_state_dict(unpack_optimizer(*load_tensors(tmp_path / "x.safetensors")))
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    steps(continued, optimizer, range(3, 6))
    assert same(dict(continued.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unpacking_is_the_inverse_of_packing(name: str) -> None:
    network = model()
    optimizer = OPTIMIZERS[name](list(network.parameters()))
    steps(network, optimizer, range(2))
    state = optimizer.state_dict()
    packed, information = pack_optimizer(state)
    assert all(isinstance(tensor, Tensor) for tensor in packed.values())
    back = unpack_optimizer(packed, json.loads(json.dumps(information)))
    assert back["state"].keys() == {index for index, values in state["state"].items() if values}
    for index, values in back["state"].items():
        assert values.keys() == state["state"][index].keys()
        for key, value in values.items():
            expected = state["state"][index][key]
            assert torch.equal(value, expected) if isinstance(expected, Tensor) else value == expected
    [group], [expected] = back["param_groups"], state["param_groups"]
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in group.items()} == {
        key: tuple(v) if isinstance(v, list) else v for key, v in expected.items()
    }
