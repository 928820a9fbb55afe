"""Lessons run from their first cell to their last answer, and every figure in them says in words what is seen."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from helpers.lessons import FOLDER, LESSONS, parts, run_lesson

QUICK = ("01",)  # seconds; the cells of all lessons run when the site is built, their answers in slow tests
IDS = {lesson: lesson.stem for lesson in LESSONS}


def _figure(words: str = "A line that rises.") -> go.Figure:
    return go.Figure().update_layout(title="A line", meta={"alt": words})


def check_figure(figure: go.Figure) -> None:
    assert figure.layout.title.text
    words = (figure.layout.meta or {}).get("alt", "")
    assert len(words) > 10, f"figure {figure.layout.title.text!r} has no alternative text"
    assert words.endswith(".")


def test_a_figure_without_words_is_found() -> None:
    check_figure(_figure())
    for figure in (_figure(""), go.Figure().update_layout(title="A line")):
        with pytest.raises(AssertionError, match="no alternative text"):
            check_figure(figure)


# plotly takes tensors by way of NumPy, which wishes that PyTorch's `__array__` had another argument.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "lesson",
    [
        pytest.param(lesson, id=lesson.stem, marks=() if lesson.stem.startswith(QUICK) else pytest.mark.slow)
        for lesson in LESSONS
    ],
)
def test_a_lesson_runs(lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown: list[Any] = []
    threads = torch.get_num_threads()
    run_lesson(lesson, shown.append)
    assert torch.get_num_threads() == threads
    figures = [value for value in shown if isinstance(value, go.Figure)]
    assert len(figures) >= 3
    for figure in figures:
        check_figure(figure)


def test_there_are_eight_in_the_order_of_their_page() -> None:
    page = (FOLDER / "index.md").read_text()
    names = [lesson.stem for lesson in LESSONS]
    assert len(names) == 8
    assert re.findall(r"^(\d\d-[a-z-]+)$", page, re.MULTILINE) == names
    assert re.findall(r"\((\d\d-[a-z-]+)\.md\)", page) == names


@pytest.mark.parametrize("lesson", LESSONS, ids=IDS.get)
def test_a_lesson_is_made_as_the_others(lesson: Path) -> None:
    text = lesson.read_text()
    assert text.index("**You need**") < text.index("**You will know**") < text.index("```{code-cell}")
    assert text.count("<summary>Answer</summary>") == text.count("</details>") == 2
    assert text.index("## Exercises") < text.index("## More")
    assert [kind for kind, _ in parts(lesson)].count("answer") == 2
    for _, code in parts(lesson):
        names = [node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
        modules = [node.module or "" for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        private = [
            name for name in (*names, *".".join(modules).split(".")) if name.startswith("_") and not name.endswith("__")
        ]
        assert not private, f"{lesson.name} uses {private}"
        assert max(map(len, code.splitlines())) <= 120, "a line that a page cannot show"
