"""Draw the README's figure, docs/formation.svg, from the rows of the quickstart's run.

    circuit quickstart && python docs/formation_figure.py

Three panels over the same steps: what the model can do, where that is, which term wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import circuit
from circuit.artifacts import read_jsonl
from circuit.attribution.series import Series
from circuit.figures.style import COLOURS, TERM_NAMES, panels, styled, svg

RUN = Path("artifacts/runs/quickstart")
SEPARATION = "analysis/bilinear_qk_match_separation/bilinear_qk_match_separation_rows.jsonl"
ATTRIBUTION = (
    "analysis/bilinear_qk_rank_adam_state_attribution"
    "/bilinear_qk_rank_adam_state_attribution_rows.jsonl"
)
TARGET = Path(__file__).parent / "formation.svg"
SPLIT = "validation_iid"


@styled
def formation(run: Path) -> Figure:
    """The figure of one run that has both reports."""
    figure, (accuracy, heads, terms) = panels(3, width=7.2, height=1.9)
    (series,) = Series.collect(read_jsonl(run / ATTRIBUTION)).values()
    winner = series.scalar.split(".")[1]
    draw_accuracy(accuracy, run)
    draw_heads(heads, run, winner)
    draw_terms(terms, series, winner)
    for axes in (accuracy, heads):
        axes.axvspan(series.start, series.end, color="black", alpha=0.05, linewidth=0)
    terms.set_xlabel("optimizer step")
    return figure


def draw_accuracy(axes: Axes, run: Path) -> None:
    """Answer accuracy by lag, and the best positional shortcut."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "evaluation"]
    rows = [row for row in rows if row["split"] == SPLIT]
    steps = [row["step"] for row in rows]
    for lag, colour in zip(rows[-1]["by_slice"]["lag"], COLOURS, strict=False):
        values = [100 * row["by_slice"]["lag"][lag]["answer_accuracy"] for row in rows]
        axes.plot(steps, values, color=colour, label=f"lag {lag}")
    ceiling = 100 * rows[-1]["shortcut_accuracy"]
    axes.axhline(ceiling, color="grey", linestyle="--", label="best positional shortcut")
    axes.set_ylabel("answers right, %")
    axes.set_title("what the model can do: answer accuracy by lag (writes since the one asked for)")
    axes.legend(loc="upper left")


def draw_heads(axes: Axes, run: Path, winner: str) -> None:
    """How far each head's QK score puts the support above the distractors."""
    rows = circuit.read_rows(run / SEPARATION)
    rows = rows[(rows["lag"] == "all") & (rows["score"] == "rank8")]
    for head, own in rows.groupby(rows["head"].astype(str)):
        colour, label = ("grey", "layer 0") if head.startswith("L0") else (COLOURS[5], "layer 1")
        if head == winner:
            colour, label = COLOURS[0], f"{winner}, which grew most"
        shown = label if label not in axes.get_legend_handles_labels()[1] else None
        axes.plot(own["step"], own["separation"], color=colour, label=shown)
    axes.set_ylabel("QK separation")
    axes.set_title("where: support above distractors in each head's QK score (rank 8)")
    axes.legend(loc="upper left")


def draw_terms(axes: Axes, series: Series, winner: str) -> None:
    """What each term of the updates added to the winner's match."""
    steps = np.concatenate([[series.start], series.steps])
    drawn = [term for term in series.path if term != "rounding"]
    for term, colour in zip(drawn, COLOURS[1:], strict=False):
        axes.plot(steps, cumulated(series.path[term]), color=colour, label=TERM_NAMES[term])
    axes.plot(steps, cumulated(series.actual), color="black", label="measured = sum of terms")
    first = cumulated(series.predicted("first_order"))
    axes.plot(steps, first, color="black", linestyle=":", label="first-order estimate")
    error = series.closure().path or 0.0
    axes.set_ylabel("change of the match")
    axes.set_title(
        f"what wrote it: the terms of the AdamW updates, in {winner}'s match"
        f" (closes to {100 * error:.0e} %)"
    )
    axes.legend(loc="upper left")


def cumulated(values: np.ndarray) -> np.ndarray:
    """Sums from the first step on, 0 in front."""
    return np.concatenate([[0.0], np.cumsum(values)])


if __name__ == "__main__":
    if not (RUN / ATTRIBUTION).is_file():
        sys.exit(f"{RUN} is not there or has no attribution: run circuit quickstart first")
    TARGET.write_text(svg(formation(RUN)))
    sys.stdout.write(f"wrote {TARGET} ({TARGET.stat().st_size / 1000:.0f} kB)\n")
