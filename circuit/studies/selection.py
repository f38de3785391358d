"""head-selection: winner, runner-up, median and bottom of the heads by growth of separation.

A candidate's score is its separation at the end of a window minus that at its start (definitions.md
section 6, cross-seed study).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuit.artifacts import read_jsonl
from circuit.errors import CircuitError
from circuit.figures.comparison import ranked_bars
from circuit.reports.base import ReportResult, open_report

COMMAND = "head-selection"
ROLES = ("winner", "runner_up", "median", "bottom")


def rank_candidates(scores: Mapping[str, float]) -> list[str]:
    """Candidates, the highest score first; equal scores in the order of their names."""
    return sorted(scores, key=lambda name: (-scores[name], name))


def name_roles(ranked: Sequence[str]) -> dict[str, str]:
    """Which candidate is winner, runner-up, median (the lower of two) and bottom.

    Raises:
        CircuitError: there are fewer than three, so that winner, runner-up and bottom coincide.
    """
    if len(ranked) < 3:
        raise CircuitError(f"{len(ranked)} candidates", expected="at least three to select among")
    places = (0, 1, len(ranked) // 2, len(ranked) - 1)
    return {role: ranked[place] for role, place in zip(ROLES, places, strict=True)}


def growth_of(
    rows: Sequence[Mapping[str, Any]], score: str, start: int, end: int
) -> dict[str, dict[str, float]]:
    """Separation of every head at both ends of a window, and its growth.

    Args:
        rows: of `bilinear-qk-match-separation`.
        score: which of its scores, such as `rank8`.

    Raises:
        CircuitError: the rows hold no such score, or a head has no row at an end.
    """
    chosen = [row for row in rows if row["score"] == score and row["lag"] == "all"]
    if not chosen:
        held = sorted({str(row["score"]) for row in rows})
        raise CircuitError(f"no rows of score '{score}'", expected=f"one of {', '.join(held)}")
    ends = {(row["head"], row["step"]): row for row in chosen if row["step"] in (start, end)}
    found = {}
    for head in dict.fromkeys(str(row["head"]) for row in chosen):
        for step in (start, end):
            if (head, step) not in ends:
                steps = sorted({row["step"] for row in chosen})
                raise CircuitError(
                    f"no row of {head} at step {step}",
                    expected=f"an end among the scanned steps {steps[0]} to {steps[-1]}",
                    fix="scan that checkpoint too",
                )
        first, last = ends[head, start], ends[head, end]
        found[head] = {
            "separation_at_start": first["separation"],
            "separation_at_end": last["separation"],
            "growth": last["separation"] - first["separation"],
            "support_wins_at_end": last["support_wins"],
        }
    return found


def select_heads(
    separation_rows: Path,
    output_dir: str | Path,
    *,
    start: int,
    end: int,
    score: str = "rank8",
    overwrite: bool = False,
) -> ReportResult:
    """Rank the heads of a separation scan and name those that are attributed.

    Args:
        separation_rows: row file of `bilinear-qk-match-separation`.
        start, end: steps of the window.

    Raises:
        CircuitError: a missing or damaged file, or a window that was not scanned.
    """
    if start >= end:
        raise CircuitError(f"window {start}:{end}", expected="a start before its end")
    rows = read_jsonl(separation_rows)
    found = growth_of(rows, score, start, end)
    ranked = rank_candidates({head: of["growth"] for head, of in found.items()})
    roles = name_roles(ranked)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        role_of = {head: role for role, head in reversed(roles.items())}
        table = [
            {"place": place, "head": head, "role": role_of.get(head), **found[head]}
            for place, head in enumerate(ranked, start=1)
        ]
        selected = {role: {"head": head, **found[head]} for role, head in roles.items()}
        return writer.write(
            parameters={
                "separation_rows": str(separation_rows),
                "score": score,
                "start_step": start,
                "end_step": end,
            },
            summary={"candidates": len(ranked), "score": score, "selected": selected},
            rows=table,
            page=_page(table, score, start, end),
            figures={
                "growth": ranked_bars(
                    {head: of["growth"] for head, of in found.items()},
                    title=f"growth of separation ({score}), steps {start} to {end}",
                    label="separation at the end minus at the start",
                )
            },
            provenance={
                "separation_rows_sha256": hashlib.sha256(separation_rows.read_bytes()).hexdigest()
            },
        )


def _page(table: Sequence[Mapping[str, Any]], score: str, start: int, end: int) -> list[str]:
    winner = table[0]
    lines = [
        f"Of {len(table)} heads the separation ({score}) of **{winner['head']}** grew most from"
        f" step {start} to {end}: by {winner['growth']:+.4g} to {winner['separation_at_end']:.4g}.",
        "",
        "![growth](growth.svg)",
        "",
        "| place | head | role | at start | at end | growth | support wins at end |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['place']} | {row['head']} | {row['role'] or ''} | {row['separation_at_start']:.4g}"
        f" | {row['separation_at_end']:.4g} | {row['growth']:+.4g}"
        f" | {100 * row['support_wins_at_end']:.1f} % |"
        for row in table
    ]
    return lines
