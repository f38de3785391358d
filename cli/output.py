"""What the commands print: summaries on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from circuit import CircuitError
from circuit.quoting import plain_text, shown

from . import signals
from .streams import BLOCKS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from circuit.reports.report import ReportResult
    from circuit.reports.tables import Table as Declared


class _Late:
    """A console of rich's, which is imported and made when something is printed."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    @cached_property
    def console(self) -> Console:
        """It, on which texts stay as they are."""
        from .console import Plain

        return Plain(highlight=False, markup=False, emoji=False, **self._settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


_on_terminal = sys.stdout is not None and sys.stdout.isatty()
# a pipe has no width: 80 columns would break paths and tables that a program or a file takes whole
stdout = cast("Console", _Late(width=None if _on_terminal else 120))
_stderr = _Late(stderr=True)
stderr = cast("Console", _stderr)


def print_error(error: CircuitError) -> None:
    """One line on stderr, unwrapped, without rich, whose import takes longer than a refusal."""
    line = typer.style("error: ", fg="red", bold=True) + shown(error)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    typer.echo(line, file=sys.stderr, color=False if plain else None)


def say_interrupted(further: str) -> int:
    """One line on stderr, and the exit code of a command that a signal has ended."""
    stderr.print(f"interrupted; {further}", soft_wrap=True)
    return signals.exit_code()


@contextmanager
def interrupted_says(further: str) -> Iterator[None]:
    """A block that a signal may end, and what can be done then."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(say_interrupted(further)) from None


def print_json(payload: Mapping[str, Any]) -> None:
    """One JSON object on stdout, for `--json`."""
    typer.echo(json.dumps(payload, allow_nan=False))


def print_written(paths: Sequence[Path | str]) -> None:
    """The closing line of a command: where its outputs stand."""
    from rich.text import Text

    for path in paths:
        stdout.print(Text("wrote ", style="dim") + Text(shown(path)), soft_wrap=True)


def print_table(declared: Declared) -> None:
    """A report's table: the rows that it has for the console."""
    rows = declared.printed
    title = declared.title
    steps = {row["step"] for row in declared.rows if "step" in row}
    if len(steps) > 1:
        title = f"{title}, step {max(steps)}" if title else f"step {max(steps)}"
    shown = table(title or None, declared.headings, declared.is_text)
    for row in rows:
        shown.add_row(*declared.cells(row))
    stdout.print(shown)
    if declared.left_off:
        from rich.text import Text

        stdout.print(Text(f"and {declared.left_off} more in the report", style="dim"))


def print_result(result: ReportResult, as_json: bool) -> None:
    """What a report found, where its files stand, and its law; or `--json`."""
    if as_json:
        paths = [str(path) for path in result.paths]
        print_json({"law": result.law, "summary": result.summary, "paths": paths})
        return
    for table in result.tables:
        if table.console:
            print_table(table)
    for note in result.notes:
        stdout.print(plain_text(note), soft_wrap=True)
    print_written(result.paths)
    stdout.print(result.law, soft_wrap=True)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """What there is to say of something: one line a fact."""
    grid = table(title, ["", ""])
    grid.show_header = False
    grid.columns[1].justify = "left"
    for name, value in facts.items():
        grid.add_row(name, value)
    stdout.print(grid)


def percent(value: float | None) -> str:
    """A share for a table: `97.3 %`, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def share(value: float | None) -> str:
    """A share under a heading that says %: `97.3`, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def table(title: str | None, columns: Sequence[str], words: Sequence[bool] | None = None) -> Table:
    """An empty table in the program's one style: words left, numbers right.

    In a narrow terminal words fold; numbers are never cut.

    Args:
        words: which columns hold words; the first one by default.
    """
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        if words[index] if words else index == 0:
            grid.add_column(column, justify="left", overflow="fold", min_width=min(12, len(column)))
        else:
            grid.add_column(column, justify="right", no_wrap=True)
    return grid


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A line of block characters, as wide as there are values up to `width`."""
    count = min(width, len(values))
    means = [
        sum(chunk) / len(chunk)
        for i in range(count)
        if (chunk := values[i * len(values) // count : (i + 1) * len(values) // count])
    ]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round(7 * (value - low) / span)] for value in means)


class _NoBar:
    """Where none is shown: rich is not imported for it."""

    console = stderr

    def add_task(self, *_: Any, **__: Any) -> int:
        """None."""
        return 0

    def update(self, *_: Any, **__: Any) -> None:
        """Nothing moves."""


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[Progress]:
    """A bar on stderr with count, rate and time left; a task's `note` field is shown behind."""
    if not (enabled and sys.stderr.isatty()):
        yield cast("Progress", _NoBar())
        return
    from .bar import COLUMNS, Progress

    shown = stderr.is_terminal  # else rich leaves an empty line
    console = _stderr.console
    with Progress(*COLUMNS, console=console, disable=not shown, transient=True) as bar:
        yield bar
