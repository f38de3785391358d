"""optimizer-comparison: learning, QK separation and OV progress of runs, by optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import dump_rows, read_jsonl
from circuit.errors import CircuitError
from circuit.figures.comparison import Course, courses
from circuit.reports.base import ReportResult, open_report
from circuit.strict_json import parse_json
from circuit.train_config import RUN_CONFIG, AdamWConfig, TrainConfig, load_run_config
from circuit.training.run_folder import METRICS, SUMMARY

COMMAND = "optimizer-comparison"
SPLIT = "validation_iid"
OUTCOME = "outcome.json"
LEARNED = 0.9
"""Answer accuracy from which a run counts as having learned the task."""
_AUDIT = "ov_write_progress"


@dataclass(frozen=True)
class ComparedRun:
    """What is read of one run.

    Attributes:
        name: of the config.
        config: of the run.
        diverged: what the training said when it diverged, if it did.
        evaluations: rows of `metrics.jsonl` of the validation split, by step.
        audit: mean rows of its QK/OV audit, empty without one.
    """

    name: str
    config: TrainConfig
    diverged: str | None
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
            diverged = parse_json(outcome.read_text(encoding="utf-8"))["diverged"]
        if diverged is None and not (folder / SUMMARY).is_file():
            raise CircuitError(f"holds no {SUMMARY}", where=folder, fix="finish the run first")
        config = load_run_config(folder / RUN_CONFIG)
        rows = read_jsonl(folder / METRICS, tolerate_torn_tail=diverged is not None)
        shown = [r for r in rows if r["kind"] == "evaluation" and r["split"] == SPLIT]
        audits = sorted(folder.glob(f"analysis/{_AUDIT}/*/{_AUDIT}_means.jsonl"))
        audit = [row for path in audits[:1] for row in read_jsonl(path)]
        return cls(config.name, config, diverged, shown, audit)

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

    def course_rows(self) -> list[dict[str, Any]]:
        """Everything over steps: one row a step and quantity."""
        named = {"answer_accuracy": self.accuracy()}
        for column in ("qk_separation", "attention_support", "head_answer_logit_dla"):
            named[column] = self.largest(column) if self.audit else []
        return [
            {"run": self.name, "quantity": name, "step": step, "value": value}
            for name, course in named.items()
            for step, value in course
        ]


def compare_optimizers(
    runs: Sequence[Path], output_dir: str | Path, *, overwrite: bool = False
) -> ReportResult:
    """Compare finished (or diverged) runs and their audits.

    Raises:
        CircuitError: a run is missing or not finished, or two have one name.
    """
    found = [ComparedRun.read(folder) for folder in runs]
    names = [run.name for run in found]
    if not found or len(set(names)) < len(names):
        raise CircuitError(f"runs {', '.join(names) or '(none)'}", expected="each once")
    rows = [run.row() for run in found]
    parts: dict[str, dict[str, Course]] = {
        "answer accuracy": {run.name: run.accuracy() for run in found}
    }
    audited = [run for run in found if run.audit]
    if audited:
        parts["QK separation,\nlargest head"] = {
            r.name: r.largest("qk_separation") for r in audited
        }
        parts["answer logit written,\nlargest head"] = {
            run.name: run.largest("head_answer_logit_dla") for run in audited
        }
    summary = summarize(rows)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        figure = courses(
            parts, title=f"{len(found)} runs by optimizer", groups={r.name: r.group for r in found}
        )
        return writer.write(
            parameters={"runs": [str(folder) for folder in runs], "split": SPLIT},
            summary=summary,
            rows=rows,
            page=_page(rows, summary),
            figures={"optimizers": figure},
            further={
                "optimizer_comparison_courses.jsonl": dump_rows(
                    row for run in found for row in run.course_rows()
                )
            },
            provenance={"config_digests": {run.name: run.config.digest() for run in found}},
        )


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best run of each kind of optimizer, how many learned, and every run by name."""
    groups = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        ended = [row for row in own if row["answer_accuracy"] is not None]
        best = max(ended, key=lambda row: row["answer_accuracy"], default=None)
        separations = [
            row["qk_separation_last"] for row in own if row["qk_separation_last"] is not None
        ]
        writes = [
            row["answer_logit_write_last"]
            for row in own
            if row["answer_logit_write_last"] is not None
        ]
        groups[group] = {
            "runs": len(own),
            "learned": sum(row["learned_at_step"] is not None for row in own),
            "diverged": sum(row["diverged"] is not None for row in own),
            "best_run": None if best is None else best["run"],
            "best_answer_accuracy": None if best is None else best["answer_accuracy"],
            "largest_qk_separation": max(separations, default=None),
            "largest_answer_logit_write": max(writes, default=None),
        }
    return {
        "learned_from": LEARNED,
        "groups": groups,
        "runs": {row["run"]: dict(row) for row in rows},
    }


def _page(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for group, found in summary["groups"].items():
        best = found["best_answer_accuracy"]
        lines.append(
            f"- **{group}**: {found['learned']} of {found['runs']} runs reach {100 * LEARNED:.0f} %"
            f" answer accuracy on {SPLIT}"
            + (
                ""
                if best is None
                else f"; the best ends at {100 * best:.1f} % ({found['best_run']})"
            )
            + (f"; {found['diverged']} diverged" if found["diverged"] else "")
            + "."
        )
    lines += [
        "",
        "![optimizers](optimizers.svg)",
        "",
        "| run | rate | momentum | beta2 | accuracy % | learned at | QK separation first / last |"
        " head | answer logit written first / last | head |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---|",
    ]
    for row in rows:
        ended = "diverged" if row["diverged"] else _number(row["answer_accuracy"], 100, 1)
        lines.append(
            f"| {row['run']} | {row['learning_rate']:g} | {_number(row['momentum'])}"
            f" | {_number(row['beta2'])} | {ended} | {row['learned_at_step'] or '-'}"
            f" | {_number(row['qk_separation_first'])} / {_number(row['qk_separation_last'])}"
            f" | {row['match_head'] or '-'} | {_number(row['answer_logit_write_first'])} /"
            f" {_number(row['answer_logit_write_last'])} | {row['write_head'] or '-'} |"
        )
    return lines


def _number(value: float | None, factor: float = 1, digits: int | None = None) -> str:
    if value is None:
        return "-"
    return f"{factor * value:.3g}" if digits is None else f"{factor * value:.{digits}f}"
