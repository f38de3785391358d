"""What the two closure reports share: fits as rows, in tables and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circuit.artifacts import Row
from circuit.core.intervals import DRAWS, RecordDraws
from circuit.figures.charts import Chart, chart, exact, named
from circuit.lazy import alt, np, torch
from circuit.quoting import markdown_text
from circuit.reports.intervals import between, ends
from circuit.reports.tables import Table
from circuit.scalars.least_squares import RESOLUTION, least_squares

NOTE = (
    "R² is about the mean (below zero, the mean alone does better); its interval is that of 95 % of"
    f" {DRAWS} bootstrap draws of whole records, each fitted anew; `held out` predicts the pairs of"
    " every record by a fit without it (5 parts), `about zero` compares with no change at all. A"
    " contribution is coefficient times mean change of the route's score; with the intercept they"
    " sum to the mean prediction. Coefficients are those of the joint fit: routes overlap."
)


def fit_deltas(
    route_score_deltas: Sequence[Mapping[str, float]],
    deltas: Sequence[float],
    records: Sequence[str],
    *,
    fit_intercept: bool,
) -> tuple[dict[str, Any], list[float]]:
    """The fit of some rows as a row, with the interval of its R², and its predictions.

    Args:
        route_score_deltas: by label, the same labels in every row; the first row's order counts.
        records: of the rows' pairs; a record is held out, and drawn, with all its pairs, sides
            and intervals.

    Raises:
        CircuitError: there is no row or no route.
    """
    labels = list(route_score_deltas[0]) if route_score_deltas else []
    x = np.array([[row[label] for label in labels] for row in route_score_deltas], dtype=float)
    x, y = x.reshape(len(deltas), len(labels)), np.array(deltas, dtype=float)
    fit = least_squares(x, y, labels, fit_intercept=fit_intercept, groups=records)
    shown = fit.to_row()
    of_r_squared = RecordDraws(records).r_squared(
        torch.from_numpy(x),
        torch.from_numpy(y),
        fit_intercept=fit_intercept,
        resolution=RESOLUTION,
    )
    row = {
        "rows": shown.pop("rows"),
        "mean_actual": float(y.mean()),
        "mean_absolute_actual": float(np.abs(y).mean()),
        **shown,
        **ends({"r_squared": of_r_squared}),
    }
    return row, fit.predicted.tolist()


def empty_fit(labels: Sequence[str]) -> dict[str, Any]:
    """The row of a fit that has no rows: every number is null."""
    one = fit_deltas([dict.fromkeys(labels, 1.0)], [1.0], ["none"], fit_intercept=False)[0]
    return {**dict.fromkeys(one), "rows": 0, "columns": len(labels), "undetermined_routes": []}


def fits_table(
    title: str, names: Mapping[str, str], fits: Sequence[Row], *, console: int = 0
) -> Table:
    """A table of fits.

    Args:
        names: key -> heading of what tells them apart.
        console: that many are printed; all without it.
    """
    columns: dict[str, str | tuple[str, str]] = {
        **names,
        "rows": "rows",
        "mean_actual": ("mean change", ".3f"),
        "r_squared": ("R²", ".3f"),
        "between": "95 %",
        "r_squared_held_out": ("held out", ".3f"),
        "r_squared_about_zero": ("about zero", ".3f"),
        "of": "rank",
        "condition_number": ("condition", ".0f"),
    }
    rows = [
        {
            **fit,
            "between": between(fit, "r_squared", ".3f"),
            "of": None if fit["rank"] is None else f"{fit['rank']} of {fit['columns']}",
        }
        for fit in fits
    ]
    return Table(title, columns, rows, console=console or len(rows))


def undetermined(fits: Sequence[Row], *names: str) -> list[str]:
    """A paragraph for all fits whose rows leave the coefficients of the same routes open.

    Args:
        names: keys of what tells the fits apart.
    """
    open_in: dict[tuple[str, ...], list[str]] = {}
    for fit in fits:
        routes = tuple(fit["undetermined_routes"])
        open_in.setdefault(routes, []).append(" ".join(str(fit[name]) for name in names))
    return [
        f"The rows do not determine the coefficients of {', '.join(map(markdown_text, routes))} in"
        f" {'any fit' if len(of) == len(fits) else ', '.join(of)}; the solution of least norm is"
        " shown."
        for routes, of in open_in.items()
        if routes
    ]


def contributions(name: str, title: str, fits: Sequence[Row], key: str) -> Chart:
    """Contribution of each route (columns) to the mean change in each fit (lines).

    Args:
        key: of what tells the fits apart; those without rows are left out.
    """
    data = [
        {
            key: fit[key],
            "route": label,
            "coefficient": fit["coefficients"][label],
            "mean_contribution": value,
            "mean_actual": fit["mean_actual"],
        }
        for fit in fits
        if fit["rows"]
        for label, value in fit["mean_contributions"].items()
    ]
    largest = max((abs(row["mean_contribution"]) for row in data), default=0.0) or 1.0
    shown = list(dict.fromkeys(row[key] for row in data))
    words = alt.Axis(labelAngle=0, labelOverlap="greedy", labelExpr="split(datum.label, /[ _]/)")
    place = named(name).encode(
        x=alt.X("route:N").title(None).sort(None).axis(words),
        y=alt.Y(f"{key}:N").title(None).sort(shown).axis(labelLimit=0),
        tooltip=exact(*(data[0] if data else ())),
    )
    shades = alt.Scale(scheme="blueorange", domain=[-largest, largest])
    dark = f"abs(datum.mean_contribution) > {0.6 * largest!r}"
    ink = alt.condition(dark, alt.value("white"), alt.value("black"))
    return chart(
        name,
        title,
        {name: data},
        place.mark_rect().encode(color=alt.Color("mean_contribution:Q").scale(shades).legend(None)),
        place.mark_text(fontSize=11).encode(
            text=alt.Text("mean_contribution:Q").format(".2f"), color=ink
        ),
        height=24 * max(1, len(shown)),
    )
