"""The report of runs: what it says of whole, unfinished, damaged and hostile ones, and how it behaves in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command_line
from helpers.browser import Opened

from spikeloom import analyse
from spikeloom.analyse.report.data import Measurements, changes, gather_run, read_signed, write_signed
from spikeloom.analyse.report.raster import spread
from spikeloom.analyse.report.render import render, write_report
from spikeloom.cli.progress import Quiet
from spikeloom.errors import UsageError
from spikeloom.train.loop import train
from spikeloom.train.recipe import check_settings, load_recipe, parse_overrides
from spikeloom.train.run import Run

SMALL = command_line.SMALL[1:]
HOSTILE = "</script><img src=x onerror=window.hit=1>"
RECIPE = """
title = "{hostile}"
paper = "{hostile} & <b>bold</b>"
command = ""
[settings]
data = {{ name = "digits", subset = 64, test_subset = 50, size = 16 }}
model = {{ name = "colored_mnist_net", image_size = 16, T = 2 }}
train = {{ epochs = 40, batch_size = 16, lr = 0.003, optimizer = "adam" }}
[budgets]
smoke.train.epochs = 1
[rows."{hostile}"]
system = "{hostile}"
published = {{ acc = 99.5, params_M = 0.1, energy_uJ = 5.0, note = "{hostile}" }}
[rows.other]
system = "other"
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, recipe: str, row: str, budget: Any, words: list[str]) -> Run:
    settings = load_recipe(recipe).resolve(row, budget, parse_overrides(words))
    run = Run.plan(folder, recipe, row, budget, settings)
    train(run, Quiet())
    return run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with their reports, and one whose folder, recipe, row and classes are markup."""
    home = tmp_path_factory.mktemp("reports")
    for name, words in (("one", SMALL), ("two", [*SMALL, "seed=2", "model.T=4", "train.epochs=3"])):
        trained(home / name, "quickstart/digits", "main", "full", words)
        write_report([home / name], {}, Quiet())
    (home / "recipe.toml").write_text(RECIPE.format(hostile=HOSTILE))
    hostile = home / HOSTILE
    trained(hostile, str(home / "recipe.toml"), HOSTILE, "smoke", [])
    write_report([hostile], {}, Quiet())
    values = read_signed(hostile / "report.json")
    values["confusion"]["classes"][3] = values["rasters"][0]["label"] = HOSTILE
    write_signed(hostile / "report.json", values)
    write_report([hostile], {}, Quiet())
    write_report([home / "one", home / "two"], {}, Quiet())
    return home


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "one", tmp_path / "run"))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_what_was_measured_agrees_with_the_run(home: Path) -> None:
    found = gather_run(home / "one", {}, Quiet())
    assert found.problems == []
    measured, [matrix] = found.measured, [found.measured.confusion]
    assert matrix is not None
    assert matrix.accuracy == found.summary["test_accuracy"]
    assert sum(map(sum, matrix.counts)) == 50
    assert measured.audit is not None
    assert measured.audit.images == 50
    layers = dict(analyse.open_target(str(home / "one"), {}).model.named_modules())
    assert all(row.name in layers for row in measured.audit.rows)
    assert measured.cost["params_M"] == found.summary["parameters"] / 1e6
    assert len(measured.rates) == 3
    assert len({raster.label for raster in measured.rasters}) == 3
    assert found.summary["memory_MB"] > 50


def test_measurements_survive_their_file(home: Path) -> None:
    found = gather_run(home / "one", {}, Quiet()).measured
    again = Measurements.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.audit is not None
    assert again.audit.energies() == found.audit.energies()  # pyright: ignore


def test_it_is_measured_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("spikeloom.analyse.report.data.open_target", never)
        write_report([copy], {}, Quiet())
    # Other images, damaged measurements and those of other weights are measured anew.
    write_report([copy], {"images": 20}, Quiet())
    assert sum(map(sum, json.loads((copy / "report.json").read_text())["confusion"]["counts"])) == 20
    for damage in (
        "{",
        '{"weights": 3}',
        json.dumps({**json.loads((copy / "report.json").read_text()), "weights": ""}),
    ):
        (copy / "report.json").write_text(damage)
        write_report([copy], {}, Quiet())
        assert sum(map(sum, json.loads((copy / "report.json").read_text())["confusion"]["counts"])) == 50


def test_the_page_is_one_small_file_without_addresses(home: Path) -> None:
    for page in (home / "one" / "report.html", home / "one" / "compared.html"):
        assert page.stat().st_size < 6_000_000
        own = page.read_text().split("<script>")[0]
        assert "http:" not in own.replace("http-equiv", "")
        assert "https:" not in own
        assert page.read_text().count("plotly.js v") == 1


def test_the_command_repeats_the_run(home: Path) -> None:
    for name in ("one", "two", HOSTILE):
        run = gather_run(home / name, {}, Quiet())
        assert run.command is not None
        words = shlex.split(run.command)
        assert words[:2] == ["spikeloom", "train"]
        recipe, _, row = words[2].partition("#")
        values = parse_overrides(words[3:])
        assert load_recipe(recipe).resolve(row or "main", values.pop("budget"), values) == run.run.settings  # pyright: ignore


@pytest.mark.parametrize(
    "words",
    [
        ["neuron=PLIF", "data.root=/a b/c", "train.milestones=[1.5, 3.0]", "train.precision=bf16"],
        ["neuron.name=LIF", "neuron.tau=3.0", 'neuron.surrogate={name="ATan", alpha=3.0}', "data.root='true'"],
        [
            'train.augment=[{name="random_crop", padding=2}, {name="random_horizontal_flip"}]',
            "train.mix.mixup=0.5",
            "seed=7",
        ],
        ["train.loss.name=tet", "train.warmup_lr=1e-5", "data.root='2026'", "model.name=report_ms_resnet34"],
    ],
)
def test_changes_are_words_that_make_them(words: list[str]) -> None:
    recipe = load_recipe("quickstart/digits")
    values = parse_overrides(words)
    base, wanted = recipe.resolve("main", "short"), recipe.resolve("main", "short", values)
    found = changes(base.model_dump(), wanted.model_dump())
    assert recipe.resolve("main", "short", parse_overrides(shlex.split(shlex.join(found)))) == wanted


def test_published_stands_beside_measured_with_the_budget(home: Path) -> None:
    page = render([gather_run(home / HOSTILE, {}, Quiet())]).split("<script>")[0]
    accuracy = json.loads((home / HOSTILE / "summary.json").read_text())["test_accuracy"]
    assert f'<th scope="row">test accuracy, %</th><td class="n">99.5</td><td class="n">{accuracy:.4g}</td>' in page
    assert 'has the budget "smoke". It differs from the full budget of the recipe in 1 setting,' in " ".join(
        page.split()
    )
    assert '<th scope="row">train.epochs</th><td>40</td><td>1</td>' in page


def test_published_energy_stands_beside_that_of_its_own_rule(home: Path) -> None:
    """The recipe's document counts by `report000`, which charges every neuron; `measured` is another number."""
    gathered = gather_run(home / "one", {}, Quiet())
    assert gathered.run is not None
    assert gathered.measured.audit is not None
    energies = {rule: gathered.measured.audit.energy(rule).pj / 1e6 for rule in ("report000", "measured")}
    assert energies["report000"] != pytest.approx(energies["measured"], rel=0.01)
    row = load_recipe("report/table1").rows["s0t1b"]
    shown = dataclasses.replace(gathered, run=dataclasses.replace(gathered.run, recipe="report/table1"), row=row)
    page = render([shown]).split("<script>")[0]
    line = '<th scope="row">energy of one image, uJ</th><td class="n">14.8</td><td class="n">{:.4g}</td>'
    assert line.format(energies["report000"]) in page


def test_markup_in_names_is_text(home: Path) -> None:
    page = (home / HOSTILE / "report.html").read_text()
    own = page.split("<script>")[0]
    assert "<img src=x" not in own
    assert "<b>bold" not in own
    assert own.count("&lt;/script&gt;&lt;img src=x onerror=window.hit=1&gt;") > 5  # headings, tables, the command
    for part in own.split('<script type="application/json">')[1:]:
        json.loads(part.split("</script>")[0])


def test_a_model_that_gives_its_input_back(tmp_path: Path) -> None:
    settings = check_settings(
        {
            "data": {"name": "digits", "subset": 32, "test_subset": 20, "size": 16},
            "model": {
                "name": "masked_autoencoder",
                "encoder": "spikformer_v2_2_64",
                "image_size": 16,
                "decoder_width": 16,
                "decoder_depth": 1,
                "decoder_heads": 2,
            },
            "train": {"epochs": 1, "batch_size": 16, "loss": "reconstruction", "optimizer": "adamw", "lr": 2e-3},
        },
        "here",
    )
    run = Run.plan(tmp_path / "run", "quickstart/digits", "main", "full", settings)
    train(run, Quiet())
    page, problems = write_report([run.folder], {}, Quiet())
    assert problems == []
    own = page.read_text().split("<script>")[0]
    assert 'id="confusion"' not in own
    assert 'id="audit"' in own
    assert 'id="spikes"' in own
    assert "No single command gives these settings" in own  # not of this recipe


# --- what is broken ---------------------------------------------------------------------------------------------------


def _remove(*names: str) -> Any:
    return lambda run: [(run / name).unlink() for name in names]


def _write(name: str, text: str) -> Any:
    return lambda run: (run / name).write_text(text)


def _halve(name: str) -> Any:
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


BROKEN = {
    "unfinished": (_remove("summary.json", "model.safetensors"), "unfinished: 2 of 2 epochs; continue with"),
    "only settings": (
        _remove("summary.json", "model.safetensors", "checkpoint.safetensors", "metrics.jsonl"),
        "unfinished: 0 of 2",
    ),
    "settings cut": (_halve("settings.json"), "settings.json is not valid JSON"),
    "settings of something else": (_write("settings.json", "[1]"), "settings.json is not the settings of a run"),
    "no settings": (_remove("settings.json"), "has no settings.json"),
    "a recipe that is gone": (
        lambda run: (run / "settings.json").write_text(
            (run / "settings.json").read_text().replace("quickstart/digits", "nowhere.toml")
        ),
        "there is no recipe file nowhere.toml",
    ),
    "epochs cut": (_halve("metrics.jsonl"), "metrics.jsonl: 1 of"),
    "epochs that are bytes": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "1 of 1 lines cannot"),
    "epochs of something else": (_write("metrics.jsonl", '3\n{"epoch": "x"}\n'), "2 of 2 lines cannot be read"),
    "summary cut": (_halve("summary.json"), "summary.json is not valid JSON"),
    "summary of something else": (_write("summary.json", '{"seconds": "x", "data": 3, "test_accuracy": []}'), ""),
    "weights cut": (_halve("model.safetensors"), "truncated or not a safetensors file"),
    "weights gone": (_remove("model.safetensors"), "there is no model.safetensors"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_run_has_a_report_that_says_so(damage: str, copy: Path) -> None:
    (copy / "report.html").unlink()
    do, says = BROKEN[damage]
    do(copy)
    page, problems = write_report([copy], {}, Quiet())
    assert any(says in problem for problem in problems) or not says
    own = page.read_text().split("<script>")[0]
    assert says.replace("'", "&#39;") in own
    assert ("Missing or broken in this run" in own) == bool(problems)


def test_weights_of_another_run(home: Path, copy: Path, tmp_path: Path) -> None:
    trained(tmp_path / "larger", "quickstart/digits", "main", "full", [*SMALL, "data.size=20", "model.image_size=20"])
    shutil.copy(tmp_path / "larger" / "model.safetensors", copy)
    _, problems = write_report([copy], {}, Quiet())
    assert len(problems) == 1
    assert "another model" in problems[0]


def test_a_part_that_cannot_be_measured_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("spikeloom.analyse.report.data.audit", fails)
    page, [problem] = write_report([copy], {"images": 10}, Quiet())
    assert problem.endswith("audit could not be measured: no such kernel")
    assert 'id="spikes"' in page.read_text()
    assert 'id="audit"' not in page.read_text()


def test_what_is_no_run(home: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", home / "recipe.toml"):
        with pytest.raises(UsageError, match="is not a run"):
            write_report([folder], {}, Quiet())
    with pytest.raises(UsageError, match="named twice"):
        write_report([home / "one", home / "two" / ".." / "one"], {}, Quiet())
    with pytest.raises(UsageError, match="cannot write"):
        write_report([home / "one"], {}, Quiet(), tmp_path / "nowhere" / "page.html")


def test_neurons_of_a_raster_are_of_the_whole_layer() -> None:
    columns = torch.zeros(3, 20, 30, 30)
    columns[:, :, :, 15] = 1  # one column of each map: a thirtieth
    shown = spread(columns.flatten(1))
    assert shown.shape == (3, 200)
    assert 1 <= shown[0].sum() <= 20
    assert torch.equal(spread(torch.eye(5)), torch.eye(5))
    assert spread(torch.ones(100, 200)).shape == (100, 12)  # at most 1500 spikes


def test_a_silent_layer_is_said_not_drawn(copy: Path) -> None:
    values = read_signed(copy / "report.json")
    values["rasters"][1]["spikes"] = []
    write_signed(copy / "report.json", values)
    own = write_report([copy], {}, Quiet())[0].read_text().split("<script>")[0]
    assert own.count('class="plot"') == 5
    assert "<p>0 spikes of " in own


def test_a_verdict_that_cannot_be_given_is_said(copy: Path) -> None:
    values = read_signed(copy / "report.json")
    for row in values["audit"]["rows"][1:]:
        row |= {"operands": [row["operands"][0] | {"input": "silent"}], "breaks": False}
    del values["audit"]["untrained_norms"]  # as in files of earlier versions
    write_signed(copy / "report.json", values)
    page = " ".join(write_report([copy], {}, Quiet())[0].read_text().split("<script>")[0].split())
    assert "spike-driven</th><td>cannot tell" in page
    assert "cannot tell whether it is spike-driven: 3 of 3 layers" in page


def test_many_classes_keep_the_page_small(copy: Path) -> None:
    values = read_signed(copy / "report.json")
    for count in (100, 300):
        names = [f"class {n}" for n in range(count)]
        values["confusion"] = {
            "classes": names,
            "counts": [[(i * j) % 100 for j in range(count)] for i in range(count)],
        }
        write_signed(copy / "report.json", values)
        page = write_report([copy], {}, Quiet())[0]
        assert page.stat().st_size < 5_300_000
        assert ("Too many classes to draw" in page.read_text()) == (count == 300)


# --- in a browser -----------------------------------------------------------------------------------------------------

PAGES = ["one/report.html", "one/compared.html", f"{HOSTILE}/report.html"]


@pytest.mark.parametrize("name", PAGES)
def test_every_plot_has_data_fits_and_asks_for_nothing(browser: Any, home: Path, name: str) -> None:
    opened = Opened(browser, home / name)
    points = opened("[...document.querySelectorAll('.plot')].map(b => b.data.map(t => (t.z ?? t.x).flat().length))")
    assert len(points) == {"one/compared.html": 11}.get(name, 7)
    assert all(count > 0 for plot in points for count in plot)
    marks = opened("[...document.querySelectorAll('.plot')].map(b => b.querySelectorAll('.point, .hm image').length)")
    assert all(count > 0 for count in marks)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [(home / name).resolve().as_uri()]
    assert opened("window.hit") is None
    assert opened("document.querySelectorAll('img').length") == opened(
        "document.querySelectorAll('.raster img').length"
    )
    assert opened("[...document.images].every(i => i.naturalWidth > 0)")
    if HOSTILE in name:  # markup in the names of classes is drawn as it is
        assert HOSTILE in opened("[...document.querySelectorAll('.plot.square .xtick text')].map(t => t.textContent)")
        assert HOSTILE in opened("document.querySelector('h1').textContent")
        assert HOSTILE in opened("document.querySelector('.raster h3').textContent")
    opened("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in (1280, 390):
        opened.page.set_viewport_size({"width": width, "height": 844})
        right = (
            "Math.max(...[...document.querySelectorAll('.plot .main-svg')].map(s => s.getBoundingClientRect().right))"
        )
        opened.until(f"{right} <= {width}")
        assert opened("document.documentElement.scrollWidth") == width


def _column(opened: Opened, index: int) -> list[float]:
    rows = "[...document.querySelectorAll('#audit table')[1].tBodies[0].rows]"
    return opened(f"{rows}.map(row => +row.cells[{index}].dataset.value)")


def test_sorting_by_click_and_by_key(browser: Any, home: Path) -> None:
    opened = Opened(browser, home / "one" / "report.html")
    before = _column(opened, 1)
    table = opened.page.locator("#audit table").nth(1)
    head = table.locator("th", has_text="energy")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert _column(opened, 1) == sorted(before, reverse=True)
    opened.page.keyboard.press("Enter")  # the button has the focus
    assert head.get_attribute("aria-sort") == "ascending"
    assert _column(opened, 1) == sorted(before) != before
    opened.page.keyboard.press("Shift+Tab")
    opened.page.keyboard.press("Space")
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names)
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("layer")
    assert head.get_attribute("aria-sort") == "none"


LOOKS = """() => {
    const number = (rgb) => rgb.match(/[\\d.]+/g).slice(0, 3).map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    const light = (rgb) => number(rgb).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const page = light(getComputedStyle(document.body).backgroundColor);
    const against = (rgb) => (Math.max(page, light(rgb)) + 0.05) / (Math.min(page, light(rgb)) + 0.05);
    const colors = (q, key) => [...document.querySelectorAll(q)].map((e) => against(getComputedStyle(e)[key]));
    return {
        page,
        text: Math.min(...colors('h1, p, td, th, a, figcaption, caption, summary', 'color'), ...colors('.plot:not(.square) text', 'fill')),
        lines: Math.min(...colors('.plot .js-line', 'stroke')),
    };
}"""  # noqa: E501


def test_light_and_dark_can_be_read_and_changed_by_key(browser: Any, home: Path) -> None:
    opened = Opened(browser, home / "one" / "compared.html")

    def check(dark: bool) -> None:
        says = f"Use {'light' if dark else 'dark'} colours"
        opened.until(f"document.getElementById('theme').textContent === '{says}'")
        found = opened(LOOKS)
        assert (found["page"] < 0.2) == dark
        assert found["text"] >= 4.5
        assert found["lines"] >= 3

    check(dark=False)
    opened.page.emulate_media(color_scheme="dark")  # the system's choice, until the reader makes one
    check(dark=True)
    for dark in (False, True):
        opened.page.locator("#theme").focus()
        opened.page.keyboard.press("Enter")
        check(dark)
    opened.page.emulate_media(color_scheme="light")
    check(dark=True)
    assert opened.said == []


def test_it_can_be_read_without_seeing_it(browser: Any, home: Path) -> None:
    opened = Opened(browser, home / "one" / "compared.html")
    assert opened("document.documentElement.lang") == "en"
    assert opened("document.querySelectorAll('h1').length") == 1
    levels = opened("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert opened(
        "[...document.querySelectorAll('.plot')].every(p => p.ariaLabel && p.parentElement.querySelector('table'))"
    )
    assert opened("[...document.images].every(i => i.alt)")
    assert opened("[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope=row]'))")
    assert opened("[...document.querySelectorAll('th')].every(h => h.scope)")
    assert opened(
        "[...document.querySelectorAll('.sortable thead th')].every(h => h.querySelector('button') && h.ariaSort)"
    )
    # The first key reaches the link over the navigation; what scrolls can be reached too.
    opened.page.keyboard.press("Tab")
    assert opened("document.activeElement.className") == "skip"
    assert opened("[...document.querySelectorAll('.scroll, pre')].every(e => e.tabIndex === 0)")
    # Without scripts the tables are still there.
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((home / "one" / "report.html").resolve().as_uri())
    assert page.locator("noscript").inner_text().startswith("Plots and sorting need JavaScript")
    assert page.locator("#audit table").count() == 2
