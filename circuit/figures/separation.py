"""Figures of QK match separation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from circuit.figures.style import COLOURS, panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def separation_over_steps(rows: Sequence[Mapping[str, Any]], score: str) -> Figure:
    """Separation of every head over steps; below, how often the winner's support wins, by lag.

    Heads are ranked by growth; by the separation itself where there is one step only.

    Args:
        rows: of `bilinear-qk-match-separation`.
        score: which of the scores is drawn, such as `rank8`.
    """
    rows = [row for row in rows if row["score"] == score]
    heads = list(dict.fromkeys(row["head"] for row in rows))

    def course(head: str, lag: str, column: str) -> tuple[list[int], list[float]]:
        found = [row for row in rows if row["head"] == head and row["lag"] == lag]
        return [row["step"] for row in found], [row[column] for row in found]

    courses = {head: course(head, "all", "separation")[1] for head in heads}
    grown = {h: c[-1] - c[0] if len(c) > 1 else c[-1] for h, c in courses.items()}
    ranked = sorted(heads, key=lambda head: -grown[head])
    figure, (separation, wins) = panels(2, height=2.5)
    for place, head in enumerate(ranked):
        named = place < 3
        colour = COLOURS[place] if named else "#B0B0B0"
        width = 2.0 if place == 0 else 1.0
        steps, values = course(head, "all", "separation")
        label = head if named else None
        separation.plot(
            steps, values, ".-", color=colour, linewidth=width, label=label, zorder=2 * named + 1
        )
    separation.set_ylabel("separation")
    separation.set_title(f"QK match ({score}): support minus distractors, all heads")
    separation.legend(loc="upper left")
    lags = sorted({row["lag"] for row in rows} - {"all"}, key=int)
    for colour, lag in zip(COLOURS, lags, strict=False):
        steps, values = course(ranked[0], lag, "support_wins")
        wins.plot(steps, values, ".-", color=colour, label=f"lag {lag}")
    wins.set_ylim(-0.02, 1.02)
    wins.set_ylabel(f"{ranked[0]}: support wins")
    wins.set_xlabel("optimizer step")
    wins.legend(loc="lower right")
    return figure
