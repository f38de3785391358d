"""ov-write-progress-report: when does each head match, when does it write, and what follows it.

1. `head_progress` measures every head on every pair at each checkpoint, in one forward pass.
2. Means over pairs by checkpoint, and their deltas by interval between neighbouring checkpoints.
3. Pearson correlation, over the intervals, of each head's every delta with that of every answer
   scalar. Among so many some are large by chance: the report says how large.

Further row files: `ov_write_progress_means.jsonl`, `..._deltas.jsonl`, `..._correlations.jsonl`,
and `..._means_intervals.jsonl`, the ends of means by bootstrap of records, line for line.
Columns are those of `circuit.scalars.head_progress`. A number that is not finite, as in a run that
diverged, is null.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from circuit import options
from circuit.artifacts import Row
from circuit.core.intervals import RecordDraws
from circuit.figures.charts import Chart, at_step, chart, colour, heat, legend, lines
from circuit.lazy import alt, np, torch
from circuit.model.components import all_heads, parse_component
from circuit.model.readout import read_answers
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import (
    ENDS,
    behind_numbers,
    cells_between,
    ends,
    how_drawn,
    interval_file,
    note,
    said_between,
    with_intervals,
)
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.shifted_correlations import hold_against_shifts, shifts_note
from circuit.reports.tables import Columns, Table
from circuit.scalars.answers import ANSWER_SCALARS, Competitors, answer_scalars
from circuit.scalars.head_progress import COLUMNS, REDUNDANT, ScoredReads, head_progress
from circuit.tasks.pairs import record_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    Logits = Float[Tensor, "read vocab"]

MEANS, DELTAS, CORRELATIONS = (
    f"ov_write_progress_{name}.jsonl" for name in ("means", "deltas", "correlations")
)
OUTPUTS = ANSWER_SCALARS[:5]
"""Answer scalars whose deltas are correlated with: margins, the answer's logit, the loss."""
AT_STEP = OUTPUTS[:3]
"""Those that one checkpoint alone defines."""
CHANCE = 0.05
"""Probability of `chance_level`."""


class ProgressOptions(options.ProbeOptions, options.CheckpointOptions, options.PairOptions):
    """Whose progress is measured; attention and outputs are always those of the prediction."""

    heads: options.Heads = ()
    score_query_role: options.ScoreQueryRole = "prediction"
    support_key_role: options.SupportKeyRole = "support_value"
    distractor_key_role: options.DistractorKeyRole = "value_distractors"
    record_side: options.RecordSide = "clean"
    slice: options.Slice = None
    top_k_correlations: Annotated[
        int, options.Option("Correlations listed in the summary, by size.", least=1)
    ] = 32
    nulls: Annotated[
        int,
        options.Option("Shifts of the intervals, as a null of the correlations.", least=0),
    ] = 0


class OvWriteProgress(OfCheckpoints[ProgressOptions]):
    """How heads come to match, look and write over checkpoints, and what moves with it."""

    command = "ov-write-progress-report"
    Options = ProgressOptions
    finite = False
    title = "Who writes"
    question = "Which head looks at the support and writes its value, and since when?"
    place = 2

    def prepare(self) -> None:
        super().prepare()
        asked = self.options
        self.pairs = self.inputs.pairs(asked)
        self.reads = ScoredReads.of(
            self.inputs.side(self.pairs, asked.record_side),
            query_role=asked.score_query_role,
            support_role=asked.support_key_role,
            distractor_role=asked.distractor_key_role,
        )
        self.draws = RecordDraws([record_of(pair.pair_id) for pair in self.pairs])
        self.steps: list[int] = []
        self.intervals: list[Row] = []  # beside the rows of means
        self.means: list[NDArray[np.float64]] = []  # [column, head] of each checkpoint
        self.answers: list[NDArray[np.float64]] = []  # [AT_STEP]
        self.outputs: list[NDArray[np.float64]] = []  # deltas [OUTPUTS] of each interval
        self.residuals: list[float] = []
        self.before: Logits | None = None

    def measure(self, point: Checkpointed) -> Iterator[Row]:
        heads = [parse_component(name) for name in self.options.heads] or all_heads(point.model)
        values = self.inputs.task.choices
        progress = head_progress(point.model, self.reads, heads, values)
        logits = progress.logits.cpu().double()
        at_step = self._scalars(logits, logits, logits)[: len(AT_STEP)]
        columns = torch.stack([progress.columns[name].T for name in COLUMNS]).cpu().double()
        if self.before is not None:
            both = self.before, logits
            self.outputs.append(
                (self._scalars(logits, *both) - self._scalars(self.before, *both)).mean(-1)
            )
        self.before = logits
        self.steps.append(point.step)
        self.means.append(columns.numpy().mean(-1))
        self.answers.append(at_step.mean(-1))
        self.residuals.append(progress.dla_residual)
        drawn = columns[[COLUMNS.index(name) for name in BETWEEN]]
        for head, of_head in zip(heads, drawn.unbind(1), strict=True):
            found = ends(dict(zip(BETWEEN, self.draws.means(of_head.T), strict=True)))
            self.intervals.append({"step": point.step, "head": str(head), **found})
        of_reads = at_step.T.tolist()
        for head, of_head in zip(heads, columns.permute(1, 2, 0).tolist(), strict=True):
            for pair, value, found, answers in zip(
                self.pairs, self._slices(), of_head, of_reads, strict=True
            ):
                yield {
                    "step": point.step,
                    "head": str(head),
                    "pair_id": pair.pair_id,
                    self.slice: value,
                    **_nested(COLUMNS, found),
                    **_nested(AT_STEP, answers),
                }

    def _slices(self) -> list[int | None]:
        """The value of each pair by which figures are given apart."""
        values = self.reads.batch.slice_values(self.slice)
        return [None] * len(self.pairs) if values is None else values.tolist()

    def _scalars(self, at: Logits, source: Logits, target: Logits) -> NDArray[np.float64]:
        """`[OUTPUTS, read]` at some logits, with the competitors of an interval's two ends."""
        values, answer = self.inputs.task.choices, self.reads.batch.answer.cpu()
        other = (read_answers(end, answer, values).competitor for end in (source, target))
        scalars = answer_scalars(at, answer, Competitors(*other), values)
        return torch.stack([scalars[name] for name in OUTPUTS]).numpy()

    def conclude(self, rows: list[Row]) -> Findings:
        heads = list(dict.fromkeys(row["head"] for row in rows))
        answers, deltas = np.stack(self.answers), np.diff(np.stack(self.means), axis=0)
        outputs = np.array(self.outputs).reshape(-1, len(OUTPUTS))
        means = self._mean_rows(heads)
        correlations = _correlated(heads, deltas, outputs)
        place = [
            i
            for i, row in enumerate(correlations)
            if row["write"] not in REDUNDANT and row["pearson"] is not None
        ]
        known = [correlations[i] for i in place]
        nulls = self.options.nulls
        by_head = deltas.swapaxes(1, 2)  # [interval, head, column], as the rows are
        shifts = nulls and hold_against_shifts(known, place, by_head, outputs, pearson, nulls)
        finite = [residual for residual in self.residuals if math.isfinite(residual)]
        largest = max(finite, default=math.nan)  # NaN among them would depend on their order
        slices = Counter(value for value in self._slices() if value is not None)
        summary = {
            "pairs": len(self.pairs),
            f"pairs_by_{self.slice}": {str(value): slices[value] for value in sorted(slices)},
            "steps": self.steps,
            "intervals": len(deltas),
            "match_winner": self._winner(means, "qk_separation"),
            "write_winner": self._winner(means, "head_value_margin_dla"),
            "last_step": {
                row["head"]: {name: _of(row, name) for name in SHOWN}
                for row in means[-len(heads) :]
            },
            "answers": {
                name: {"first_step": _finite(first), "last_step": _finite(last)}
                for name, first, last in zip(AT_STEP, *answers[[0, -1]].tolist(), strict=True)
            },
            "correlations": len(known),
            **({"shifts": shifts} if shifts else {}),
            "chance_level": chance_level(len(known), len(deltas)),
            # stable: then by head and write
            "top_correlations": sorted(known, key=lambda row: -abs(row["pearson"]))[
                : self.options.top_k_correlations
            ],
            "largest_dla_residual": _finite(largest),
            "bootstrap": how_drawn(self.draws.records),
        }
        law = (
            f"the direct contributions of all components sum to the logits to {largest:.1e} of the"
            f" largest logit, at {len(finite)} of {len(self.steps)} checkpoints"
        )
        if len(finite) < len(self.steps):
            law += "; at the others that is not finite"
        further: dict[str, Sequence[Row]] = {
            MEANS: means,
            DELTAS: self._delta_rows(heads, deltas, outputs),
            CORRELATIONS: correlations,
            interval_file(type(self), MEANS): self.intervals,
        }
        return Findings(rows, summary, law, further)

    def _mean_rows(self, heads: Sequence[str]) -> list[Row]:
        """Means over pairs: a row a checkpoint and head."""
        return [
            {"step": step, "head": head, "pairs": len(self.pairs)}
            | _nested(COLUMNS, columns)
            | _nested(AT_STEP, scalars.tolist())
            for step, of_step, scalars in zip(self.steps, self.means, self.answers, strict=True)
            for head, columns in zip(heads, of_step.T.tolist(), strict=True)
        ]

    def _delta_rows(
        self, heads: Sequence[str], deltas: NDArray[np.float64], outputs: NDArray[np.float64]
    ) -> list[Row]:
        """Deltas of the means, `[interval, column, head]`: a row an interval and head."""
        return [
            {"source_step": source, "target_step": target, "head": head}
            | _nested(COLUMNS, columns)
            | _nested(OUTPUTS, scalars)
            for (source, target), of_interval, scalars in zip(
                pairwise(self.steps), deltas, outputs.tolist(), strict=True
            )
            for head, columns in zip(heads, of_interval.T.tolist(), strict=True)
        ]

    def _winner(self, means: Sequence[Row], column: str) -> dict[str, Any] | None:
        """The head with the largest mean at the last step, and where it was half way there."""
        if any(row[column] is None for row in means):
            return None
        here = (row for row in means if row["step"] == self.steps[-1])
        last = max(here, key=lambda row: row[column])
        (between,) = (
            row
            for row in self.intervals
            if (row["step"], row["head"]) == (last["step"], last["head"])
        )
        course = [row[column] for row in means if row["head"] == last["head"]]
        half = (course[0] + course[-1]) / 2
        passed = (step for step, now in zip(self.steps, course, strict=True) if now >= half)
        return {
            "head": last["head"],
            "column": column,
            "first_step": course[0],
            "last_step": course[-1],
            **{f"last_step{end}": between[f"{column}{end}"] for end in ENDS},
            "half_way_step": next(passed) if course[-1] > course[0] else None,
        }

    @classmethod
    def size(cls, results: Results[ProgressOptions]) -> tuple[float, ...]:
        summary = results.summary
        return len(summary["last_step"]), len(summary["steps"]), summary["pairs"]

    @classmethod
    def notes(cls, results: Results[ProgressOptions]) -> list[str]:
        summary = results.summary
        steps, chance = summary["steps"], summary["chance_level"]
        by = results.slice
        counts = summary[f"pairs_by_{by}"].items()
        of = ", ".join(f"{count} of {by} {value}" for value, count in counts) or "not told apart"
        notes = [
            f"{summary['pairs']} pairs ({of}), {len(steps)} checkpoints from step {steps[0]} to"
            f" {steps[-1]}. Means over pairs of one {by} cannot tell a lookup from a position."
        ]
        for what, name in (("matches", "match_winner"), ("writes", "write_winner")):
            winner = summary[name]
            if winner is None:
                notes.append(f"No head {what}: some means are not finite.")
                continue
            half = winner["half_way_step"]
            course = f"half way at step {half}" if half is not None else "it has not risen"
            notes.append(
                f"**{winner['head']} {what} best** at step {steps[-1]}: `{winner['column']}`"
                f" {winner['first_step']:.2f} -> {winner['last_step']:.2f}"
                f"{said_between(winner, 'last_step', '.2f')}, {course}."
            )
        notes.append(
            "Own margin: what the head writes for the answer over the best wrong value of its own"
            " logits; margin DLA: what it writes onto the model's margin, whose competitor the"
            " model chooses; swapped: the same with another pair's support value."
        )
        if chance is not None:
            notes.append(
                f"Deltas over {summary['intervals']} intervals, {summary['correlations']}"
                " correlations. By chance alone one of them would exceed"
                f" |r| = {chance:.2f} with probability {CHANCE} at most, if the intervals were"
                " independent; both ends of a correlation are parts of one training run, so that"
                " even a large one is no cause."
            )
        if "shifts" in summary:
            notes.append(shifts_note(summary["shifts"]))
        return [*notes, *note(results)]

    @classmethod
    def tables(cls, results: Results[ProgressOptions]) -> list[Table]:
        rows = [
            {"step": row["step"], "head": row["head"]}
            | {name: _of(row, name) for name in SHOWN}
            | cells_between(row, dict.fromkeys(BEST, ".3f"))
            for row in with_intervals(cls, results, MEANS)
        ]
        measured = {name: (heading, ".3f") for name, heading in SHOWN.items()}
        correlated: Columns = {
            "head": "head",
            "write": "write",
            "output": "answer scalar",
            "pearson": ("r", ".3f"),
        }
        top = results.summary["top_correlations"]
        if any("shifted_p" in row for row in top):
            correlated = {**correlated, "shifted_p": ("p", ".3f")}
        columns = {"step": "step", "head": "head", **behind_numbers(measured, BEST)}
        return [
            Table("Heads", columns, rows, console=len(rows)),
            *([Table("Deltas that go together", correlated, top, console=3)] if top else []),
        ]

    @classmethod
    def charts(cls, results: Results[ProgressOptions]) -> list[Chart]:
        """The OV margin of all heads, and their courses: a colour is a layer, a mark a head."""
        rows = [{name: row[name] for name in DRAWN} for row in results.rows(MEANS)]
        heads = list(dict.fromkeys(row["head"] for row in rows))
        layers, numbers = (
            list(dict.fromkeys(part)) for part in zip(*(h.split("H") for h in heads), strict=True)
        )
        shade = colour("layer", layers, title="layer")
        marks = legend(numbers, "head")
        dash = alt.StrokeDash("number:N").scale(domain=numbers).legend(marks)
        shape = alt.Shape("number:N").scale(domain=numbers).legend(marks)
        charts = [
            chart(
                "write_ov_margin",
                "OV margin of the support's value, by W_OV alone",
                {"write": rows},
                *heat("write", "ov_map_value_margin", DRAWN, rows),
                height=22 * len(heads),
            )
        ]
        for column, words in COURSES.items():
            known = [row for row in rows[-len(heads) :] if row[column] is not None]
            best = max(known, key=lambda row: row[column], default=None)
            most = f" ({best['head']} most at step {best['step']})" if best else ""
            course = lines("write", column, words, shade, DRAWN, dashed=dash)
            course = course.encode(shape=shape).transform_calculate(
                layer="split(datum.head, 'H')[0]", number="split(datum.head, 'H')[1]"
            )
            title = f"{words[0].upper()}{words[1:]}{most}"
            charts.append(chart(f"write_{column}", title, {"write": rows}, course, at_step()))
        return charts


SHOWN = {
    "qk_separation": "QK sep.",
    "attention_support": "att. support",
    "attention_distractors": "att. others",
    "ov_map_value_margin": "OV map",
    "head_value_margin_dla": "own margin",
    "head_answer_logit_dla": "logit DLA",
    "head_margin_dla": "margin DLA",
    "swapped_value.head_margin_dla": "swapped",
}
"""Columns of the table, and their headings."""
BETWEEN = tuple(name for name in SHOWN if "." not in name)
"""Columns that have intervals."""
BEST = ("qk_separation", "head_value_margin_dla")
"""Columns by which a head is called best; the table shows their intervals."""
COURSES = {
    "qk_separation": "QK separation",
    "attention_support": "attention on the support",
    "head_value_margin_dla": "value margin of the output",
}
"""Columns that are drawn over steps."""
DRAWN = ("step", "head", "pairs", *list(SHOWN)[:5], "head_margin_dla")
"""Columns that charts have."""


def _correlated(
    heads: Sequence[str], deltas: NDArray[np.float64], outputs: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """Correlation over intervals of every head's every delta with that of every answer scalar."""
    return [
        {
            "head": head,
            "write": column,
            "output": output,
            "intervals": len(deltas),
            "pearson": _finite(value),
        }
        for head, of_head in zip(heads, pearson(deltas, outputs).swapaxes(0, 1), strict=True)
        for column, of_column in zip(COLUMNS, of_head.tolist(), strict=True)
        for output, value in zip(OUTPUTS, of_column, strict=True)
    ]


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of every column of x with every column of y.

    NumPy's and SciPy's take pairs of columns, and call rounding variance.

    Args:
        x, y: `[interval, ...]`.

    Returns:
        `[...x, ...y]`; NaN where there are fewer than two intervals, or no variance beyond
        rounding, or a number is not finite.
    """
    shape = (*x.shape[1:], *y.shape[1:])
    if len(x) < 2:
        return np.full(shape, np.nan)

    def standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = values.reshape(len(values), -1)
        centred = flat - flat.mean(0)
        norm = np.linalg.norm(centred, axis=0)
        still = norm <= 1e-12 * np.linalg.norm(flat, axis=0)
        return np.asarray(centred / np.where(still, np.nan, norm))

    with np.errstate(invalid="ignore"):
        found = np.clip(standard(x).T @ standard(y), -1, 1)
    return np.asarray(found).reshape(shape)


def chance_level(correlations: int, intervals: int) -> float | None:
    """The |r| that any of so many correlations exceeds with probability at most 0.05 by chance.

    Bonferroni over a two-sided t-test with `intervals - 2` degrees of freedom; None below three
    intervals. It takes intervals as independent, which neighbours in training are not.
    """
    freedom = intervals - 2
    if freedom < 1 or correlations < 1:
        return None
    from scipy import stats

    t = float(stats.t.isf(CHANCE / 2 / correlations, freedom))
    return t / math.sqrt(freedom + t * t)


def _nested(names: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Columns with a dot become an object of their condition."""
    nested: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        condition, _, column = name.rpartition(".")
        place = nested.setdefault(condition, {}) if condition else nested
        place[column] = _finite(value)
    return nested


def _of(row: Row, name: str) -> float | None:
    """A column of `COLUMNS` from a row."""
    condition, _, column = name.rpartition(".")
    value: float | None = (row[condition] if condition else row)[column]
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
