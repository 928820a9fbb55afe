"""A user's own modules: found by the command line, remembered by a run, never imported because a run names them."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import SMALL, spikeloom

from spikeloom import plugins
from spikeloom.neurons import NEURONS

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = """
from spikeloom.neurons import LIF, NEURONS

@NEURONS.register
class QuickLIF(LIF):
    def __init__(self, tau: float = 1.5):
        super().__init__(tau, decay_input=False)
"""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a module of one's own; what it registers is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_named", [])
    before = dict(NEURONS._entries)
    (tmp_path / "quick_neurons.py").write_text(OWN)
    yield
    NEURONS._entries.clear()
    NEURONS._entries.update(before)
    sys.modules.pop("quick_neurons", None)


def forget() -> None:
    """What a new process knows."""
    NEURONS._entries.pop("QuickLIF", None)
    sys.modules.pop("quick_neurons", None)
    plugins._named.clear()


def test_a_run_with_a_neuron_of_ones_own() -> None:
    result = spikeloom("train", *SMALL, "neuron.name=QuickLIF", "--out=run", "--json", "--import", "quick_neurons")
    assert result.code == 0, result.err
    assert json.loads(Path("run/settings.json").read_text())["imports"] == ["quick_neurons"]
    forget()
    for words in (("evaluate", "run"), ("train", "--resume", "run"), ("audit", "run")):
        result = spikeloom(*words)
        assert result.code == 2
        assert result.err == (
            "spikeloom: error: run was made with modules of your own: give --import quick_neurons (or import them in "
            "Python); nothing that a run names is imported by itself (see "
            "docs/own-data.md#models-neurons-and-data-sets-of-your-own-by-name)\n"
        )
        assert "QuickLIF" not in NEURONS
    result = spikeloom("--import=quick_neurons", "evaluate", "run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["test_accuracy"] > 0


def test_options_need_no_annotations() -> None:
    """And an entry with `**options` takes any."""
    Path("quick_neurons.py").write_text(
        OWN + "\n@NEURONS.register\ndef plain_lif(tau=1.5, **options):\n    return LIF(tau, **options)\n"
    )
    words = ("train", *SMALL, "neuron.name=plain_lif", "--import", "quick_neurons")
    result = spikeloom(*words, "neuron.tau=3.0", "neuron.decay_input=false", "--out=run", "--json")
    assert result.code == 0, result.err
    assert json.loads(Path("run/settings.json").read_text())["settings"]["neuron"]["tau"] == 3.0


def test_without_modules_nothing_is_noted() -> None:
    assert spikeloom("train", *SMALL, "train.epochs=1", "--out=run", "--json").code == 0
    assert "imports" not in json.loads(Path("run/settings.json").read_text())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "quick_neuron",
            "--import quick_neuron: ModuleNotFoundError: No module named 'quick_neuron'; it",
        ),
        ("quick_neurons.py", "--import takes a module's name, such as my_neurons, got quick_neurons.py: leave out"),
        ("broken", "--import broken: ZeroDivisionError: division by zero; it is looked for in"),
    ],
)
def test_a_module_that_cannot_be_imported(name: str, message: str) -> None:
    Path("broken.py").write_text("1 / 0")
    result = spikeloom("list", "models", "--import", name)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1


def test_an_option_without_a_value() -> None:
    for words in (("list", "models", "--import"), ("--import", "--json", "list")):
        result = spikeloom(*words)
        assert result.code == 2
        assert result.err == "spikeloom: error: --import needs a module's name behind it, such as my_neurons\n"


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, plugins.GROUP)


def test_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sys.path.append(str(tmp_path))
    installed = [entry("quick", "quick_neurons"), entry("gone", "no_such_module")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: installed if group == plugins.GROUP else [])
    with pytest.warns(UserWarning, match=r"the plugin gone \(no_such_module\) cannot be imported: ModuleNotFoundError"):
        result = spikeloom("list", "neurons")
    assert result.code == 0
    assert "QuickLIF" in result.out
    forget()
    assert "QuickLIF" not in spikeloom("list", "neurons", "--help").out
    assert "quick_neurons" not in sys.modules


def test_a_damaged_list_of_modules() -> None:
    assert spikeloom("train", *SMALL, "train.epochs=1", "--out=run", "--json").code == 0
    saved = json.loads(Path("run/settings.json").read_text())
    for wrong in (3, [3], {"a": 1}):
        Path("run/settings.json").write_text(json.dumps(saved | {"imports": wrong}))
        result = spikeloom("evaluate", "run")
        assert result.code == 2
        assert result.err.startswith("spikeloom: error: run/settings.json is not the settings of a run (see docs/")
