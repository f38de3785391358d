"""Figures of weights along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, styled
from circuit.lazy import mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTITIES = {
    "top_singular_value": "top singular value",
    "effective_rank": "effective rank",
}


@styled
def svd_birth(rows: Sequence[Mapping[str, Any]], winners: Mapping[str, str]) -> Figure:
    """Top singular value (above) and effective rank (below) over steps, one column a matrix.

    Args:
        rows: of weight-svd-trace.
        winners: the matrices that are drawn, and the component that is marked in each; all others
            are thin lines.
    """
    figure = mpl.figure.Figure(figsize=(3.6 * len(winners), 4.6), layout="constrained")
    axes = figure.subplots(2, len(winners), sharex=True, sharey="row", squeeze=False)
    for column, (matrix, winner) in enumerate(winners.items()):
        own = [row for row in rows if row["matrix"] == matrix]
        for panel, quantity in zip(axes[:, column], _QUANTITIES, strict=True):
            others: str | None = "other heads"
            for component in dict.fromkeys(row["component"] for row in own):
                course = [row for row in own if row["component"] == component]
                marked = component == winner
                panel.plot(
                    [row["step"] for row in course],
                    [row[quantity] for row in course],
                    color=COLOURS[1] if marked else "0.6",
                    linewidth=1.8 if marked else 0.7,
                    marker="o" if marked else None,
                    markersize=3,
                    zorder=3 if marked else 2,
                    label=f"{component}, grew most" if marked else others,
                )
                others = others if marked else None
        axes[0, column].set_title(matrix)
        axes[0, column].legend(loc="upper left")
        axes[1, column].set_xlabel("optimizer step")
    for panel, label in zip(axes[:, 0], _QUANTITIES.values(), strict=True):
        panel.set_ylabel(label)
    return figure
