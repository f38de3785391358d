"""Intervals of a report's numbers: where they are written, and how tables and charts show them.

A row is measured with `<column>_low` and `<column>_high` of its numbers, by
circuit/core/intervals.py. Written, they stand in a file of their own, line for line beside the
rows, whose columns stay what they are. Reports of earlier versions have none, and show none.
Intervals over runs, `t_interval`, are Student's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from circuit.artifacts import Row
from circuit.core.intervals import DRAWS, Interval
from circuit.reports.report import Report, Results
from circuit.reports.tables import Columns, cell

ENDS = ("_low", "_high")


def ends(intervals: Mapping[str, Interval]) -> dict[str, float | None]:
    """Low and high of some numbers as columns of a row."""
    return {
        f"{name}{end}": value
        for name, of in intervals.items()
        for end, value in zip(ENDS, of, strict=True)
    }


def ends_of(*columns: str) -> tuple[str, ...]:
    """The names of the ends' columns."""
    return tuple(f"{column}{end}" for column in columns for end in ENDS)


def without_ends(rows: Sequence[Row]) -> list[Row]:
    """Rows without the ends of their intervals."""
    return [{n: row[n] for n in row if not n.endswith(ENDS)} for row in rows]


def apart(
    report: Report[Any], rows: Sequence[Row], *keys: str
) -> tuple[list[Row], dict[str, list[Row]]]:
    """Rows without the ends, and the file of the ends, each behind what tells the row apart."""
    beside: list[Row] = [{n: row[n] for n in row if n in keys or n.endswith(ENDS)} for row in rows]
    return without_ends(rows), {interval_file(type(report)): beside}


def interval_file(kind: type[Report[Any]], file: str = "") -> str:
    """The name of the file of intervals of a report's rows, or of those of a further file."""
    return f"{file.removesuffix('.jsonl') or kind.stem()}_intervals.jsonl"


def how_drawn(records: int) -> dict[str, Any]:
    """What a summary says of the intervals, as `bootstrap`."""
    return {"records": records, "draws": DRAWS}


def with_intervals(kind: type[Report[Any]], results: Results[Any], file: str = "") -> list[Row]:
    """The rows that were written, or those of a further file, each with its intervals if any."""
    rows = list(results.rows(file))
    if "bootstrap" not in results.summary:
        return rows
    of_rows = results.rows(interval_file(kind, file))
    return [{**row, **of_row} for row, of_row in zip(rows, of_rows, strict=True)]


def note(results: Results[Any]) -> list[str]:
    """A paragraph on what the intervals are; none where there are none."""
    said = results.summary.get("bootstrap")
    if said is None:
        return []
    if said["records"] < 2:
        return ["One record: there is no interval."]
    return [
        f"Intervals are 95 % percentiles of {said['draws']} bootstrap draws of whole records"
        f" ({said['records']} of them)."
    ]


def between(row: Mapping[str, Any], column: str, spec: str) -> str | None:
    """The interval of a number for a table: `0.28 to 0.35`; None where there is none."""
    low, high = (row.get(name) for name in ends_of(column))
    return None if low is None or high is None else f"{cell(low, spec)} to {cell(high, spec)}"


def behind_numbers(columns: Columns, names: Sequence[str]) -> dict[str, Sequence[str]]:
    """Columns of a table, behind some of them that of their intervals, `<name>_between`."""
    shown: dict[str, Sequence[str]] = {}
    for name, heading in columns.items():
        shown[name] = heading
        if name in names:
            shown[f"{name}_between"] = "95 %"
    return shown


def cells_between(row: Row, formats: Mapping[str, str]) -> dict[str, str | None]:
    """The cells of those columns, by the format of each number."""
    return {f"{name}_between": between(row, name, spec) for name, spec in formats.items()}


def said_between(row: Mapping[str, Any], column: str, spec: str) -> str:
    """The same behind a number in a sentence: ` (0.28 to 0.35)`; nothing where there is none."""
    interval = between(row, column, spec)
    return f" ({interval})" if interval else ""


def shown(rows: Iterable[Row], columns: Sequence[str]) -> list[Row]:
    """Some columns of rows, for a chart; null where a report of an earlier version lacks one."""
    return [{name: row.get(name) for name in columns} for row in rows]


def t_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of independent runs, by Student's t; None of one.

    The percentiles of a bootstrap are far too narrow with a handful of runs.
    """
    if len(values) < 2:
        return None, None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def spread(measured: Sequence[float | None]) -> dict[str, float | None]:
    """Of some values, those that there are; one alone has no deviation and no interval."""
    values = [value for value in measured if value is not None]
    return {
        "mean": fmean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
        "least": min(values, default=None),
        "most": max(values, default=None),
        **ends({"mean": t_interval(values)}),
    }
