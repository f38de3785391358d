"""What the two closure reports share: fits as rows and as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circuit.artifacts import Row
from circuit.errors import CircuitError
from circuit.lazy import np
from circuit.scalars.least_squares import least_squares
from circuit.tasks.pairs import SIDES


def check_sides(sides: Sequence[str]) -> None:
    """Refuse sides of a pair that do not exist, none, or one named twice.

    Raises:
        CircuitError: says which.
    """
    if not sides or len(set(sides)) < len(sides) or not set(sides) <= set(SIDES):
        raise CircuitError(
            f"margin sides {', '.join(sides) or '(none)'}",
            expected=f"{' and '.join(SIDES)}, or one of them, each named once",
        )


def fit_deltas(
    route_score_deltas: Sequence[Mapping[str, float]],
    deltas: Sequence[float],
    pair_ids: Sequence[str],
    *,
    fit_intercept: bool,
) -> tuple[dict[str, Any], list[float]]:
    """The fit of some rows as a row, and its predictions.

    Args:
        route_score_deltas: by label, the same labels in every row; the first row's order counts.

    Raises:
        CircuitError: there is no row or no route.
    """
    labels = list(route_score_deltas[0]) if route_score_deltas else []
    x = np.array([[row[label] for label in labels] for row in route_score_deltas])
    y = np.array(deltas)
    fit = least_squares(
        x.reshape(len(y), len(labels)), y, labels, fit_intercept=fit_intercept, groups=pair_ids
    )
    shown = fit.to_row()
    row = {
        "rows": shown.pop("rows"),
        "mean_actual": float(y.mean()),
        "mean_absolute_actual": float(np.abs(y).mean()),
        **shown,
    }
    return row, fit.predicted.tolist()


def empty_fit(labels: Sequence[str]) -> dict[str, Any]:
    """The row of a fit that has no rows: every number is null."""
    one = fit_deltas([dict.fromkeys(labels, 1.0)], [1.0], ["none"], fit_intercept=False)[0]
    return {**dict.fromkeys(one), "rows": 0, "columns": len(labels), "undetermined_routes": []}


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table, a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table: first column left, the others right."""
    rule = "|---" + "|---:" * (len(heads) - 1) + "|"
    return [_line(heads), rule, *map(_line, rows)]


def fit_lines(fits: Sequence[Row], names: Mapping[str, str]) -> list[str]:
    """A table of fits.

    Args:
        fits: rows of `Fit.to_row`, and what tells them apart.
        names: key -> heading of what tells them apart.
    """
    heads = [
        *names.values(),
        "rows",
        "mean change",
        "R²",
        "held out",
        "about zero",
        "rank",
        "condition",
    ]
    return markdown(
        heads,
        [
            [
                *(fit[name] for name in names),
                fit["rows"],
                number(fit["mean_actual"]),
                number(fit["r_squared"]),
                number(fit["r_squared_held_out"]),
                number(fit["r_squared_about_zero"]),
                "-" if fit["rank"] is None else f"{fit['rank']} of {fit['columns']}",
                number(fit["condition_number"], 0),
            ]
            for fit in fits
        ],
    )


def warnings_of(fits: Sequence[Row], name: str) -> list[str]:
    """One line for each fit whose design does not determine every coefficient, and a blank one.

    Args:
        name: key of a fit's name.
    """
    found = []
    for fit in fits:
        if fit["undetermined_routes"]:
            routes = ", ".join(f"`{label}`" for label in fit["undetermined_routes"])
            found.append(
                f"- {fit[name]}: rank {fit['rank']} of {fit['columns']}. The rows do not determine"
                f" the coefficients of {routes}; the solution of least norm is shown."
            )
    return [*found, ""] if found else []


NOTE = (
    "R² is about the mean (scikit-learn's score; below zero, the mean alone does better),"
    " `held out` predicts every pair by a fit without it (5 parts), `about zero` compares with no"
    " change at all. A contribution is coefficient times mean change of the route's score;"
    " contributions and intercept sum to the mean predicted change. Routes overlap: what one"
    " stage carries, later stages carry too. Coefficients are those of the joint fit, the less"
    " certain the larger the condition number of the design."
)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
