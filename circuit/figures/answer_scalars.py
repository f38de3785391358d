"""Figures of answer scalars over intervals between checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {
    "mean_first_order": "first order",
    "mean_curvature": "curvature",
    "mean_switch": "switch of competitor",
}


@styled
def parts_of_change(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel a scalar: the parts of its mean change as bars, the change itself as a mark.

    Args:
        rows: of one side and pair type; those of the bucket `all` are drawn, or of the first.
    """
    bucket = rows[0]["switch_bucket"]
    rows = [row for row in rows if row["switch_bucket"] == bucket and row["pairs"]]
    scalars = list(dict.fromkeys(row["scalar"] for row in rows))
    columns = min(2, max(1, len(scalars)))
    lines = max(1, math.ceil(len(scalars) / columns))
    figure = mpl.figure.Figure(figsize=(3.8 * columns, 1.9 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, scalar in zip(axes.flat, scalars, strict=False):
        own = [row for row in rows if row["scalar"] == scalar]
        _stack(place, own)
        place.set_title(scalar, fontsize=9)
    for place in axes.flat[len(scalars) :]:
        place.set_axis_off()
    figure.supylabel("mean change", fontsize=9)
    figure.supxlabel("interval (target step)", fontsize=9)
    if scalars:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def _stack(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars that go up from zero for what is above it, and down for what is below."""
    x = range(len(rows))
    above, below = [0.0] * len(rows), [0.0] * len(rows)
    for colour, (column, label) in zip(COLOURS, _PARTS.items(), strict=False):
        values = [row[column] for row in rows]
        base = [a if v >= 0 else b for v, a, b in zip(values, above, below, strict=True)]
        axes.bar(x, values, bottom=base, color=colour, width=0.7, label=label)
        above = [a + max(v, 0.0) for v, a in zip(values, above, strict=True)]
        below = [b + min(v, 0.0) for v, b in zip(values, below, strict=True)]
    axes.plot(x, [row["mean_delta"] for row in rows], "kD", markersize=4, label="actual change")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.use_sticky_edges = False  # else a mark at a bar's end is cut
    axes.margins(y=0.12)
    axes.set_xticks(x, [str(row["target_step"]) for row in rows], fontsize=7)
    axes.grid(False, axis="x")


@styled
def first_order_against_actual(rows: Sequence[Mapping[str, Any]], scalar: str) -> Figure:
    """One panel an interval: a point a pair and side, first order against the actual change.

    Args:
        rows: pair rows.
        scalar: whose changes are drawn.
    """
    intervals = list(dict.fromkeys((row["source_step"], row["target_step"]) for row in rows))
    columns = min(4, len(intervals))
    lines = math.ceil(len(intervals) / columns)
    figure = mpl.figure.Figure(
        figsize=(2.2 * columns + 0.6, 2.2 * lines + 0.8), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, interval in zip(axes.flat, intervals, strict=False):
        for switched, label in ((False, "same competitor"), (True, "competitor switched")):
            own = [
                row
                for row in rows
                if (row["source_step"], row["target_step"]) == interval
                and row["switched"] == switched
            ]
            place.scatter(
                [row["first_order"][scalar] for row in own],
                [row["deltas"][scalar] for row in own],
                s=6,
                alpha=0.6,
                linewidths=0,
                color=COLOURS[int(switched)],
                label=label,
            )
        place.axline((0, 0), slope=1, color="black", linewidth=0.6)
        place.set_title(f"{interval[0]} → {interval[1]}", fontsize=8)
        place.tick_params(labelsize=7)
    for place in axes.flat[len(intervals) :]:
        place.set_axis_off()
    figure.supxlabel("first order", fontsize=9)
    figure.supylabel(f"actual change of {scalar}", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, markerscale=2)
    return figure
