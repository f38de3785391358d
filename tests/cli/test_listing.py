"""What help and completion list without building it is what there is."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from circuit.cli.program import program

from circuit.reports.listing import Listed, listed_reports
from circuit.reports.report import all_reports

WHOLE = program()


def entries(command: Any, prefix: str = "") -> dict[str, tuple[str | None, str | None]]:
    """Help and panel of every command under its words."""
    made = {}
    for name, inner in command.commands.items():
        words = f"{prefix}{name}"
        made[words] = (inner.help, inner.rich_help_panel)
        made |= entries(inner, f"{words} ") if hasattr(inner, "commands") else {}
    return made


def test_reports_are_listed_as_they_declare_themselves() -> None:
    for kind, listed in zip(
        (kind for kind in all_reports() if kind.generated), listed_reports(), strict=True
    ):
        names, text = kind.names or (kind.command,), str(kind.__doc__).partition("\n\n")[0]
        assert listed == Listed(kind.command, names, text, kind.panel)


@pytest.mark.parametrize("words", [[], ["--help"], ["trace"], ["trace", "--help"], ["nonsense"]])
def test_the_program_that_lists_has_every_command_and_no_option(words: list[str]) -> None:
    listing = typer.main.get_command(program(words))
    assert entries(listing) == entries(typer.main.get_command(WHOLE))
