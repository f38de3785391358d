"""Figures of closure: R², actual against predicted, contributions and scores of routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, panels, styled
from circuit.lazy import mpl, np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_WRAP = 3
"""Panels beside each other."""


@styled
def r_squared_by_scalar(fits: Rows) -> Figure:
    """Bars of R² by scalar and bucket, a mark where it is held out.

    Args:
        fits: with `scalar`, `switch_bucket`, `rows`, `r_squared`, `r_squared_held_out`; nulls
            leave a gap.
    """
    scalars = _unique(fits, "scalar")
    buckets = _unique(fits, "switch_bucket")
    figure = mpl.figure.Figure(
        figsize=(6.4, 0.9 + 0.24 * len(scalars) * (len(buckets) + 1)), layout="constrained"
    )
    axes = figure.subplots()
    height = 0.8 / len(buckets)
    for fit in fits:
        bucket = buckets.index(fit["switch_bucket"])
        place = scalars.index(fit["scalar"]) + (bucket - (len(buckets) - 1) / 2) * height
        if fit["r_squared"] is not None:
            axes.barh(place, fit["r_squared"], 0.9 * height, color=COLOURS[bucket])
            axes.text(
                max(fit["r_squared"], 0) + 0.01,
                place,
                f"{fit['r_squared']:.2f}",
                va="center",
                fontsize=7,
            )
        if fit["r_squared_held_out"] is not None:
            axes.plot(fit["r_squared_held_out"], place, "|", color="black", markersize=9)
    axes.set_yticks(range(len(scalars)), scalars)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(*_limits([fit["r_squared"] for fit in fits]))
    axes.set_xlabel("R² (stroke: pairs held out)")
    axes.set_title("Share of each scalar's changes that route scores explain")
    handles = [axes.barh(0, 0, color=COLOURS[i], label=name) for i, name in enumerate(buckets)]
    if len(buckets) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(buckets))
    return figure


@styled
def actual_against_predicted(points: Rows) -> Figure:
    """A panel a scalar, a dot a row, the line of equality.

    Args:
        points: with `panel`, `group` (colour), `actual` and `predicted`.
    """
    names, groups = _unique(points, "panel"), _unique(points, "group")
    columns = min(len(names), _WRAP)
    lines = -(-len(names) // columns)
    figure = mpl.figure.Figure(
        figsize=(max(3.6, 2.6 * columns), 0.5 + 2.6 * lines), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        own = [point for point in points if point["panel"] == name]
        for colour, group in zip(COLOURS, groups, strict=False):
            shown = [point for point in own if point["group"] == group]
            axes.scatter(
                [point["predicted"] for point in shown],
                [point["actual"] for point in shown],
                s=5,
                alpha=0.4,
                linewidths=0,
                color=colour,
                label=group,
            )
        ends = [bound(point["predicted"] for point in own) for bound in (min, max)]
        axes.plot(ends, ends, color="black", linewidth=0.7)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("predicted change")
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("actual change")
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, markerscale=2
    )
    return figure


@styled
def contributions(fits: Rows, column: str) -> Figure:
    """A table in colours: contribution of each route (rows) to the mean change (columns).

    Args:
        fits: with `column`, `mean_contributions` by label (null: left out) and `mean_actual`.
    """
    fits = [fit for fit in fits if fit["mean_contributions"] is not None]
    labels = list(fits[0]["mean_contributions"]) if fits else []
    values = np.array([[fit["mean_contributions"][label] for fit in fits] for label in labels])
    most = float(np.abs(values).max()) if values.size else 0.0
    figure = mpl.figure.Figure(
        figsize=(2.6 + 0.95 * max(len(fits), 2), 1.6 + 0.24 * len(labels)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(values, cmap="RdBu_r", vmin=-(most or 1), vmax=most or 1, aspect="auto")
    for (row, place), value in np.ndenumerate(values):
        dark = most and abs(value) > 0.6 * most
        axes.text(
            place,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    heads = [f"{fit[column].replace('_', ' ')}\n({fit['mean_actual']:+.2f})" for fit in fits]
    axes.set_xticks(range(len(fits)), [_wrapped(head) for head in heads], fontsize=7)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Coefficient × mean change of score\n(below: mean actual change)", fontsize=9)
    return figure


@styled
def scores_over_checkpoints(means: Rows) -> Figure:
    """Mean score of each route over checkpoints, and of everything; a panel a pair type.

    Args:
        means: with `step`, `pair_type`, `route`, `mean_score`, `mean_gap`.
    """
    kinds, routes = _unique(means, "pair_type"), _unique(means, "route")
    figure, grid = panels(len(kinds), width=7.6, height=3.0)
    for axes, kind in zip(grid, kinds, strict=True):
        own = [row for row in means if row["pair_type"] == kind]
        whole = {row["step"]: row["mean_gap"] for row in own}
        axes.plot(
            list(whole), list(whole.values()), color="lightgrey", linewidth=4, label="everything"
        )
        for index, route in enumerate(routes):
            shown = [row for row in own if row["route"] == route]
            axes.plot(
                [row["step"] for row in shown],
                [row["mean_score"] for row in shown],
                color=COLOURS[index % len(COLOURS)],
                linestyle=("-", ":", "-.")[index // len(COLOURS) % 3],
                marker="o",
                markersize=2.5,
                label=route,
            )
        axes.set_title(f"{kind} pairs")
        axes.set_ylabel("mean score (logits)")
        axes.set_yscale("symlog", linthresh=1)
    grid[-1].set_xlabel("optimizer step")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _unique(rows: Rows, key: str) -> list[str]:
    """Values of a key in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    """Limits of an R² axis: 0 to 1, wider only where a bar is below zero; never below -1."""
    least = min([value for value in values if value is not None], default=0.0)
    return max(min(0.0, 1.05 * least), -1.0), 1.05


def _wrapped(text: str) -> str:
    """Words below each other, as columns are narrow."""
    return text.replace(" ", "\n")
