"""Data flows one way, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spikeloom

ROOT = Path(spikeloom.__file__).parent
PACKAGES = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}

# From first to last: a part may import those before it, and itself. Those of one line do not import each other.
STAGES = [
    {"checks", "errors", "memory", "modes"},
    {"files", "registry"},
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
    {"cards", "doctor", "reproduce", "scores"},
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


def test_packages_are_reached_without_an_import_of_their_own() -> None:
    assert in_new_process("import spikeloom; print(spikeloom.deploy.compile.__name__)") == "compile"


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'spikeloom' has no attribute 'nothing'"):
        spikeloom.nothing  # noqa: B018 # pyright: ignore


def test_building_models_costs_little_more_than_torch() -> None:
    code = (
        "import torch, time\nstart = time.process_time()\nimport spikeloom\nspikeloom.create_model\n"
        "print(time.process_time() - start)"
    )
    assert min(float(in_new_process(code)) for _ in range(3)) <= 0.2


def test_building_models_loads_no_tools_of_training() -> None:
    code = (
        "import sys, spikeloom\nspikeloom.create_model; spikeloom.Stream; spikeloom.Recorder; spikeloom.neurons\n"
        "print([m for m in ('torchvision', 'timm', 'accelerate', 'sklearn', 'pydantic', 'rich', 'typer', 'PIL', "
        "'tensorboard') if m in sys.modules])"
    )
    assert in_new_process(code) == "[]"
