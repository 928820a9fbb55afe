"""The results that come with the project: numbers and data of figures, which one command draws."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.command_line import spikeloom

from spikeloom.analyse import figure_data, read_figure
from spikeloom.registry import list_recipes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FIGURES = sorted(RESULTS.rglob("figures/*.json"))
LIMIT = 15 * 2**20  # bytes that git tracks: 15 MB as `du` counts them


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_recorded_figure_is_drawn(path: Path) -> None:
    figure = read_figure(path)
    assert figure.data
    assert figure.layout.title.text
    assert "Plotly.newPlot" in figure.to_html(include_plotlyjs=False)
    recorded = json.loads(path.read_text())
    assert figure_data(figure) == recorded, "the drawn figure has other series, or more digits are kept than recorded"


def test_records_name_their_figures() -> None:
    named = {
        path.parent / name
        for path in RESULTS.rglob("*.json")
        if path.parent.name not in ("bench", "figures")
        for name in json.loads(path.read_text()).get("figures", ())
    }
    assert named == {path for path in FIGURES if path.parts[-3] != "bench"}
    assert {str(path.parents[1].relative_to(RESULTS)) for path in named} <= set(list_recipes())


def test_there_are_no_pages() -> None:
    assert list(RESULTS.rglob("*.html")) == []


def test_the_checkout_is_small() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git, or no checkout: its size is not tested")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"git cannot list the files: {listed.stderr.decode()}")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert sum(sizes.values()) < LIMIT, f"the largest files: {', '.join(f'{f} {sizes[f]}' for f in largest)}"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.chdir(tmp_path)


def test_recorded_figures_are_drawn_without_computing() -> None:
    before = {path: path.read_bytes() for path in Path("results").rglob("*.json")}
    result = spikeloom("reproduce", "report/table3#s0t3a", "--figures")
    pages = [Path("figures/report/table3") / f"s0t3a.short.seed{seed}.curves.html" for seed in (1, 2, 3)]
    assert result.out.splitlines() == [f"drawn: {page}" for page in pages]
    assert (result.code, result.err) == (0, "")
    assert all("plotly.js v" in page.read_text() for page in pages)
    assert sorted(path.name for path in Path().iterdir()) == ["figures", "results"]
    assert {path: path.read_bytes() for path in Path("results").rglob("*.json")} == before
    assert list(Path("results").rglob("*.html")) == []


def test_where_and_which_is_chosen() -> None:
    result = spikeloom("reproduce", "report/table3", "budget=short", "seed=3", "--figures", "--out=a/b", "--json")
    assert result.code == 0
    names = [f"a/b/{row}.short.seed3.curves.html" for row in ("erm", "s0t3a", "s0t3b", "s0t3c")]
    assert json.loads(result.out) == {"drawn": names}
    Path("results").rename("elsewhere")
    result = spikeloom("reproduce", "sew/figure5_to_8#figure5_cifar", "--figures", "--results=elsewhere", "--out=c")
    assert result.out == "drawn: c/figure5_cifar.full.seed1.rates.html\n"


def test_plots_of_benchmarks() -> None:
    assert spikeloom("bench", "neurons", "--figures").out == "drawn: figures/bench/psn_speed.html\n"
    words = ["bench", "methods", "--figures", "--model=ds_resnet20", "--out=a", "--json"]
    assert json.loads(spikeloom(*words).out) == {"drawn": ["a/methods-ds_resnet20.html"]}
    assert len(spikeloom("bench", "--figures").out.splitlines()) == 3
    assert list(Path("results").rglob("*.html")) == []


MISTAKES = {
    "reproduce --figures": "name a table",
    "reproduce report/table3#s0t3z --figures": "recipe report/table3 has no row 's0t3z'; did you mean s0t3",
    "reproduce report/table3 --figures train.lr=1": "draws what is recorded and takes budget= and seed= alone",
    "reproduce report/table3 --figures budget=ful": "unknown budget 'ful'; did you mean full?",
    "reproduce report/table3#erm --figures budget=full seed=7": (
        "no figure of report/table3#erm, budget=full, seed=7 is recorded in results/report/table3/figures: "
        "there are 20 of other rows, budgets or seeds"
    ),
    "reproduce psn/speed --figures --results nowhere": (
        "no figure of psn/speed is recorded in nowhere/psn/speed/figures: 'spikeloom reproduce psn/speed' records"
    ),
    "reproduce paralif/speed --figures budget=full": (
        "no figure of paralif/speed, budget=full is recorded in results/paralif/speed/figures: "
        "there are 1 of other rows, budgets or seeds"
    ),
    "reproduce report/table2 --figures": (
        "no figure of report/table2 is recorded in results/report/table2/figures: of trained rows"
    ),
    "reproduce report/table3 --figures --results none": "recorded in none/report/table3/figures",
    "bench audit --figures": "'spikeloom bench audit' has no plot; those with one: neurons, methods",
    "bench neurons --figures --quick": "--figures draws what is recorded: leave out --quick",
    "bench neurons --results x": "--results is of --figures; tables go to --out",
    "bench methods --figures --model x": (
        "no plot methods-x is recorded in results/bench/figures: 'spikeloom bench methods --model x' records one"
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_told_in_one_line(words: str) -> None:
    result = spikeloom(*words.split())
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert MISTAKES[words] in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["results"]
