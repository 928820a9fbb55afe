"""Docstrings are plain text with Markdown's backticks; autodoc reads reStructuredText. This translates."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from functools import cache
from typing import Any

SECTION = re.compile(r"^(Args|Raises|Returns|Yields|Attributes|Shapes|Example|Note):$")
CODE = re.compile(r"(``.+?``|`[^`]+`)")
SPECIAL = re.compile(r"(?<!\*)\*(?!\*)|\||(?<=\w)_(?!\w)")


def _escaped(line: str) -> str:
    """Stars, bars and final underscores outside of backticks are characters, and a code span is one."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = SPECIAL.sub(lambda found: "\\" + found[0], part)
        else:
            code, rest = part.strip("`"), parts[i + 1]
            full = _public_names().get(code)
            parts[i] = f":py:obj:`{code} <{full}>`" if full else f"``{code}``"
            if rest[:1].isalnum():  # the plural's s
                parts[i] += "\\ "
    return "".join(parts)


PACKAGES = ("neurons", "layers", "ops", "models", "data", "train", "analyse", "deploy")


@cache
def _public_names() -> dict[str, str]:
    """Where a name in backticks leads: names with a capital, and names behind their package's."""
    known = {"LIFBase": "spikeloom.neurons.lif.LIFBase"}
    known |= {f"spikeloom.{name}": f"spikeloom.{name}" for name in importlib.import_module("spikeloom").__all__}
    for package in PACKAGES:
        for name in importlib.import_module(f"spikeloom.{package}").__all__:
            full = f"spikeloom.{package}.{name}"
            known |= {full: full, f"{package}.{name}": full}
            if name != name.lower():
                known[name] = full
    return known


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def translated(lines: list[str]) -> list[str]:
    """The lines with indented blocks as literal ones, and special characters escaped elsewhere."""
    found: list[str] = []
    block: int | None = None  # the indent of the literal block that we are in
    section: int | None = None  # the indent of the heading of the section that we are in
    before = ""  # the last line with text
    for line in lines:
        text = line.strip()
        if not text:
            found.append(line)
            continue
        indent = _indent(line)
        if block is not None and indent >= block:
            found.append(line)
            continue
        block = None
        if SECTION.match(text):
            section = indent
        elif section is not None and indent <= section:
            section = None
        blank = bool(found) and not found[-1].strip()
        if blank and indent >= _indent(before) + 2 and section is None:
            block = indent
            pad = " " * _indent(before)
            found += [f"{pad}.. code-block:: text", ""]
            found.append(line)
            continue
        if re.match(r"[-*] ", text) and not blank and found and not re.match(r"[-*] ", before.strip()):
            found.append("")
        text = re.sub(r"^(Shapes|Units):", r"**\1:**", text)
        found.append(" " * indent + (text[:2] + _escaped(text[2:]) if text[:2] in ("- ", "* ") else _escaped(text)))
        before = line
    return found


@cache
def comments(package: str) -> dict[str, str]:
    """The strings below module-level names in all modules of a package."""
    from sphinx.pycode import ModuleAnalyzer

    known: dict[str, str] = {}
    module = importlib.import_module(package)
    names = [m.name for m in pkgutil.walk_packages(getattr(module, "__path__", []), f"{package}.")]
    for name in [package, *names]:
        if name.endswith(("__main__", "_native")):
            continue
        # By its file: a module may need what is not installed.
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        analyzer = ModuleAnalyzer.for_file(found.origin, name)
        for (owner, variable), text in analyzer.find_attr_docs().items():
            if not owner:
                known.setdefault(variable, "\n".join(text).strip())
    return known


def _entries(registry: Any) -> list[str]:
    """A line for each entry of a registry."""
    found: list[str] = []
    for name in registry:
        doc = inspect.cleandoc(registry[name].__doc__ or "").split("\n\n")[0].replace("\n", " ")
        found.append(f"- ``{name}``: {_escaped(doc)}" if doc else f"- ``{name}``")
    return found


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    from spikeloom.registry import Registry

    if what == "data":
        lines[:] = comments("spikeloom").get(name.rpartition(".")[2], "").split("\n")
    lines[:] = translated(lines)
    if what == "data" and isinstance(obj, Registry):
        lines += ["", f"A registry of {len(obj)} entries:", "", *_entries(obj)]


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples have no docstring of their own."""
    return True if (inspect.getdoc(obj) or "").startswith("Alias for field number") else None


BACK = re.compile(r'<a class="viewcode-back" href="([^"#]*)#([^"]*)">\[docs\]</a>')


def _backlinks(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Pages of source link back to names that have a place in the reference, and to no others."""
    if not page.startswith("_modules/"):
        return
    objects = app.env.domains["py"].objects

    def kept(link: re.Match[str]) -> str:
        known = objects.get(link[2])
        return link[0] if known and link[1].endswith(f"{known.docname}.html") else ""

    context["body"] = BACK.sub(kept, context["body"])


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", _backlinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
