"""Data flows one way, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import spikeloom

ROOT = Path(spikeloom.__file__).parent
PACKAGES = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}

# From first to last: a part may import those before it, and itself. Those of one line do not import each other.
STAGES = [
    {"checks", "documentation", "errors", "memory", "modes", "notebook", "runtime"},
    {"files", "plugins", "registry"},
    {"data"},
    {"encode"},
    {"surrogates", "stream"},
    {"ops"},
    {"neurons"},
    {"layers", "record"},
    {"models"},
    {"train"},
    {"analyse", "deploy"},
    {"bench"},
    {"cards", "doctor", "play", "predict", "reproduce", "scores", "show", "sweep"},
    {"search"},
    {"cli"},
    {"__main__"},
]
STAGE = {name: n for n, names in enumerate(STAGES) for name in names}


def imports(path: Path) -> set[str]:
    """First parts `x` of the modules `spikeloom.x` that a file imports anywhere in it, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "spikeloom" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("spikeloom.")}
    return found


def files() -> list[Path]:
    return [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_from_a_later_stage(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own.startswith("_") and own != "__main__":
        pytest.skip("the native library's stub")
    assert own in STAGE, f"{own} has no place in the order of stages"
    for used in imports(path) - {own, "_native"}:
        public = {"__version__", "create_model", "list_models", "Stream", "Recorder", "backend", "checkpoint"}
        if used in public:
            used = {"create_model": "models", "list_models": "models", "Stream": "stream", "Recorder": "record"}.get(
                used, {"backend": "ops", "checkpoint": "stream"}.get(used, "errors")
            )
        assert used in STAGE, f"{path.name} imports the unknown spikeloom.{used}"
        assert STAGE[used] < STAGE[own], f"{own} may not import {used}: it comes later, or beside"


# Of a package with stages of its own, from first to last: each may import those before it and modules beside them.
PARTS = {"analyse": ["audit", "papers", "report"], "data": ["formats", "sets"], "deploy": ["exchange", "engine"]}


def modules() -> dict[str, Path]:
    """All modules by their names, packages by that of their `__init__.py`, without `spikeloom` itself.

    That one imports nothing when it is imported: its names are looked up when they are used.
    """
    names = {".".join(("spikeloom", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files()}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imported_modules(path: Path, known: Mapping[str, Path]) -> set[str]:
    """Modules of ours that a file imports anywhere in it: in functions, and for type checkers alone, as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            both = [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
            found |= {module if module in known else package for module, package in both}
    return found & set(known)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A path along the edges of a graph that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        *before, last = path
        if last in before:
            return path[path.index(last) :]
        if last not in done:
            for following in sorted(graph[last]):
                found = follow([*path, following])
                if found:
                    return found
            done.add(last)
        return []

    return next((found for name in graph if (found := follow([name]))), [])


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    found = circle({name: imported_modules(path, known) for name, path in known.items()})
    assert not found, " -> ".join(found)


def test_a_circle_is_found() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set[str](), "d": {"e"}, "e": {"c", "f"}, "f": {"d"}}
    assert circle(graph) == ["d", "e", "f", "d"]
    assert circle({**graph, "f": set()}) == []
    assert circle({"a": {"a"}}) == ["a", "a"]


@pytest.mark.parametrize("package", PARTS)
def test_no_part_of_a_package_imports_a_later_one(package: str) -> None:
    parts, known = PARTS[package], modules()
    assert set(parts) == {p.name for p in (ROOT / package).iterdir() if (p / "__init__.py").exists()}
    for number, part in enumerate(parts):
        for path in (ROOT / package / part).rglob("*.py"):
            used = {
                name.split(".")[2] for name in imported_modules(path, known) if name.startswith(f"spikeloom.{package}.")
            }
            assert used.isdisjoint(parts[number + 1 :]), path


def test_file_formats_know_nothing_of_data_sets() -> None:
    known = modules()
    for path in (ROOT / "data" / "formats").rglob("*.py"):
        used = {name for name in imported_modules(path, known) if name.startswith("spikeloom.data")}
        assert all(name.startswith("spikeloom.data.formats.") for name in used), path


def test_the_order_names_what_exists() -> None:
    assert {"surrogates", "ops", "neurons", "layers", "models"} <= PACKAGES


def test_models_know_nothing_of_training() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        text = path.read_text()
        assert "torch.optim" not in text, path
        assert "cross_entropy" not in text, path


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_does_not_load_torch() -> None:
    code = "import sys, spikeloom; print(spikeloom.__version__, [m for m in ('torch', 'numpy') if m in sys.modules])"
    assert in_new_process(code) == f"{spikeloom.__version__} []"


def test_everything_public_is_there() -> None:
    # A name that is listed but cannot be imported would be found by a user first.
    code = (
        "import importlib.util, spikeloom\n"
        "for name in spikeloom.__all__:\n"
        "    if name not in spikeloom._HOME and importlib.util.find_spec('spikeloom.' + name) is None: print(name)\n"
        "    elif name in spikeloom._HOME: getattr(spikeloom, name)\n"
        "assert set(spikeloom.__all__) <= set(dir(spikeloom))\n"
    )
    assert in_new_process(code) == ""


def test_imports_load_no_more_than_they_need() -> None:
    # One process after the other import: what a later one may not load, an earlier one has not loaded either.
    code = (
        "import sys, spikeloom\n"
        "def loaded(*names): print([m for m in names if m in sys.modules])\n"
        "training = 'torchvision', 'timm', 'accelerate', 'sklearn', 'pydantic', 'rich', 'typer', 'PIL', 'tensorboard'\n"
        "spikeloom.create_model; spikeloom.Stream; spikeloom.Recorder; spikeloom.neurons\n"
        "loaded(*training)\n"  # to build models
        "import spikeloom.data\n"
        "loaded('sklearn', 'torchvision', 'PIL')\n"  # to read data
        "print('spikeloom.deploy' in sys.modules, spikeloom.deploy.compile.__name__)\n"  # packages are attributes
    )
    assert in_new_process(code).splitlines() == ["[]", "[]", "False compile"]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'spikeloom' has no attribute 'nothing'"):
        spikeloom.nothing  # noqa: B018 # pyright: ignore


def test_building_models_costs_little_more_than_torch() -> None:
    code = (
        "import torch, time\nstart = time.process_time()\nimport spikeloom\nspikeloom.create_model\n"
        "print(time.process_time() - start)"
    )
    assert any(float(in_new_process(code)) <= 0.2 for _ in range(3))


def test_the_formatter_has_the_last_word() -> None:
    marks = ("# fmt: " + "skip", "# fmt: " + "off")
    here = Path(__file__).parents[1]
    places = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (here / folder).rglob("*.py")]
    assert len(places) > 100
    assert [str(path) for path in places if any(mark in path.read_text() for mark in marks)] == []


def test_functions_and_modules_stay_short() -> None:
    """A function fits a page, a module an hour's reading."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"
