"""The workflows of the forge: valid by their schema, and without what a linter warns of. Nothing here runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))


def test_there_are_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_valid(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("zizmor", path=sysconfig.get_path("scripts"))
    assert linter is not None
    found = subprocess.run([linter, "--offline", str(FOLDER)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
