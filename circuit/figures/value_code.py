"""Figures of the value code: when it becomes readable, and what can put it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, panels, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_MAIN_COLOURS = {
    "oracle": "#000000",
    "true_transfer": COLOURS[0],
    "context_only": COLOURS[1],
    "source_plus_context": COLOURS[2],
}
_CONTROL_COLOURS = ("#C8C8C8", "#A0A0A0", "#787878", "#555555")


_READOUTS = {
    "centroid_accuracy": "nearest centroid",
    "centroid_accuracy_key_removed": "the same, query key removed",
    "lens_value_accuracy": "stage lens",
}


@styled
def readability(rows: Rows, group_by: str) -> Figure:
    """Accuracy over steps of three readouts (columns) at each role (rows); one line a stage.

    Dotted: how often the model's own best value is the answer.

    Args:
        rows: of value-code-subspace-report.
        group_by: the grouping that is drawn.
    """
    rows = [row for row in rows if row["group_by"] == group_by]
    roles = list(dict.fromkeys(row["position_role"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = mpl.figure.Figure(figsize=(7.4, 0.9 + 2.1 * len(roles)), layout="constrained")
    grid = figure.subplots(len(roles), len(_READOUTS), sharex=True, sharey=True, squeeze=False)
    for line, role in zip(grid, roles, strict=True):
        line[0].set_ylabel(f"accuracy at {role}")
        for ax, column in zip(line, _READOUTS, strict=True):
            for number, stage in enumerate(stages):
                own = [r for r in rows if (r["position_role"], r["stage"]) == (role, stage)]
                style = {"color": COLOURS[number % 6], "marker": ".", "markersize": 4}
                style["linewidth"] = max(0.8, 2.4 - 0.5 * number)  # equal lines stay visible
                _accuracy(ax, own, column, label=stage, **style)
            own = [r for r in rows if (r["position_role"], r["stage"]) == (role, stages[-1])]
            dotted = {"linestyle": ":", "color": "black"}
            _accuracy(ax, own, "final_value_accuracy", label="model's answer", **dotted)
            ax.set_ylim(-0.03, 1.03)
    for ax, title in zip(grid[0], _READOUTS.values(), strict=True):
        ax.set_title(title)
    for ax in grid[-1]:
        ax.set_xlabel("optimizer step")
    figure.suptitle(f"How well reads tell their {group_by.replace('_', ' ')}", fontsize="large")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _accuracy(axes: Any, rows: Rows, column: str, **style: Any) -> None:
    values = [float("nan") if row[column] is None else row[column] for row in rows]
    axes.plot([row["step"] for row in rows], values, **style)


@styled
def rescue(rows: Rows, scalars: Sequence[str], controls: Sequence[str]) -> Figure:
    """Rescue fraction of each condition by step, one panel a scalar; controls in grey, hatched.

    Whiskers are the rows' intervals. Steps at which removal did not lower a scalar have no bars:
    there is nothing to rescue. The axis keeps to -0.6 .. 1.6.

    Args:
        rows: of value-code-transfer-rescue.
        controls: names of the controls.
    """
    of = {(row["step"], row["condition"]): row for row in rows}
    steps = sorted({row["step"] for row in rows})
    names = [name for name in dict.fromkeys(c for _, c in of) if name not in ("clean", "removed")]
    figure, axes = panels(len(scalars), width=7.4, height=1.9)
    for ax, scalar in zip(axes, scalars, strict=True):
        lost = [of[step, "clean"][scalar] - of[step, "removed"][scalar] for step in steps]
        for place in (place for place, loss in enumerate(lost) if loss <= 0):
            note = {"ha": "center", "va": "center", "fontsize": "small", "color": "dimgrey"}
            ax.text(place, 0.5, "removal did\nnot lower it", **note)
        shown = [place for place, loss in enumerate(lost) if loss > 0]
        for index, name in enumerate(names):
            own = [of[steps[place], name] for place in shown]
            offset = (index - (len(names) - 1) / 2) * 0.86 / len(names)
            _bars(ax, [p + offset for p in shown], own, scalar, 0.86 / len(names), name, controls)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axhline(1, color="black", linewidth=0.6, linestyle="--")
        ax.set_ylim(-0.6, 1.6)
        ax.grid(visible=False, axis="x")
        ax.set_title(scalar.replace("_", " "))
        ax.set_ylabel("rescue fraction")
    axes[-1].set_xticks(range(len(steps)), [str(step) for step in steps])
    axes[-1].set_xlabel("optimizer step")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small"
    )
    return figure


def _bars(
    axes: Any,
    places: Sequence[float],
    rows: Rows,
    scalar: str,
    width: float,
    name: str,
    controls: Sequence[str],
) -> None:
    """The bars of one condition with their whiskers."""
    values, low, high = (
        [
            float("nan") if row[f"rescue_{scalar}{end}"] is None else row[f"rescue_{scalar}{end}"]
            for row in rows
        ]
        for end in ("", "_low", "_high")
    )
    alone = name.removesuffix("_plus_context")
    hatch = "////" if name != alone and alone in controls else None
    if alone in controls:
        colour = _CONTROL_COLOURS[list(controls).index(alone) % len(_CONTROL_COLOURS)]
    else:
        colour = _MAIN_COLOURS.get(name, "black")
    style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
    axes.bar(places, values, width, label=name.replace("_", " "), linewidth=0, **style)
    axes.vlines(places, low, high, color="black", linewidth=0.6)
