"""Tables of a report: declared once, shown in its Markdown, on the console and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuit.quoting import markdown_text

Record = Mapping[str, Any]
Columns = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Rows with headings.

    Attributes:
        title: heading; empty where the report has one table that needs none.
        columns: by key of a row, the heading, or heading and format (`format()`'s; `.1%` is a
            share). A null is a dash.
        rows: those of a course have a `step`: the page shows the chosen one, the console the last.
        console: that many rows are printed, at most.
    """

    title: str
    columns: Columns
    rows: Sequence[Record]
    console: int = 0

    @property
    def headings(self) -> list[str]:
        """Of the columns."""
        return [one if isinstance(one, str) else one[0] for one in self.columns.values()]

    def cells(self, row: Record) -> list[str]:
        """A row as text."""
        formats = ["" if isinstance(one, str) else one[1] for one in self.columns.values()]
        return [cell(row[key], spec) for key, spec in zip(self.columns, formats, strict=True)]

    @property
    def is_text(self) -> list[bool]:
        """Which columns hold words, and stand left."""
        return [any(isinstance(row[key], str) for row in self.rows) for key in self.columns]

    @property
    def printed(self) -> list[Record]:
        """The rows for the console."""
        return self._of_last[: self.console]

    @property
    def left_off(self) -> int:
        """How many rows the console does not show of those that it would."""
        return len(self._of_last) - len(self.printed)

    @property
    def _of_last(self) -> list[Record]:
        """Those of the last step, where they have steps."""
        last = max((row["step"] for row in self.rows if "step" in row), default=None)
        return [row for row in self.rows if row.get("step") == last]

    def markdown(self) -> list[str]:
        """Lines of Markdown, the title included."""
        rules = ["---" if text else "---:" for text in self.is_text]
        lines = [_line(self.headings), f"|{'|'.join(rules)}|"]
        lines += [_line(self.cells(row)) for row in self.rows]
        return [f"## {markdown_text(self.title)}", "", *lines] if self.title else lines


def cell(value: Any, spec: str = "") -> str:
    """A value as text: a dash for null, words as they are, numbers in their format."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return format(value, spec).replace("%", " %")


def by_step(
    values: Mapping[str, Mapping[str, Any]], steps: Sequence[int], spec: str, name: str
) -> dict[str, Any]:
    """Columns and rows of a table that has a row a name and a column a step.

    Args:
        values: by name and by step, the latter as text, as JSON has it.
        spec: format of the values.
        name: heading of the names.
    """
    columns = {"name": name, **{str(step): (str(step), spec) for step in steps}}
    return {"columns": columns, "rows": [{"name": n, **of} for n, of in values.items()]}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown_text, cells))} |"
