"""The C++ sources are formatted as `.clang-format` says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in (".cpp", ".hpp"))


def test_sources_are_formatted() -> None:
    found = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or shutil.which("clang-format")
    if found is None:
        pytest.skip("clang-format is not installed")
    subprocess.run([found, "--dry-run", "--Werror", *map(str, SOURCES)], check=True, cwd=ROOT)
