"""The page of commands and options, docs/commands.md, from the program itself.

    python docs/option_tables.py

writes it anew; a test fails where it differs from the program.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from circuit.cli.app import app

PAGE = Path(__file__).parent / "commands.md"
COMMAND = "python docs/option_tables.py"
HEAD = f"""<!-- written by `{COMMAND}` -->

# The command line

Every command and every option, as the program declares them; `circuit COMMAND --help` shows the
same in a terminal. Which command answers which question stands in the [guide](guide.md).
"""
SHARED = ("--overwrite", "--device", "--threads", "--json")


def commands() -> dict[str, Any]:
    """Every command that can be typed after `circuit`, such as `trace show`, in order."""
    found: dict[str, Any] = {}

    def collect(group: Any, prefix: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                collect(command, f"{prefix}{name} ")
            else:
                found[prefix + name] = command

    collect(typer.main.get_command(app), "")
    return found


def page() -> str:
    """The whole page; commands with equal options share a table.

    Raises:
        ValueError: an option says nothing of itself, or a command.
    """
    by_table: dict[str, list[str]] = {}
    shared: dict[str, str] = {}
    for name, command in commands().items():
        if not command.help:
            raise ValueError(f"circuit {name} has no docstring, which is its help")
        for option in command.params:
            if not option.help:
                raise ValueError(f"circuit {name} {option.opts[0]} has no help")
            if option.opts[0] in SHARED:
                shared.setdefault(option.opts[0], _cell(option.help))
        by_table.setdefault(_table(command), []).append(name)
    parts = [HEAD, "## Shared options", _rows([f"| `{n}` | {shared[n]} |" for n in SHARED], 2)]
    for table, names in by_table.items():
        help_line = _cell(commands()[names[0]].help.split("\n\n")[0])
        parts += ["## " + ", ".join(f"`circuit {name}`" for name in names), help_line, table]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _table(command: Any) -> str:
    lines, shared = [], []
    for option in command.params:
        if option.opts[0] in SHARED:
            shared.append(f"`{option.opts[0]}`")
            continue
        if option.param_type_name == "argument":
            names = f"`{(option.metavar or option.name).upper().removesuffix('...')}`"
        else:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        lines.append(f"| {names} | {_default(option)} | {_cell(option.help)} |")
    also = f"Also: {', '.join(shared)}." if shared else ""
    return "\n\n".join(part for part in (_rows(lines, 3) if lines else "", also) if part)


def _rows(lines: list[str], columns: int) -> str:
    head = ["option", "default", "meaning"] if columns == 3 else ["option", "meaning"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * columns, *lines])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.default is None or option.default is False:
        return ""
    return "on" if option.default is True else f"`{option.default}`"


def _cell(text: str | None) -> str:
    """A help text as a table's cell, in which nothing is markup; a `[` is, before `](`."""
    line = " ".join((text or "").split()).replace("<", "&lt;")
    return re.sub(r"[|*]|\[(?=[^\]]*\]\()", r"\\\g<0>", line)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
