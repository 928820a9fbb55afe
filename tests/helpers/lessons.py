"""Lessons in docs/lessons as a reader runs them: cell after cell, the last expression of each displayed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext

FOLDER = Path(__file__).parents[2] / "docs" / "lessons"
LESSONS = sorted(FOLDER.glob("[0-9]*.md"))


def parts(lesson: Path) -> list[tuple[str, str]]:
    """Code in its order: "cell" of the notebook, "answer" in the folded answer of an exercise."""
    found: list[tuple[str, str]] = []
    for cell in jupytext.read(lesson).cells:
        if cell.cell_type == "code":
            found.append(("cell", cell.source))
        else:
            found += [("answer", code) for code in re.findall(r"^```python\n(.*?)^```", cell.source, re.DOTALL | re.M)]
    return found


def run_lesson(lesson: Path, display: Callable[[Any], None], skip_answers: bool = False) -> None:
    """Runs a lesson in a namespace of its own.

    Args:
        lesson: its file.
        display: gets the value of the last expression of each cell, unless that is None; of answers nothing.
        skip_answers: run the notebook's own cells alone.
    """
    known: dict[str, Any] = {"__name__": "__main__"}
    for number, (kind, code) in enumerate(parts(lesson), 1):
        if kind == "answer" and skip_answers:
            continue
        name = f"{lesson.name}, {kind} {number}"
        tree = ast.parse(code, name)
        last = tree.body[-1] if tree.body else None
        value = tree.body.pop().value if isinstance(last, ast.Expr) else None
        exec(compile(tree, name, "exec"), known)
        shown = None if value is None else eval(compile(ast.Expression(value), name, "eval"), known)
        if kind == "cell" and shown is not None:
            display(shown)
