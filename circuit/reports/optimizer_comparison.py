"""optimizer-comparison: learning, QK separation and OV progress of runs, by optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from circuit.artifacts import Row, read_jsonl
from circuit.errors import CircuitError
from circuit.figures.charts import INK, Chart, at_step, chart, colour, legend, lines
from circuit.folders import RUN_CONFIG
from circuit.lazy import alt
from circuit.options import Option, Options
from circuit.quoting import markdown_text
from circuit.reading import values_of
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Columns, Table
from circuit.reports.written import ANEW, SUFFIX, read_document, read_report
from circuit.train_config import AdamWConfig, TrainConfig, load_run_config
from circuit.training.run_folder import METRICS, SUMMARY, read_metrics

Course = list[tuple[int, float]]
"""Values over optimizer steps."""
SPLIT = "validation_iid"
OUTCOME = "outcome.json"
LEARNED = 0.9
"""Answer accuracy from which a run counts as having learned the task."""
COURSES = "optimizer_comparison_courses.jsonl"
_AUDIT = "ov_write_progress"
_TRAIN_ANEW = "train it again"
_AUDITED = ("qk_separation", "attention_support", "head_answer_logit_dla")
_DRAWN = {
    "answer_accuracy": "answer accuracy",
    "qk_separation": "QK separation, largest head",
    "head_answer_logit_dla": "answer logit written, largest head",
}
"""Quantities of the courses that have a chart."""
_DASHES = ([1, 0], [6, 3], [2, 2], [6, 2, 2, 2])


class OptimizerComparisonOptions(Options):
    """Which runs are compared."""

    runs: Annotated[tuple[Path, ...], Option("Folder of a run.", flag="--run", kind="run")]


class OptimizerComparison(Report[OptimizerComparisonOptions]):
    """Compare runs by optimizer: learning, QK separation and OV progress."""

    command = "optimizer-comparison"
    Options = OptimizerComparisonOptions
    names = ("study compare-optimizers",)
    panel = "Study"
    reads_run = False
    title = "Runs by optimizer"
    question = "Which optimizers learn the task, and does the circuit form with them?"

    def prepare(self) -> None:
        self.runs = [ComparedRun.read(folder) for folder in self.options.runs]
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise CircuitError(f"runs {', '.join(names)}", where="`runs`", expected="each once")

    def conclude(self, rows: list[Row]) -> Findings:
        rows = [run.row() for run in self.runs]
        gaps = [gap for run in self.runs if (gap := run.gap()) is not None]
        law = (
            f"the course of each of {len(gaps)} finished runs that evaluate {SPLIT} ends with the"
            " answer accuracy and loss that the run itself reported, to"
            f" {max(gaps, default=0.0):.1g}"
        )
        courses = [row for run in self.runs for row in run.course_rows()]
        digests = {run.name: run.config.digest() for run in self.runs}
        return Findings(rows, summarize(rows), law, {COURSES: courses}, {"config_digests": digests})

    @classmethod
    def notes(cls, results: Results[OptimizerComparisonOptions]) -> list[str]:
        bullets = []
        for group, totals in results.summary["groups"].items():
            best = totals["best_answer_accuracy"]
            line = (
                f"- **{markdown_text(group)}**: {totals['learned']} of {totals['runs']} runs reach"
                f" {100 * results.summary['learned_from']:.0f} % answer accuracy on {SPLIT}"
            )
            line += (
                ""
                if best is None
                else f"; the best ends at {best:.1%} ({markdown_text(totals['best_run'])})"
            )
            line += f"; {totals['diverged']} diverged" if totals["diverged"] else ""
            bullets.append(f"{line}.".replace("%", " %").replace("  %", " %"))
        return ["\n".join(bullets)]

    @classmethod
    def tables(cls, results: Results[OptimizerComparisonOptions]) -> list[Table]:
        by_group: Columns = {
            "group": "optimizer",
            "runs": "runs",
            "learned": "learned",
            "diverged": "diverged",
            "best_answer_accuracy": ("best accuracy", ".1%"),
        }
        by_run: Columns = {
            "run": "run",
            "learning_rate": ("rate", "g"),
            "momentum": ("momentum", ".3g"),
            "beta2": ("beta2", ".3g"),
            "accuracy": ("accuracy", ".1%"),
            "learned_at_step": "learned at",
            "qk_separation_first": ("QK separation first", ".3g"),
            "qk_separation_last": ("last", ".3g"),
            "match_head": "head",
            "answer_logit_write_first": ("answer logit written first", ".3g"),
            "answer_logit_write_last": ("last", ".3g"),
            "write_head": "head",
        }
        groups = [{"group": name, **totals} for name, totals in results.summary["groups"].items()]
        runs = [
            {**row, "accuracy": "diverged" if row["diverged"] else row["answer_accuracy"]}
            for row in results.summary["runs"].values()
        ]
        return [
            Table("By optimizer", by_group, groups, console=len(groups)),
            Table("Runs", by_run, runs),
        ]

    @classmethod
    def charts(cls, results: Results[OptimizerComparisonOptions]) -> list[Chart]:
        group_of = {name: row["group"] for name, row in results.summary["runs"].items()}
        places: dict[str, int] = {}
        dashes = []
        for group in group_of.values():  # within a group, line styles tell runs apart
            places[group] = places.get(group, -1) + 1
            dashes.append(_DASHES[places[group] % len(_DASHES)])
        strokes = alt.Legend(
            **legend(list(group_of)).to_dict(), symbolType="stroke", symbolStrokeColor=INK
        )
        style = alt.StrokeDash("run:N").scale(domain=list(group_of), range=dashes).legend(strokes)
        courses: dict[str, list[dict[str, Any]]] = {}
        for row in results.rows(COURSES):
            record = {name: row[name] for name in ("run", "quantity", "step", "value")}
            courses.setdefault(row["quantity"], []).append(record | {"group": group_of[row["run"]]})
        shade = colour("group", list(places))
        shown = ("run", "group", "step", "value")
        return [
            chart(
                f"optimizers_{quantity}",
                f"{len(group_of)} runs by optimizer: {words}",
                {f"optimizers_{quantity}": courses[quantity]},
                lines(f"optimizers_{quantity}", "value", words, shade, shown, dashed=style),
                at_step(),
            )
            for quantity, words in _DRAWN.items()
            if quantity in courses
        ]


@dataclass(frozen=True)
class ComparedRun:
    """What is read of one run.

    Attributes:
        name: of the config.
        config: of the run.
        diverged: what the training said when it diverged, if it did.
        ended: what it reported when it was finished, if it was.
        evaluations: rows of `metrics.jsonl` of the validation split, by step.
        audit: mean rows of its QK/OV audit, empty without one.
    """

    name: str
    config: TrainConfig
    diverged: str | None
    ended: Mapping[str, Any] | None
    evaluations: list[dict[str, Any]]
    audit: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> ComparedRun:
        """The run of a folder.

        Raises:
            CircuitError: it is neither finished nor has it diverged, or a file is damaged.
        """
        outcome = folder / OUTCOME
        diverged = None
        if outcome.is_file():
            diverged = read_document(outcome).get("diverged", False)
            if not isinstance(diverged, str | None):
                problem = "is damaged: 'diverged' is neither a text nor null"
                raise CircuitError(problem, where=outcome, fix=_TRAIN_ANEW)
        if diverged is None and not (folder / SUMMARY).is_file():
            raise CircuitError(f"holds no {SUMMARY}", where=folder, fix="finish the run first")
        config = load_run_config(folder / RUN_CONFIG)
        rows = read_metrics(folder, whole=diverged is None)
        with values_of(folder / METRICS, fix=_TRAIN_ANEW):
            shown = [
                _course_row(row, ("answer_accuracy", "loss"))
                for row in rows
                if row["kind"] == "evaluation" and row["split"] == SPLIT
            ]
        ended = None if diverged is not None else read_document(folder / SUMMARY)
        audit: list[dict[str, Any]] = []
        for report in sorted(folder.glob(f"analysis/{_AUDIT}/*/{_AUDIT}{SUFFIX}"))[:1]:
            written = read_report(report)
            written.refuse_another_runs()
            with values_of(report, fix=ANEW):
                means = read_jsonl(written.file(f"{_AUDIT}_means.jsonl"))
                audit = [{"head": str(m["head"]), **_course_row(m, _AUDITED)} for m in means]
        return cls(config.name, config, diverged, ended, shown, audit)

    @property
    def group(self) -> str:
        """Kind of optimizer."""
        optimizer = self.config.optimizer
        if isinstance(optimizer, AdamWConfig):
            return "AdamW"
        return "SGD with momentum" if optimizer.momentum else "SGD"

    def accuracy(self) -> Course:
        """Validation answer accuracy over steps."""
        return [(row["step"], row["answer_accuracy"]) for row in self.evaluations]

    def largest(self, column: str) -> Course:
        """Over heads, the largest mean of a column of the audit, over steps."""
        steps = sorted({row["step"] for row in self.audit})
        by_step = {s: [row[column] for row in self.audit if row["step"] == s] for s in steps}
        return [(step, max(values)) for step, values in by_step.items()]

    def head_of(self, column: str) -> str | None:
        """The head that has it at the last audited step."""
        if not self.audit:
            return None
        last = max(row["step"] for row in self.audit)
        best = max((r for r in self.audit if r["step"] == last), key=lambda row: row[column])
        return str(best["head"])

    def row(self) -> dict[str, Any]:
        """Its row of the comparison; null where there is no audit or no evaluation."""
        optimizer = self.config.optimizer.model_dump(mode="json")
        accuracy = self.accuracy()
        last = self.evaluations[-1] if self.evaluations else {}
        match, write = self.largest("qk_separation"), self.largest("head_answer_logit_dla")
        return {
            "run": self.name,
            "group": self.group,
            "learning_rate": optimizer["learning_rate"],
            "momentum": optimizer.get("momentum", optimizer.get("beta1")),
            "beta2": optimizer.get("beta2"),
            "steps": self.config.steps,
            "diverged": self.diverged,
            "last_step": last.get("step"),
            "answer_accuracy": last.get("answer_accuracy"),
            "best_answer_accuracy": max((a for _, a in accuracy), default=None),
            "loss": last.get("loss"),
            "learned_at_step": next((s for s, a in accuracy if a >= LEARNED), None),
            "match_head": self.head_of("qk_separation"),
            "qk_separation_first": match[0][1] if match else None,
            "qk_separation_last": match[-1][1] if match else None,
            "write_head": self.head_of("head_answer_logit_dla"),
            "answer_logit_write_first": write[0][1] if write else None,
            "answer_logit_write_last": write[-1][1] if write else None,
        }

    def gap(self) -> float | None:
        """Largest difference between the end of its course and what it reported itself.

        Null where it is not finished or has evaluated other splits.

        Raises:
            CircuitError: what it reported is damaged, or its course is.
        """
        if self.ended is None:
            return None
        try:
            reported = self.ended["evaluations"]
            if self.evaluations:
                last, names = self.evaluations[-1], ("answer_accuracy", "loss")
                return float(max(abs(last[name] - reported[SPLIT][name]) for name in names))
            if SPLIT not in reported:
                return None
            damaged = f"{METRICS} of run {self.name} is damaged: no evaluation of {SPLIT}"
        except (KeyError, TypeError) as error:
            damaged = f"{SUMMARY} of run {self.name} is damaged: no {error}"
        raise CircuitError(damaged, fix=_TRAIN_ANEW)

    def course_rows(self) -> list[dict[str, Any]]:
        """Everything over steps: one row a step and quantity."""
        courses = {"answer_accuracy": self.accuracy()}
        for column in _AUDITED:
            courses[column] = self.largest(column) if self.audit else []
        return [
            {"run": self.name, "quantity": name, "step": step, "value": value}
            for name, course in courses.items()
            for step, value in course
        ]


def _course_row(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """The step of a row, and some of its numbers."""
    return {"step": int(row["step"]), **{name: float(row[name]) for name in columns}}


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best run of each kind of optimizer, how many learned, and every run by name."""
    groups = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        accuracy = _most(of_group, "answer_accuracy")
        best = next((row["run"] for row in of_group if row["answer_accuracy"] == accuracy), None)
        groups[group] = {
            "runs": len(of_group),
            "learned": sum(row["learned_at_step"] is not None for row in of_group),
            "diverged": sum(row["diverged"] is not None for row in of_group),
            "best_run": None if accuracy is None else best,
            "best_answer_accuracy": accuracy,
            "largest_qk_separation": _most(of_group, "qk_separation_last"),
            "largest_answer_logit_write": _most(of_group, "answer_logit_write_last"),
        }
    return {
        "learned_from": LEARNED,
        "groups": groups,
        "runs": {row["run"]: dict(row) for row in rows},
    }


def _most(rows: Sequence[Mapping[str, Any]], column: str) -> Any:
    """The largest value of a column; null without any."""
    return max((row[column] for row in rows if row[column] is not None), default=None)
