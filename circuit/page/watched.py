"""The panel of what `circuit.watch` wrote down while somebody's own loop went on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuit.artifacts import Row
from circuit.figures.charts import (
    CATEGORY,
    POINT,
    TERM_NAMES,
    Chart,
    at_step,
    chart,
    colour,
    exact,
    fitted,
    named,
    steps,
)
from circuit.lazy import alt
from circuit.page.panel import Panel, Record, Source, Table, thinned
from circuit.runs.recording import ROWS

SCALARS = 12
"""Scalars that are drawn, at most."""
STOPS = 120
"""Steps that are drawn, at most."""
POINTS = 40
"""Steps up to which each one has a point."""
NORMS = {"gradient_norm": "gradient", "update_norm": "update", "parameter_norm": "parameters"}


def watched_panel(rows: Sequence[Row]) -> list[Panel]:
    """The scalars, rates and norms of the steps that were written down; none where none were.

    Args:
        rows: of `watch_rows.jsonl`, one a step; null where a number was not finite.
    """
    if not rows:
        return []
    shown = [rows[at] for at in thinned(range(len(rows)), STOPS)]
    names = list(dict.fromkeys(name for row in rows for name in row.get("scalars", {})))
    charts = [_scalar(at, name, shown) for at, name in enumerate(names[:SCALARS])]
    stepping = [row for row in shown if "lr" in row]  # where states alone are kept, no step is seen
    charts += [_rates(stepping), _norms(stepping)] if stepping else []
    data: dict[str, Sequence[Any]] = {key: of for one in charts for key, of in one.data.items()}
    tables, changes = [], _changes(shown, names[:SCALARS])
    if changes:
        data["watched_changes"] = changes
        terms = {term: TERM_NAMES.get(term, term) for term in changes[0] if term not in CHANGE}
        tables.append(Table("What the step changed", "watched_changes", {**CHANGE, **terms}))
    notes = []
    if len(names) > SCALARS:
        notes.append(f"Drawn are the first {SCALARS} of {len(names)} scalars.")
    return [
        Panel(
            "watched",
            "What was written down live",
            "How did the scalars go, at which rates, and how large were the steps?",
            charts=charts,
            tables=tables,
            data=data,
            sources=[Source(ROWS, ROWS, "")],
            notes=notes,
        )
    ]


CHANGE = {"scalar": "scalar", "value": "value", "actual": "actual change"}
"""Columns of the table of changes besides the terms'."""


def _scalar(at: int, name: str, rows: Sequence[Row]) -> Chart:
    records = [{"step": row["step"], "value": row.get("scalars", {}).get(name)} for row in rows]
    return _course(f"watched_{at}", name, "value", name, records, alt.Scale(zero=False))


def _rates(rows: Sequence[Row]) -> Chart:
    """One line where all groups of the optimizer have the same rates."""
    by_group = [row.get("lr_by_group", {"": row["lr"]}) for row in rows]
    if all(len(set(rates.values())) == 1 for rates in by_group):
        by_group = [{"": row["lr"]} for row in rows]
    records = [
        {"step": row["step"], "group": f"group {group}", "rate": rate}
        for row, rates in zip(rows, by_group, strict=True)
        for group, rate in rates.items()
    ]
    several = "group" if any(len(rates) > 1 for rates in by_group) else None
    scale = alt.Scale(zero=True)
    return _course("watched_rates", "Learning rate", "rate", "rate", records, scale, several)


def _norms(rows: Sequence[Row]) -> Chart:
    """Those above zero: a log scale has none."""
    records = [
        {"step": row["step"], "of": what, "norm": row[column]}
        for row in rows
        for column, what in NORMS.items()
        if row[column]  # null where it was not finite
    ]
    title = "Norms of gradient, update and parameters"
    scale = fitted(record["norm"] for record in records)
    return _course("watched_norms", title, "norm", "Euclidean norm", records, scale, "of")


def _changes(rows: Sequence[Row], names: Sequence[str]) -> list[Record]:
    """What each scalar did in a step, and the terms' contributions, where these were asked for."""
    return [
        {"step": row["step"], "scalar": name, "value": row["scalars"][name]}
        | {"actual": of["actual"], **of["terms"]}
        for row in rows
        for name, of in row.get("attribution", {}).items()
        if name in names
    ]


def _course(
    name: str,
    title: str,
    y: str,
    y_title: str,
    records: list[Record],
    scale: alt.Scale,
    by: str | None = None,
) -> Chart:
    """A line over steps, or one for each value of a column."""
    line = named(name).mark_line(strokeWidth=1.6, point=POINT if len(records) <= POINTS else False)
    values = list(dict.fromkeys(record[by] for record in records)) if by else []
    drawn = line.encode(
        x=steps(),
        y=alt.Y(f"{y}:Q").title(y_title).scale(scale).axis(tickCount=5),
        color=colour(by, values) if by else alt.value(CATEGORY[0]),
        tooltip=exact(*(records[0] if records else ())),
    )
    return chart(name, title, {name: records}, drawn, at_step())
