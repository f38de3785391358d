"""head-selection: winner, runner-up, median and bottom of the heads by growth of separation.

A candidate's score is its separation at the end of a window minus that at its start (definitions.md
section 6, cross-seed study). The largest of many is too large on the reads by which it was chosen;
with a scan of the other half of the probe records beside it, the chosen heads are measured there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from circuit.artifacts import Row, read_jsonl
from circuit.errors import CircuitError
from circuit.figures.charts import Chart
from circuit.options import Half, Option, Options
from circuit.reading import file_digest, values_of
from circuit.reports.intervals import ENDS, between, said_between, with_intervals
from circuit.reports.ranking import ranked_bars, ranked_rows, selected, selection_tables
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table
from circuit.reports.written import ANEW, Written, report_of
from circuit.schemas import is_over_all

SCAN = "bilinear-qk-match-separation"
RUN = ("config_digest", "recipe_digest", "benchmark_digest", "probe_set_sha256")
"""What tells, in the scan's provenance, whose it is."""
_MAY_DIFFER = ("half", "probe_set", "checkpoints", "checkpoint_dir", "heads")
"""Options of two scans whose heads are compared at the same steps."""


class HeadSelectionOptions(Options):
    """Which scan is ranked, and over which window."""

    separation_rows: Annotated[
        Path, Option("Row file of bilinear-qk-match-separation.", kind="separation_rows")
    ]
    start_step: Annotated[int, Option("Start of the window.", least=0)]
    end_step: Annotated[int, Option("End of the window.", least=1)]
    score: Annotated[str, Option("Which score, such as rank8 or full.", kind="score")] = "rank8"
    held_out_rows: Annotated[
        Path | None,
        Option(
            "Row file of the same scan of the other half, where the heads are measured.",
            kind="separation_rows",
        ),
    ] = None

    def check(self) -> None:
        """The window starts before it ends."""
        if self.start_step >= self.end_step:
            window = f"{self.start_step}:{self.end_step}"
            raise CircuitError(
                f"window {window}", where="`start_step`", expected="a start before its end"
            )


class HeadSelection(Report[HeadSelectionOptions]):
    """Winner, runner-up, median and bottom of the heads by growth of their separation."""

    command = "head-selection"
    Options = HeadSelectionOptions
    names = ("study select-heads",)
    panel = "Study"
    reads_run = False
    title = "Heads by growth"
    question = "Which head comes to match most, and which are its controls?"

    def prepare(self) -> None:
        path, other = self.options.separation_rows, self.options.held_out_rows
        scan = report_of(path, SCAN)
        self.scan = whose(scan)
        self.rows = read_jsonl(scan.file(path.name))
        self.held_out = [] if other is None else read_held_out(scan, report_of(other, SCAN))

    def conclude(self, rows: list[Row]) -> Findings:
        asked = self.options
        path, other = asked.separation_rows, asked.held_out_rows
        window = asked.score, asked.start_step, asked.end_step
        with values_of(path, fix=ANEW):
            ends = window_ends(self.rows, path, *window)
            found = {head: _growth(*of_head) for head, of_head in ends.items()}
            if other is not None:
                with values_of(other, fix=ANEW):
                    elsewhere = window_ends(self.held_out, other, *window, heads=list(found))
                    for head, of_head in found.items():
                        of_head |= _held_out(*elsewhere[head])
            scores = {head: of_head["growth"] for head, of_head in found.items()}
            table = ranked_rows("head", scores, found)
            chosen = selected("head", table, *found[table[0]["head"]])
            gap = gap_to_slices(self.rows, [row for pair in ends.values() for row in pair])
        law = (
            "the separation of every head, at both ends, is the mean of those by slice, weighted by"
            f" their reads, to {gap:.1g}"
        )
        files = {"separation_rows": path, "held_out_rows": other}
        digests = {f"{name}_sha256": file_digest(file) for name, file in files.items() if file}
        return Findings(
            table,
            {"candidates": len(table), "score": asked.score, "selected": chosen},
            law,
            provenance={**self.scan, **digests},
        )

    @classmethod
    def notes(cls, results: Results[HeadSelectionOptions]) -> list[str]:
        winner, window = results.summary["selected"]["winner"], results.options
        return [
            f"Of {results.summary['candidates']} heads the separation ({window.score}) of"
            f" **{winner['head']}** grew most from step {window.start_step} to {window.end_step}:"
            f" by {winner['growth']:+.4g} to {winner['separation_at_end']:.4g}.",
            *_said_held_out(winner),
        ]

    @classmethod
    def tables(cls, results: Results[HeadSelectionOptions]) -> list[Table]:
        columns: Columns = {
            "place": "place",
            "head": "head",
            "role": "role",
            "separation_at_start": ("at start", ".4g"),
            "separation_at_end": ("at end", ".4g"),
            "growth": ("growth", "+.4g"),
            "support_wins_at_end": ("support wins at end", ".1%"),
        }
        tables = selection_tables("head", "growth", columns, results)
        if results.options.held_out_rows is None:
            return tables
        chosen = [
            {"role": role, **of, "between": between(of, "held_out_separation_at_end", ".4g")}
            for role, of in results.summary["selected"].items()
        ]
        held_out: Columns = {
            "role": "role",
            "head": "head",
            "separation_at_end": ("where chosen", ".4g"),
            "held_out_separation_at_end": ("held out", ".4g"),
            "between": "95 %",
            "held_out_growth": ("growth", "+.4g"),
            "held_out_support_wins_at_end": ("support wins", ".1%"),
        }
        return [*tables, Table("In the other half", held_out, chosen, console=len(chosen))]

    @classmethod
    def charts(cls, results: Results[HeadSelectionOptions]) -> list[Chart]:
        window, rows = results.options, list(results.rows())
        title = (
            f"growth of separation ({window.score}), steps {window.start_step} to {window.end_step}"
        )
        label = "separation at the end minus at the start"
        return [ranked_bars("growth", title, rows, "head", "growth", label)]


def window_ends(
    rows: Sequence[Row],
    path: Path,
    score: str,
    start: int,
    end: int,
    heads: Sequence[str] = (),
) -> dict[str, tuple[Row, Row]]:
    """The rows of every head at both ends of a window, over all reads.

    Args:
        rows: of `bilinear-qk-match-separation`.
        path: of their file.
        score: which of its scores, such as `rank8`.
        heads: that are asked for; all by default.

    Raises:
        CircuitError: the rows hold no such score, step or head.
    """
    of_all = [row for row in rows if row["score"] == score and is_over_all(row)]
    if not of_all:
        held = sorted({str(row["score"]) for row in rows})
        expected = f"one of {', '.join(held)}"
        raise CircuitError(f"no rows of score '{score}'", where=path, expected=expected)
    at = {(str(row["head"]), int(row["step"])): row for row in of_all}
    steps = sorted({step for _, step in at})
    heads = heads or list(dict.fromkeys(head for head, _ in at))
    for step in (start, end):
        if step not in steps:
            near = sorted(sorted(steps, key=lambda one: abs(one - step))[:2])
            raise CircuitError(
                f"step {step} was not scanned",
                where=path,
                expected=f"a scanned step; the nearest: {', '.join(map(str, near))}",
                fix="scan that checkpoint too, or move the window",
            )
        for head in heads:
            if (head, step) not in at:
                raise CircuitError(
                    f"no row of {head} at step {step}", where=path, fix="scan that head too"
                )
    return {head: (at[head, start], at[head, end]) for head in heads}


def whose(scan: Written) -> dict[str, Any]:
    """Of which run and probe set a scan is."""
    return {name: scan.provenance[name] for name in RUN if name in scan.provenance}


def read_held_out(scan: Written, other: Written) -> list[Row]:
    """The rows of the scan of the other half, with their intervals.

    Raises:
        CircuitError: the two are not of the two halves of one probe set, or differ otherwise.
    """
    halves = [one.parameters.get("half") for one in (scan, other)]
    if set(halves) != set(get_args(Half)):
        found = " and ".join(half or "both halves" for half in halves)
        raise CircuitError(
            f"the scans are of {found}",
            where=other.path,
            expected="one of even, one of odd",
            fix="make one with `half` even and one with `half` odd",
        )
    ours, theirs = (
        {**whose(one), **{n: v for n, v in one.parameters.items() if n not in _MAY_DIFFER}}
        for one in (scan, other)
    )
    differing = next((name for name in ours if ours[name] != theirs.get(name)), None)
    if differing is not None:
        raise CircuitError(
            f"the scans differ in {differing}: {ours[differing]} and {theirs.get(differing)}",
            where=other.path,
            expected="one scan, of the other half",
        )
    assert other.kind is not None
    return with_intervals(other.kind, other.results)


def _held_out(first: Row, last: Row) -> dict[str, Any]:
    """What is measured of a head on reads that did not choose it."""
    return {f"held_out_{name}": value for name, value in _growth(first, last).items()} | {
        f"held_out_{name}_at_end{end}": last[f"{name}{end}"]
        for name in ("separation", "support_wins")
        for end in ENDS
    }


def _said_held_out(winner: Mapping[str, Any]) -> list[str]:
    """A paragraph on the winner in the other half, where that was read."""
    name = "held_out_separation_at_end"
    if name not in winner:
        return []
    return [
        "In the other half of the probe records, which did not choose it, its separation is"
        f" {winner[name]:.4g}{said_between(winner, name, '.4g')}, its support wins"
        f" {100 * winner['held_out_support_wins_at_end']:.1f} % of the reads."
    ]


def _growth(first: Row, last: Row) -> dict[str, Any]:
    return {
        "separation_at_start": first["separation"],
        "separation_at_end": last["separation"],
        "growth": last["separation"] - first["separation"],
        "support_wins_at_end": last["support_wins"],
    }


def gap_to_slices(rows: Sequence[Row], of_all: Sequence[Mapping[str, Any]]) -> float:
    """Largest |separation over all reads - the mean of those by slice, weighted by their reads|."""
    names = ("head", "step", "score")
    by_slice: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not is_over_all(row):
            by_slice.setdefault(tuple(row[name] for name in names), []).append(row)

    def gaps() -> Iterator[float]:
        for row in of_all:
            parts = by_slice.get(tuple(row[name] for name in names), [])
            if not parts:
                raise CircuitError(f"no rows by lag of {row['head']} at step {row['step']}")
            total = sum(part["separation"] * part["reads"] for part in parts)
            yield abs(row["separation"] - total / sum(part["reads"] for part in parts))

    return max(gaps())
