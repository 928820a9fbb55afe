"""Options, lists, the tab key and what a user pastes from one command into the next."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers.command_line import SMALL, spikeloom

import spikeloom as package
from spikeloom import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPIKELOOM_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("what", ["surrogates", "losses", "methods", "penalties", "transforms", "measurements"])
def test_list_of_what_settings_name(what: str) -> None:
    found = json.loads(spikeloom("list", what, "--json").out)
    some = {
        "surrogates": "ATan",
        "losses": "tet",
        "methods": "sltt",
        "penalties": "irm",
        "transforms": "random_crop",
        "measurements": "energy",
    }
    assert some[what] in found
    assert all(found.values())


def test_bare_list_and_bench_say_what_there_is() -> None:
    kinds = json.loads(spikeloom("list", "--json").out)
    assert {"recipes", "models", "surrogates", "losses", "methods"} <= set(kinds)
    assert all(spikeloom("list", kind).code == 0 for kind in kinds if kind != "runs")  # of which there are none here
    assert [line.split()[0] for line in spikeloom("list").out.splitlines()] == list(kinds)
    bench = spikeloom("bench")
    assert bench.code == 0
    assert [line.split()[0] for line in bench.out.splitlines()] == ["neurons", "methods", "events", "audit"]
    assert not Path("results").exists()


def test_version_and_short_help() -> None:
    assert spikeloom("--version").out == f"spikeloom {package.__version__}\n"
    assert spikeloom("-h").out == spikeloom("--help").out
    assert spikeloom("train", "-h").out == spikeloom("train", "--help").out


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("spikeloom tr", {"train"}, {"audit"}),
        ("spikeloom train quick", {"quickstart/digits", "quickstart/mnist"}, {"report/table2"}),
        ("spikeloom reproduce report/table2#", {"report/table2#s0t2a", "report/table2#s0t2b"}, {"report/table2"}),
        ("spikeloom train quickstart/digits q", set(), {"quickstart/digits"}),
        ("spikeloom list su", {"surrogates"}, {"models"}),
        ("spikeloom run RUN --weights ", {"fp32", "bf16", "int8", "exact"}, set()),
    ],
)
def test_the_tab_key(line: str, offered: set[str], not_offered: set[str]) -> None:
    words = line.split(" ")
    variables = {"_SPIKELOOM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "spikeloom"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    found = set(done.stdout.split())
    assert offered <= found
    assert not (not_offered & found)
    assert not any(line.endswith(("| torch", "| numpy", "| pydantic")) for line in done.stderr.splitlines())


def suggested(text: str) -> list[list[str]]:
    """The words, as a shell splits them, of every command that a text tells the user to type."""
    commands = re.findall(r"(?:with:|next: +|make it with:|use:) (spikeloom [^\n;]*)|^ +(tensorboard .*)$", text, re.M)
    return [shlex.split(a or b) for a, b in commands]


def test_a_path_with_spaces_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "a run's folder"
    result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={run}")
    assert result.code == 0, result.err
    assert suggested(result.out) == [
        ["spikeloom", "evaluate", str(run)],
        ["tensorboard", "--logdir", str(run / "tensorboard")],
    ]
    assert suggested(spikeloom("train", f"--resume={run}").err) == [["spikeloom", "evaluate", str(run)]]
    assert suggested(spikeloom("train", *SMALL, f"--out={run}").err) == []
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    again = spikeloom("train", *SMALL, f"--out={run}").err
    assert suggested(again) == [["spikeloom", "train", "--resume", str(run)]]
    for command in ("evaluate", "audit", "run"):
        assert suggested(spikeloom(command, str(run)).err) == [["spikeloom", "train", "--resume", str(run)]]
    problem = spikeloom("report", str(run), f"--out={tmp_path / 'page.html'}").err
    assert suggested(problem) == [["spikeloom", "train", "--resume", str(run)]]


@pytest.mark.parametrize("place", ["./own", "own/../own", "/absolute"])
def test_an_own_recipe_gives_its_file_s_name_to_the_run(place: str, tmp_path: Path) -> None:
    folder = tmp_path if place == "/absolute" else Path(place)
    Path("own").mkdir()
    shutil.copy(Path(package.__file__).parent / "recipes" / "quickstart" / "digits.toml", folder / "mine.toml")
    result = spikeloom("train", f"{folder if place == '/absolute' else place}/mine.toml", *SMALL[1:], "train.epochs=1")
    assert result.code == 0, result.err
    [run] = Path("runs").iterdir()
    assert run.name.startswith("mine-2")


def test_json_leaves_progress_on_standard_error(tmp_path: Path) -> None:
    result = spikeloom("train", *SMALL, f"--out={tmp_path / 'run'}", "--json")
    json.loads(result.out)
    assert [line.split()[1] for line in result.err.splitlines() if line.startswith("epoch ")] == ["1/2", "2/2"]


def test_the_bar_begins_without_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a bar although this is no terminal
    result = spikeloom("train", *SMALL, "train.epochs=1", f"--out={tmp_path / 'run'}", "--json")
    assert "epoch 1/1" in result.err
    assert "loss" in result.err
    assert "nan" not in result.err


def test_piped_tables_keep_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = ["audit", "report_sew_resnet34", "model.T=1", "--images=1", "--input=1x16x16"]
    rows = json.loads(spikeloom(*words, "--json").out)["rows"]
    lines = spikeloom(*words).out.splitlines()
    for row in rows:
        [line] = [line for line in lines if line.startswith(f"│ {row['name']} ")]
        assert f" {row['energy_pj'] / 1e6:.3f} " in line


def test_torchrun_leaves_the_options_of_train_alone() -> None:
    # It refuses what could abbreviate an option of its own, wherever it stands: --run, for --run-path.
    from torch.distributed.run import get_args_parser

    train = typer.main.get_command(cli.app).commands["train"]  # pyright: ignore[reportAttributeAccessIssue]
    options = [f"{option}=x" for parameter in train.params for option in parameter.opts if option.startswith("--")]
    assert len(options) >= 3
    words = ["-m", "spikeloom", "train", *options]
    assert get_args_parser().parse_args(words).training_script_args == words[2:]


def test_random_inputs_have_no_accuracy() -> None:
    words = ["run", "report_ms_resnet34", "model.T=1", "--input=1x16x16", "--images=2"]
    found = json.loads(spikeloom(*words, "--json").out)
    assert found["accuracy"] is None
    assert found["model_accuracy"] is None
    text = spikeloom(*words)
    assert "accuracy" not in text.out
    assert text.out.count("ms an image") == 2
    assert "model_accuracy" not in json.loads(spikeloom(*words, "--no-compare", "--json").out)


OLD_SPELLINGS = {
    "train run=here": "--out here",
    "train resume=here": "--resume here",
    "audit report_vgg16 images=3": "--images 3",
    "audit report_vgg16 batch=3": "--batch 3",
    "audit report_vgg16 input=3x8x8": "--input 3x8x8",
    "audit spikformer_4_384 histograms=a.html": "--histograms a.html",
    "run report_vgg16 save=a": "--save a",
    "run report_vgg16 engine=a": "--engine a",
    "run report_vgg16 weights=exact": "--weights exact",
    "run report_vgg16 compare=false": "--no-compare",
    "export report_vgg16 --to=nir input=3x8x8": "--input 3x8x8",
    "export report_vgg16 --to=nir out=a": "--out a",
    "report nowhere out=a": "--out a",
    "report nowhere images=3": "--images 3",
    "reproduce report/table2 run=a": "--runs a",
    "reproduce report/table2 results=a": "--results a",
    "bench neurons quick=true": "--quick",
    "bench neurons out=a": "--out a",
    "bench methods model=a": "--model a",
    "bench events data=a": "--data a",
}


@pytest.mark.parametrize("old", OLD_SPELLINGS)
def test_an_option_written_as_a_setting_is_told_its_new_spelling(old: str) -> None:
    result = spikeloom(*old.split())
    assert result.code == 2
    [line] = result.err.splitlines()
    assert line.endswith(f"= is an option: write {OLD_SPELLINGS[old]}")
    assert list(Path().iterdir()) == []


def test_an_option_with_spaces_is_told_in_quotes() -> None:
    assert spikeloom("train", "run=a b").err.endswith("write --out 'a b'\n")
