"""Figures that compare candidates, optimizers and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from circuit.figures.style import COLOURS, panels, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Course = Sequence[tuple[int, float]]
"""Values over optimizer steps."""

_GREY = "#B0B0B0"
_STYLES = ("-", "--", ":", "-.")


@styled
def ranked_bars(values: Mapping[str, float], *, title: str, label: str) -> Figure:
    """One bar a candidate, the highest at the top and in colour."""
    ranked = sorted(values.items(), key=lambda item: item[1])
    figure = mpl.figure.Figure(figsize=(6.4, 0.8 + 0.24 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    colours = [_GREY] * (len(ranked) - 1) + [COLOURS[0]]
    axes.barh([name for name, _ in ranked], [value for _, value in ranked], color=colours)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.02)
    return figure


@styled
def courses(
    parts: Mapping[str, Mapping[str, Course]], *, title: str, groups: Mapping[str, str]
) -> Figure:
    """Courses over optimizer steps, a panel a quantity; runs of one group share a colour.

    Args:
        parts: label of each panel, and in it the course of each run.
        groups: of the runs, in the order of the legend; within one, line styles tell runs apart.
    """
    figure, axes = panels(len(parts), width=7.6, height=2.2)
    colours = {group: COLOURS[i % 7] for i, group in enumerate(dict.fromkeys(groups.values()))}
    for place, (label, by_run) in zip(axes, parts.items(), strict=True):
        for run, course in by_run.items():
            own = [name for name in groups if groups[name] == groups[run]]
            style = _STYLES[own.index(run) % len(_STYLES)]
            steps, values = [step for step, _ in course], [value for _, value in course]
            place.plot(steps, values, style, color=colours[groups[run]], label=run)
        place.set_ylabel(label)
    axes[0].set_title(title)
    axes[-1].set_xlabel("optimizer step")
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure
