"""The site is built without a warning, and its pages are whole: links, pictures, no network, no script that fails."""

from __future__ import annotations

import html.parser
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import spikeloom
from spikeloom import cli, documentation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("neurons", "layers", "ops", "models", "data", "train", "analyse", "deploy")


class Page(html.parser.HTMLParser):
    """What a page links to and brings."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []  # what a browser fetches by itself
        self.without_alt: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "link", "iframe", "source"):
            self.loaded += [found[key] for key in ("src", "href") if key in found]
        if tag == "img" and not found.get("alt"):
            self.without_alt.append(found.get("src", ""))
        if tag == "figure" and "plot" in found.get("class", "") and not found.get("aria-label"):
            self.without_alt.append("a figure")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, once for all processes: the one in the folder SPIKELOOM_SITE, or one that is built here."""
    if "SPIKELOOM_SITE" in os.environ:
        return ROOT / os.environ["SPIKELOOM_SITE"]
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / "site"
    with FileLock(root / "site.lock"):
        if not (root / "site.said").is_file():
            command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
            words = [*command, "-d", str(root / "doctrees"), str(DOCS), str(out)]
            # One thread: two that wait for each other stand still where other tests have the cores.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            result = subprocess.run(words, capture_output=True, text=True, env=environment)
            (root / "site.said").write_text(f"{result.returncode}\n{result.stderr[-6000:]}")
    code, _, said = (root / "site.said").read_text().partition("\n")
    assert code == "0", said
    return out


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_of_docs_is_built(site: Path) -> None:
    sources = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    assert len(sources) >= 40
    for path in sources:
        assert (site / path.relative_to(DOCS).with_suffix(".html")).is_file(), path


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    broken: list[str] = []
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            known = pages.get(target)
            fragment = urllib.parse.unquote(parts.fragment)
            if not target.is_file() or (fragment and known is not None and fragment not in known.anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken


def test_nothing_is_fetched_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert not [url for url in page.loaded if "//" in url], path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet


def test_pictures_have_alternative_text(pages: dict[Path, Page]) -> None:
    assert {str(path): page.without_alt for path, page in pages.items() if page.without_alt} == {}


def test_pictures_are_small() -> None:
    large = [p.name for p in (DOCS / "pictures").iterdir() if p.suffix != ".py" and p.stat().st_size > 150_000]
    assert large == []


def test_lessons_can_be_downloaded(site: Path) -> None:
    for lesson in (DOCS / "lessons").glob("*.md"):
        if "kernelspec:" in lesson.read_text():
            notebook = json.loads((site / "lessons" / f"{lesson.stem}.ipynb").read_text())
            assert any(cell["cell_type"] == "code" for cell in notebook["cells"])


def _extension(name: str) -> Any:
    """A module of docs/_ext."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


# --- reference --------------------------------------------------------------------------------------------------------


def _public() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for package in ("", *PACKAGES):
        module = importlib.import_module(f"spikeloom.{package}".rstrip("."))
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return [(name, value) for name, value in found if not inspect.ismodule(value)]


def test_every_public_name_is_in_the_reference(pages: dict[Path, Page]) -> None:
    known = set().union(*(page.anchors for page in pages.values()))
    # The same object may be public in two packages; its reference is where it is first.
    twice = {"spikeloom.train.RandomTemporalDelete"}
    assert [name for name, _ in _public() if name not in known and name not in twice] == []


def test_every_public_name_has_a_docstring() -> None:
    comments = _extension("docstrings").comments("spikeloom")  # of registries and names of types
    code = [(name, value) for name, value in _public() if inspect.isclass(value) or inspect.isroutine(value)]
    missing = [name for name, value in code if not inspect.getdoc(value)]
    missing += [name for name in {n for n, _ in _public()} - dict(code).keys() if name.split(".")[-1] not in comments]
    own = [name for name, value in _public() if inspect.isclass(value) and not value.__doc__]
    assert missing + own == []


def test_docstrings_are_read_without_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """The site is built where its own extra alone is installed."""
    for name in ("neurobench", "optuna"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("spikeloom.analyse.neurobench", "spikeloom.search"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert _extension("docstrings").comments.__wrapped__("spikeloom")


@pytest.mark.parametrize("package", ["neurons", "layers"])
def test_modules_say_their_shapes(package: str) -> None:
    from torch import nn

    module = importlib.import_module(f"spikeloom.{package}")
    classes = [getattr(module, name) for name in module.__all__]
    layers = [c for c in classes if inspect.isclass(c) and issubclass(c, nn.Module)]
    assert len(layers) >= 15
    assert [c.__name__ for c in layers if "[T" not in (c.__doc__ or "") and "Shapes:" not in (c.__doc__ or "")] == []


def test_models_cite_their_source() -> None:
    from spikeloom.models import MODELS

    modules = {inspect.getmodule(MODELS[name]) for name in MODELS}
    words = r"\b(19|20)\d\d\b|course report|PSU paper|project's own"
    assert [m.__name__ for m in modules if m and not re.search(words, m.__doc__ or "")] == []


# --- pages of measured rows -------------------------------------------------------------------------------------------


def test_the_table_of_models_is_that_of_registry_recipes_and_results() -> None:
    table = _extension("model_table")
    page = table.PAGE.read_text()
    assert page == table.as_markdown(dict(table.read_counts(page))), "run: python docs/_ext/model_table.py"


@pytest.mark.parametrize("model", ["colored_mnist_net", "shd_net", "ms_resnet20"])
def test_parameters_and_operations_are_counted(model: str) -> None:
    table = _extension("model_table")
    shown = dict(table.read_counts(table.PAGE.read_text()))
    for line in table.lines():
        if line.model == model:
            assert shown[line.model, line.data] == table.counted(line)


@pytest.mark.slow
def test_all_parameters_and_operations_are_counted() -> None:
    table = _extension("model_table")
    shown = dict(table.read_counts(table.PAGE.read_text()))
    assert shown == {(line.model, line.data): table.counted(line) for line in table.lines()}


def test_accuracies_of_choosing_are_those_of_the_results() -> None:
    rows = re.findall(r"\| ([\d.]+) \| `(\S+)#(\S+)` \| (\w+) \|", (DOCS / "choosing.md").read_text())
    assert len(rows) >= 30
    for shown, table, row, budget in rows:
        [*found] = (ROOT / "results" / table).glob(f"{row}.{budget}.seed*.json")
        accuracies = [json.loads(path.read_text())["measured"]["acc"] for path in found]
        assert any(abs(float(shown) - accuracy) <= 0.00501 for accuracy in accuracies), (table, row, shown, accuracies)


def test_figures_of_the_readme_are_recorded() -> None:
    from spikeloom.analyse import RULES
    from spikeloom.scores import scoreboard

    bench = ROOT / "results" / "bench"
    steps = [r for r in json.loads((bench / "training.json").read_text())["training steps"] if r.get("relu_ms")]
    relu = [row["ours_to_relu"] for row in steps]
    others = [row["spikingjelly_ms"] / row["ours_ms"] for row in steps]
    networks = json.loads((bench / "inference.json").read_text())["networks"]
    [mean] = [r for r in networks if r["run"] == "geometric mean" and r["kernels"] == "avx2" and r["batch"] == 64]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for claim in (
        f"{min(relu):.2f} to {max(relu):.2f} of its time",
        f"{min(others):.1f} to {max(others):.1f} times as long as ours",
        f"{mean['engine times faster']:.1f} times faster than the best float32 rival",
        f"{mean['at 4% active times faster']:.1f} times where 4 %",
        f"| {len(scoreboard(ROOT / 'results'))} accuracies |",
        f"by {len(RULES)} published rules",
    ):
        assert claim in readme, claim


# --- addresses in messages --------------------------------------------------------------------------------------------


def _named_pages() -> list[tuple[str, str]]:
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    return re.findall(r"\bpage\([\"']([a-z-]+)[\"'](?:, [\"']([a-z-]+)[\"'])?\)", source)


def test_pages_that_messages_name_exist(pages: dict[Path, Page], site: Path) -> None:
    named = _named_pages()
    assert len(named) >= 8
    for name, section in named:
        page = pages[site / f"{name}.html"]
        assert not section or section in page.anchors, (name, section)


def test_pages_of_modules_exist(pages: dict[Path, Page], site: Path) -> None:
    modules = [name for _, name, _ in pkgutil.walk_packages(spikeloom.__path__, "spikeloom.")]
    for prefix, (name, section) in documentation.PAGES.items():
        assert any(module.startswith(prefix) for module in modules), prefix
        assert section in pages[site / f"{name}.html"].anchors, (name, section)


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["train", "nosuch"], "training.md#recipes"),
        (["audit", "weights:nosuch"], "weights.md#what-weights-may-be"),
        (["predict", "weights:digits", __file__], "own-data.md#what-is-there-and-what-is-missing"),
        (["evaluate", "weights:mnist", "data.root=/nosuch"], "own-data.md#what-is-there-and-what-is-missing"),
        (["audit", "nosuch"], None),  # neither a run nor a model: no page says more
    ],
)
def test_a_mistake_names_the_page_of_what_was_done(
    command: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spikeloom", *command])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    [said] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert said.count("(see docs/") == (found is not None)
    assert (found or "") in said


def test_the_address_is_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documentation, "ADDRESS", "docs")
    assert documentation.page("training", "recipes") == "docs/training.md#recipes"
    monkeypatch.setattr(documentation, "ADDRESS", "https://example.org/spikeloom")
    assert documentation.page("training") == "https://example.org/spikeloom/training.html"


# --- in Chromium ------------------------------------------------------------------------------------------------------


def test_pages_open_without_an_error(site: Path, pages: dict[Path, Page], browser: Any) -> None:
    """On a desk in the light and on a phone in the dark."""
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    names = [path for path in pages if "_modules" not in path.parts]
    assert len(names) >= 40
    for path in names:
        page.goto(path.as_uri())
        for width, scheme in ((1280, "light"), (390, "dark")):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{path.name} is {wide} pixels wider than {width}"
    assert said == []
    context.close()


def test_figures_of_lessons_are_drawn(pages: dict[Path, Page], browser: Any) -> None:
    page = browser.new_page()
    for path in pages:
        if path.parent.name == "lessons" and '<figure class="plot"' in path.read_text():
            page.goto(path.as_uri())
            figures = page.locator("figure.plot").count()
            page.wait_for_function(f"document.querySelectorAll('figure.plot .main-svg').length >= {figures}")
    page.close()


def test_search_needs_no_network(site: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=surrogate")
    page.wait_for_selector("#search-results li", timeout=10_000)
    assert page.locator("#search-results li").count() >= 3
