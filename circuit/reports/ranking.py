"""Ranks of candidates, and the roles that their places give: winner, runner-up, median, bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.figures.charts import CATEGORY, GREY, Chart, chart, exact, named
from circuit.lazy import alt
from circuit.reports.report import Results
from circuit.reports.tables import Columns, Table

ROLES = ("winner", "runner_up", "median", "bottom")


def rank_candidates(scores: Mapping[str, float]) -> list[str]:
    """Candidates, the highest score first; equal scores in the order of their names."""
    return sorted(scores, key=lambda name: (-scores[name], name))


def name_roles(ranked: Sequence[str]) -> dict[str, str]:
    """Which candidate is winner, runner-up, median (the lower of two) and bottom.

    Raises:
        CircuitError: there are fewer than three, so that winner, runner-up and bottom coincide.
    """
    if len(ranked) < 3:
        raise CircuitError(f"{len(ranked)} candidates", expected="at least three to select among")
    places = (0, 1, len(ranked) // 2, len(ranked) - 1)
    return {role: ranked[place] for role, place in zip(ROLES, places, strict=True)}


def ranked_rows(
    what: str, scores: Mapping[str, float], columns: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row a candidate, the highest score first, with its place and, if it has one, its role.

    Args:
        what: name of the candidates' column.
        columns: further columns of each candidate.

    Raises:
        CircuitError: as `name_roles`.
    """
    ranked = rank_candidates(scores)
    role_of = {name: role for role, name in reversed(name_roles(ranked).items())}
    return [
        {"place": place, what: name, "role": role_of.get(name), **columns[name]}
        for place, name in enumerate(ranked, start=1)
    ]


def selected(what: str, rows: Sequence[Mapping[str, Any]], *columns: str) -> dict[str, Any]:
    """The candidates that have a role, by role, with some columns of their rows."""
    by_name = {row[what]: row for row in rows}
    roles = name_roles(list(by_name))
    return {role: {c: by_name[name][c] for c in (what, *columns)} for role, name in roles.items()}


def selection_tables(
    what: str,
    score: str,
    columns: Columns,
    results: Results[Any],
) -> list[Table]:
    """Those that have a role, on the console too, and all candidates.

    Args:
        what, score: columns of the candidates' names and of what ranks them.
        columns: of the table of all.
    """
    chosen = [{"role": role, **of} for role, of in results.summary["selected"].items()]
    short = {name: columns[name] for name in ("role", what, score)}
    return [
        Table("Selected", short, chosen, console=len(chosen)),
        Table(f"Every {what}", columns, list(results.rows())),
    ]


def ranked_bars(
    name: str, title: str, rows: Sequence[Mapping[str, Any]], what: str, score: str, label: str
) -> Chart:
    """One bar a candidate, the highest at the top and in colour.

    Args:
        what, score: columns of the candidates' names and of what ranks them.
        label: of the score.
    """
    columns = [column for column in rows[0] if column != "row_digest"]
    names = [row[what] for row in rows]
    shade = alt.condition(alt.datum.place == 1, alt.value(CATEGORY[0]), alt.value(GREY))
    bars = (
        named(name)
        .mark_bar()
        .encode(
            x=alt.X(f"{score}:Q").title(label),
            y=alt.Y(f"{what}:N").title(None).sort(names).axis(labelOverlap=False),
            color=shade,
            tooltip=exact(*columns),
        )
    )
    data = [{column: row[column] for column in columns} for row in rows]
    return chart(name, title, {name: data}, bars, height=18 * len(rows))
