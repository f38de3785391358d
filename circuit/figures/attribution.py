"""Figures of an attribution: terms over steps, parameter groups, scalars side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuit.attribution.series import Series, Values
from circuit.figures.style import COLOURS, TERM_NAMES, panels, styled
from circuit.lazy import np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def terms_and_closure(series: Series, windows: Sequence[tuple[int, int]] = ()) -> Figure:
    """Cumulative change with the stacked shares of the terms; below, the error that is left.

    Args:
        windows: their borders are marked.
    """
    figure, (change, error) = panels(2, height=2.7)
    steps = np.concatenate([[series.start], series.steps])
    shares = {name: _cumulated(values) for name, values in series.path.items()}
    drawn = [name for name in shares if name != "rounding"]
    for sign in (1, -1):  # shares of either sign are stacked on their own side of zero
        base = np.zeros(len(steps))
        for name, colour in zip(drawn, COLOURS, strict=False):
            part = np.clip(sign * shares[name], 0, None) * sign
            label = TERM_NAMES.get(name, name) if sign == 1 else None
            change.fill_between(
                steps, base, base + part, color=colour, alpha=0.35, linewidth=0, label=label
            )
            base = base + part
    actual = _cumulated(series.actual)
    change.plot(steps, actual, color="black", label="actual")
    first = _cumulated(series.predicted("first_order"))
    change.plot(steps, first, color="black", linestyle=":", label="first order")
    change.set_ylabel("cumulative change")
    change.set_title(f"{series.scalar}: what the terms of the update did")
    for kind, style, label in (("first_order", ":", "first order"), ("path", "-", "path")):
        off = np.abs(_cumulated(series.predicted(kind)) - actual)  # type: ignore[arg-type]
        error.plot(
            steps, np.where(off > 0, off, np.nan), color="black", linestyle=style, label=label
        )
    error.set_yscale("log")
    error.set_ylabel("|predicted - actual|")
    error.set_xlabel("optimizer step")
    error.legend(loc="best", ncols=2)
    for border in sorted({step for window in windows for step in window}):
        for axes in (change, error):
            axes.axvline(border, color="grey", linewidth=0.6, linestyle="--")
    figure.legend(*change.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def groups_of_terms(series: Series, partition: str, count: int = 14) -> Figure:
    """The parameter groups that moved the scalar most, each split into terms (path shares)."""
    groups = series.groups[partition]
    totals = {
        group: {term: float(values.sum()) for term, values in kinds["path"].items()}
        for group, kinds in groups.items()
    }
    ranked = sorted(totals, key=lambda group: -abs(sum(totals[group].values())))[:count]
    return _bars(
        [(group, totals[group]) for group in ranked],
        f"{series.scalar}, steps {series.start} to {series.end}: by parameters",
    )


@styled
def changes_by_scalar(series: Sequence[Series]) -> Figure:
    """Every scalar's summed change, split into terms (path shares)."""
    bars = [
        (s.scalar, {term: float(values.sum()) for term, values in s.path.items()}) for s in series
    ]
    return _bars(bars, f"steps {series[0].start} to {series[0].end}: change by scalar")


def _bars(bars: Sequence[tuple[str, dict[str, float]]], title: str) -> Figure:
    figure, (axes,) = panels(1, height=0.8 + 0.24 * len(bars))
    places = np.arange(len(bars))[::-1]
    terms = [term for term in bars[0][1] if term != "rounding"]
    ahead, behind = np.zeros(len(bars)), np.zeros(len(bars))
    for term, colour in zip(terms, COLOURS, strict=False):
        values = np.array([shares[term] for _, shares in bars])
        left = np.where(values >= 0, ahead, behind)
        axes.barh(places, values, left=left, color=colour, label=TERM_NAMES.get(term, term))
        ahead, behind = ahead + np.clip(values, 0, None), behind + np.clip(values, None, 0)
    sums = [sum(shares.values()) for _, shares in bars]
    axes.plot(sums, places, "|", color="black", markersize=9, label="sum")
    axes.set_yticks(places, [name for name, _ in bars])
    axes.axvline(0, color="black", linewidth=0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("path contribution to the scalar")
    axes.set_title(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _cumulated(values: Values) -> Values:
    found: Values = np.concatenate([[0.0], np.cumsum(values)])
    return found
