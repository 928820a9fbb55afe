"""What the doctor says is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.made_sets import MADE

import spikeloom
from spikeloom.doctor import examine
from spikeloom.ops import _dispatch


@pytest.fixture(autouse=True)
def _no_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)


def test_versions_and_places() -> None:
    found = examine()
    assert found["spikeloom"] == spikeloom.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert Path(found["installed in"]) == Path(spikeloom.__file__).parent
    assert found["documentation"].startswith("docs/index.md")
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert json.loads(json.dumps(found)) == found
    assert None not in found.values()


def test_native_kernels(native: Any) -> None:
    found = examine()
    assert found["native"].startswith(native.level())
    for level in native.levels():
        assert level in found["native"]
    assert found["backend on cpu"] == "native"
    assert found["OpenMP"] == "shared with PyTorch"


def test_examining_changes_no_threads(native: Any) -> None:
    torch.set_num_threads(2)
    examine()
    assert torch.get_num_threads() == 2
    assert native.openmp_threads() == 2


def test_a_second_pool_is_named(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart:
        """A library whose threads do not follow torch's."""

        level, levels = staticmethod(native.level), staticmethod(native.levels)

        @staticmethod
        def openmp_threads() -> int:
            return 64

    with monkeypatch.context() as patch:
        patch.setattr(_dispatch, "native", Apart)
        patch.setattr(_dispatch, "choose", lambda *args: "native")
        assert "second pool" in examine()["OpenMP"]


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "native", None)
    found = examine()
    assert "missing" in found["native"]
    assert "compiler" in found["native"]
    assert found["backend on cpu"] == "reference"
    assert "OpenMP" not in found


@pytest.mark.parametrize(
    ("sets", "found"),
    [
        ([], "none"),
        (["nmnist"], "nmnist"),
        (["cifar10"], "cifar10, sequential_cifar10"),
        (["nmnist", "cifar10"], "cifar10, sequential_cifar10, nmnist"),
    ],
)
def test_data_sets(sets: list[str], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "data.root=" in examine()["SPIKELOOM_DATA"]
    assert "data found" not in examine()
    for name in sets:
        MADE[name](tmp_path)
    monkeypatch.setenv("SPIKELOOM_DATA", str(tmp_path))
    assert examine()["SPIKELOOM_DATA"] == str(tmp_path)
    assert set(examine()["data found"].split(", ")) == set(found.split(", "))


def test_a_root_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKELOOM_DATA", str(tmp_path / "nowhere"))
    assert examine()["data found"] == "none"


def test_bfloat16_that_the_processor_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for emulated, said in ((True, "sums are float32"), (False, "yes")):
        with monkeypatch.context() as patch:
            patch.setattr("spikeloom.doctor.bfloat16_is_emulated", lambda emulated=emulated: emulated)
            assert said in examine()["bfloat16 on cpu"]
