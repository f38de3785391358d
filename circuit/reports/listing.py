"""What reports say of themselves at the top of their classes, read without importing them.

Help and completion list every report. To import them all takes longer than everything else that
they do, so what is listed is read from the text: the docstring, and `command`, `names` and `panel`,
which are literals there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PANEL = "Circuits"
"""Of a report that says none, nor does a class that it is made from."""

_CLASS = re.compile(r"^class (\w+)\((\w+)", re.MULTILINE)
_SAYS = re.compile(r"^    (?:command|panel) = ", re.MULTILINE)
_END = re.compile(r"^(?:    (?:def |@)|[^\s)])", re.MULTILINE)
"""Of the top of a class: its first method, or whatever stands behind it."""


@dataclass(frozen=True)
class Listed:
    """A report's command, as it is listed.

    Attributes:
        command: the report's.
        names: the words of the command line.
        help: the first paragraph of the report's docstring.
        panel: heading of the command in `--help`.
    """

    command: str
    names: tuple[str, ...]
    help: str
    panel: str


def listed_reports() -> Iterator[Listed]:
    """Every report whose command is made from it, by the name of its module."""
    (folder,) = map(Path, import_module("circuit.reports").__path__)
    bases: dict[str, str] = {}
    says: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text("utf-8")
        for head in _CLASS.finditer(text):
            name, base = head.groups()
            bases[name] = base
            end = _END.search(text, head.end())
            top = text[head.start() : end and end.start()]
            says[name] = _said(top) if _SAYS.search(top) else {}
    for name, said in says.items():
        base = name
        while base in bases and "panel" not in says[base]:
            base = bases[base]
        if "command" in said and "generated" not in said:
            command = ast.literal_eval(said["command"])
            names = ast.literal_eval(said["names"]) if "names" in said else (command,)
            panel = ast.literal_eval(says[base]["panel"]) if base in bases else PANEL
            yield Listed(command, names, said["help"], panel)


def _said(top: str) -> dict[str, Any]:
    """The docstring's first paragraph of a class, and what it assigns."""
    (tree,) = ast.parse(top).body
    assert isinstance(tree, ast.ClassDef)
    lines = [line for line in tree.body if isinstance(line, ast.Assign)]
    said: dict[str, Any] = {ast.unparse(line.targets[0]): line.value for line in lines}
    return {"help": (ast.get_docstring(tree) or "").partition("\n\n")[0], **said}
