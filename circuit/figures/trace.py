"""Figures of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import TERM_NAMES, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def terms_over_steps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss above, the norms of the update and of its terms below, over steps; log scales.

    Args:
        rows: the trace's rows, one a step.
    """
    steps = [row["step"] for row in rows]
    figure, (loss, terms) = panels(2)
    loss.plot(steps, [row["loss"] for row in rows], color="black", linewidth=0.8)
    loss.set_yscale("log")
    loss.set_ylabel("batch loss (nats)")
    loss.set_title("Loss, and the size of each term of the update")
    _line(terms, steps, [row["update_norm"] for row in rows], "update", color="black")
    for name in rows[0]["term_norms"]:
        if name in TERM_NAMES:
            _line(terms, steps, [row["term_norms"][name] for row in rows], TERM_NAMES[name])
    terms.set_yscale("log")
    terms.set_ylabel("Euclidean norm")
    terms.set_xlabel("optimizer step")
    figure.legend(*terms.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _line(axes: Any, steps: list[int], values: list[float], label: str, **style: Any) -> None:
    """A line without its zeros, which a log scale cannot show; nothing if all are."""
    if any(values):
        axes.plot(steps, [value or float("nan") for value in values], label=label, **style)
