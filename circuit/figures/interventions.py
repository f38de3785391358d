"""Figures of interventions on the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTITIES = {"margin": "value margin (logits)", "answer_accuracy": "answer accuracy"}


@styled
def margin_and_accuracy(means: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Value margin (above) and answer accuracy (below) with and without the intervention.

    Over steps, one line a rank; where there are several ranks also over ranks, one line a step.

    Args:
        means: of geometry-subspace-intervention; of several splits `all` is drawn.
    """
    pooled = [row for row in means if row["split"] == "all"] or list(means)
    ranks = list(dict.fromkeys(row["rank"] for row in pooled))
    steps = list(dict.fromkeys(row["step"] for row in pooled))
    columns = 2 if len(ranks) > 1 else 1
    figure = mpl.figure.Figure(figsize=(4.6 * columns + 1, 4.6), layout="constrained")
    axes = figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)
    for panels, (quantity, label) in zip(axes, _QUANTITIES.items(), strict=True):
        panels[0].set_ylabel(label)
        baseline = [row for row in pooled if row["rank"] == ranks[0]]
        _course(panels[0], baseline, "step", f"baseline_{quantity}", "unchanged", "black", ls="--")
        _family(panels[0], pooled, "rank", ranks, "step", f"intervened_{quantity}")
        if columns == 2:
            _family(panels[1], pooled, "step", steps, "rank", f"intervened_{quantity}")
    axes[0, 0].set_title(title)
    axes[1, 0].set_xlabel("optimizer step")
    if columns == 2:
        axes[1, 1].set_xlabel("rank of the subspace")
        axes[1, 1].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    for panel in axes[1]:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
    return figure


def _family(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    by: str,
    members: Sequence[int | None],
    x: str,
    y: str,
) -> None:
    """One line a member, from dark to light."""
    shades = mpl.colormaps["viridis"].resampled(len(members) + 1)
    for index, member in enumerate(members):
        colour = COLOURS[1] if len(members) == 1 else shades(index)
        label = "intervened" if member is None else f"{by} {member}"
        _course(axes, [row for row in rows if row[by] == member], x, y, label, colour, ls="-")


def _course(
    axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, label: str, colour: Any, ls: str
) -> None:
    axes.plot(
        [row[x] for row in rows],
        [row[y] for row in rows],
        label=label,
        color=colour,
        linestyle=ls,
        marker="o",
        markersize=3,
    )
