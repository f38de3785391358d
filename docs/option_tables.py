"""The option tables of guide.md, from the program itself.

    python docs/option_tables.py

writes them anew between the markers in guide.md; a test fails where they differ from the program.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from circuit.cli.app import app

GUIDE = Path(__file__).parent / "guide.md"
COMMAND = "python docs/option_tables.py"
BEGIN, END = (
    f"<!-- option tables: written by `{COMMAND}` -->",
    "<!-- end of option tables -->",
)
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


def tables() -> str:
    """The Markdown of all tables; commands with equal options share one."""
    by_table: dict[str, list[str]] = {}
    shared: dict[str, str] = {}
    for name, command in commands().items():
        by_table.setdefault(_table(command), []).append(name)
        for option in command.params:
            if option.opts[0] in SHARED:
                shared.setdefault(option.opts[0], _cell(option.help))
    parts = ["### Shared options", _rows([f"| `{name}` | {shared[name]} |" for name in SHARED], 2)]
    for table, names in by_table.items():
        parts += ["### " + ", ".join(f"`circuit {name}`" for name in names), table]
    return "\n\n".join(parts)


def regenerated(text: str) -> str:
    """The guide's text with its tables written anew.

    Raises:
        ValueError: the markers are not there once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


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
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    GUIDE.write_text(regenerated(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
