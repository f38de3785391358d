"""The main job on a small task, in one call: make the data, train, trace, attribute, look.

The configs ship with the package (`configs/benchmark/`, `configs/train/`); docs/quickstart.md says
how that of lookup was found, docs/decisions.md how the others were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.artifacts import read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.kinds import installed_kind
from circuit.page import formation_page
from circuit.reports.bilinear_qk_match_separation import MatchSeparation, SeparationOptions
from circuit.reports.bilinear_qk_rank_adam_state_attribution import (
    QKAttribution,
)
from circuit.reports.induction_progress import InductionOptions, InductionProgress
from circuit.reports.optimizer_update_trace import TraceReport, optimizer_update_trace
from circuit.reports.report import Progress as ReportProgress
from circuit.reports.report import Report, ReportResult, run_report
from circuit.reports.scalar_attribution import ScalarAttribution
from circuit.runs.checkpointed import open_folder
from circuit.scalars.induction import PREFIX
from circuit.tasks.base import Task, TaskConfig
from circuit.tasks.benchmark import Benchmark, write_benchmark
from circuit.tasks.examples import Examples, Split
from circuit.tasks.probes import write_probe_set
from circuit.tasks.registry import load_benchmark_config
from circuit.trace.record import RecordOptions
from circuit.trace.step import TracedStep
from circuit.train_config import TrainConfig
from circuit.training.evaluate import Evaluation, evaluate, logits_and_attention
from circuit.training.loop import Progress, TrainResult, train
from circuit.training.run_folder import METRICS

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

RANK = 8
"""Of the QK match that is attributed."""


@dataclass(frozen=True)
class Formed:
    """What has formed in a run, and while it did.

    Attributes:
        who: the figures of what formed, JSON.
        words: the same in a sentence.
        measured: what was attributed, as a sentence about its course begins.
        start, end: steps between which it went through the middle of its way.
        kind, options: of its attribution, beside probe set, trace and steps.
        report: in which it was found; None where the run's own metrics tell.
    """

    who: Mapping[str, Any]
    words: str
    measured: str
    start: int
    end: int
    kind: type[Report[Any]]
    options: Mapping[str, Any]
    report: ReportResult | None = None


@dataclass(frozen=True)
class Tour:
    """What the quickstart of a task shows.

    Attributes:
        config: name of its two configs.
        trains: what is trained, in words.
        split: whose records are probed and shown.
        probes: records of the probe set.
        find: what has formed in the run with this config, on this probe set.
    """

    config: str
    trains: str
    split: str
    probes: int
    find: Callable[[TrainConfig, Path], Formed]


@dataclass(frozen=True)
class Example:
    """One read of a decoded sequence, and what the model makes of it."""

    sample_id: str
    tokens: list[str]
    prediction_position: int
    support_position: int
    slice: str | None
    """The read's value of the task's slice, such as `lag 3`."""
    answer: str
    predicted: str
    probability: float
    """Of the predicted token."""
    head: str
    """The head that, over the whole split, attends most to the support value."""
    attention: list[float]
    """Of that head, from the prediction position to every position."""


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart made and measured."""

    task: Task
    tour: Tour
    training: TrainResult
    trace: TraceReport
    formed: Formed
    attribution: ReportResult
    """Of what has formed, over the steps in which it did."""
    evaluations: list[Evaluation]
    example: Example
    benchmark_folder: Path
    page: Path
    """The formation page: the run's story as one HTML file."""


def quickstart_configs(task: str = "symbolic_kv") -> tuple[TaskConfig, TrainConfig]:
    """The two configs of a task that ship with the package.

    What is trained is of the kind that the installed TransformerLens builds.

    Raises:
        CircuitError: there is no quickstart of that name.
    """
    shipped, name = Path(str(files("circuit.configs"))), find_tour(task).config
    bridge = ["model.kind=bridge", "kernels=plain"]
    return (
        load_benchmark_config(shipped / "benchmark" / f"{name}.json"),
        load_config(
            shipped / "train" / f"{name}.json",
            TrainConfig,
            bridge if installed_kind() == "bridge" else (),
        ),
    )


def find_tour(task: str) -> Tour:
    """What the quickstart of a task shows.

    Raises:
        CircuitError: there is none of that name.
    """
    if task not in TOURS:
        raise CircuitError(
            f"no quickstart of '{task}'", where="task", expected=f"one of {', '.join(TOURS)}"
        )
    return TOURS[task]


def quickstart(
    task: str = "symbolic_kv",
    *,
    training_progress: Callable[[Progress], None] | None = None,
    trace_progress: Callable[[TracedStep], None] | None = None,
    attribution_progress: ReportProgress | None = None,
) -> QuickstartResult:
    """Generate, train, trace, attribute, evaluate, explain: under `data/` and `artifacts/` here.

    Files of an earlier quickstart of the task are replaced, no others.

    Args:
        task: one of `TOURS`.

    Raises:
        CircuitError: there is no such quickstart, or the folders hold something else under the
            same names.
    """
    tour = find_tour(task)
    benchmark_config, config = quickstart_configs(task)
    benchmark, _ = write_benchmark(benchmark_config, overwrite=True)
    training = train(config, overwrite=True, progress=training_progress)
    trace = optimizer_update_trace(
        config,
        training.folder / "analysis" / "optimizer_update_trace",
        RecordOptions(end_step=config.steps, require_historical_replay=True),
        overwrite=True,
        progress=trace_progress,
    )
    run = open_folder(training.folder)
    model, setup = run.model(), run.setup
    evaluations = [evaluate(model, setup.split(name), name) for name in benchmark.files]
    example = explain_read(model, setup.benchmark, setup.split(tour.split))
    formed, attribution = _attribute(tour, config, trace, attribution_progress)
    return QuickstartResult(
        setup.benchmark.task,
        tour,
        training,
        trace,
        formed,
        attribution,
        evaluations,
        example,
        Path(benchmark_config.output_dir),
        formation_page(training.folder, overwrite=True).path,
    )


def _attribute(
    tour: Tour, config: TrainConfig, trace: TraceReport, progress: ReportProgress | None
) -> tuple[Formed, ReportResult]:
    """Find what has formed, and attribute it while it did."""
    analysis = Path(config.output_dir) / "analysis"
    probe_set = analysis / "probe_set.jsonl"
    write_probe_set(config.benchmark_dir, probe_set, [tour.split], tour.probes, overwrite=True)
    formed = tour.find(config, probe_set)
    fields: dict[str, Any] = {
        "probe_set": probe_set,
        "optimizer_trace_dir": trace.record.store.root,
        "start_step": formed.start,
        "end_step": formed.end,
        **formed.options,
    }
    options = formed.kind.Options(**fields)
    folder = analysis / formed.kind.stem()
    report = run_report(formed.kind, config, options, folder, overwrite=True, progress=progress)
    return formed, report


# --- what forms, by task ----------------------------------------------------------------------


def _match(config: TrainConfig, probe_set: Path) -> Formed:
    """Lookup: the head whose QK match grew most."""
    separation_options = SeparationOptions(
        probe_set=probe_set, checkpoint_dir=_checkpoints(config), ranks=(RANK,)
    )
    report = _report(MatchSeparation, config, separation_options)
    winner = report.summary["winner"]
    course = {
        row["step"]: row["separation"]
        for row in read_jsonl(report.rows[0])
        if (row["head"], row["lag"], row["score"]) == (winner["head"], "all", f"rank{RANK}")
    }
    start, end = growth_window(course)
    rivals = [head for head in report.summary["heads"] if head["score"] == winner["score"]]
    highest = max(rivals, key=lambda head: head["separation_at_last"])
    words = (
        f"the QK match of {winner['head']} (rank {RANK}: support above distractors) grew most, from"
        f" {winner['separation_at_first']:.2f} to {winner['separation_at_last']:.2f}; its support"
        f" beats every distractor in {100 * winner['support_wins_at_last']:.1f} % of the probed"
        " reads"
    )
    if highest["head"] != winner["head"]:
        words += f" ({highest['head']} ends highest, at {highest['separation_at_last']:.2f})"
    measured = f"measured in the {RANK} directions that it has at step {end}, it"
    options = {"heads": (winner["head"],), "ranks": (RANK,), "bases": (f"step:{end}",)}
    return Formed(winner, words, measured, start, end, QKAttribution, options, report)


def _prefix_matching(config: TrainConfig, probe_set: Path) -> Formed:
    """Induction: the head that attends most to the support at the end."""
    induction_options = InductionOptions(probe_set=probe_set, checkpoint_dir=_checkpoints(config))
    report = _report(InductionProgress, config, induction_options)
    (best,) = (one for one in report.summary["measures"] if one["measure"] == PREFIX)
    rows = [row for row in read_jsonl(report.rows[0]) if row["head"] == best["of"]]
    start, end = growth_window({row["step"]: row[PREFIX] for row in rows})
    words = (
        f"the attention of {best['of']} from a token to what followed the token's first occurrence"
        f" is the largest of any head at the end: from {best['first']:.2f} to {best['last']:.2f}"
    )
    options = {"scalars": (f"induction,measure={PREFIX},head={best['of']}",)}
    return Formed(best, words, "it", start, end, ScalarAttribution, options, report)


def _generalization(config: TrainConfig, probe_set: Path) -> Formed:
    """Modular addition: the loss of answers that training never shows."""
    split = config.best.split
    rows = read_jsonl(Path(config.output_dir) / METRICS)
    course = {
        row["step"]: row["answer_loss"]
        for row in rows
        if row["kind"] == "evaluation" and row["split"] == split
    }
    first, *_, last = course.values()
    top = max(course, key=lambda step: course[step])
    fall = {step: -loss for step, loss in course.items() if step >= top}
    start, end = growth_window(fall)
    words = (
        f"the loss of the answers in {split}, which training never shows, rose from {first:.2f} to"
        f" {course[top]:.2f} at step {top} and fell to {last:.2f}"
    )
    who = {"split": split, "first": first, "highest": course[top], "last": last}
    options = {"scalars": ("loss,scope=answer",)}
    measured = "over the probed answers it"
    return Formed(who, words, measured, start, end, ScalarAttribution, options)


def _checkpoints(config: TrainConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def _report(kind: type[Report[Any]], config: TrainConfig, options: Any) -> ReportResult:
    folder = Path(config.output_dir) / "analysis" / kind.stem()
    return run_report(kind, config, options, folder, overwrite=True)


def growth_window(course: Mapping[int, float]) -> tuple[int, int]:
    """The steps between which a course went through the middle of its growth.

    From the last step below a fifth of the way from the smallest to the largest value to the first
    one above four fifths.
    """
    low, high = min(course.values()), max(course.values())
    steps = sorted(course)
    peak = next(s for s in steps if course[s] >= low + 0.8 * (high - low))
    below = [s for s in steps if s < peak and course[s] <= low + 0.2 * (high - low)]
    return (below[-1] if below else steps[0]), peak


TOURS = {
    "symbolic_kv": Tour(
        "quickstart",
        "a 2-layer transformer to look up the latest write to a key",
        "validation_iid",
        48,
        _match,
    ),
    "induction": Tour(
        "induction",
        "2 layers of attention to go on with a string that is written a second time",
        "validation",
        48,
        _prefix_matching,
    ),
    "modular_addition": Tour(
        "modular_addition_small",
        "a 1-layer transformer to add modulo a prime",
        "test",
        128,
        _generalization,
    ),
}
"""By task."""


def explain_read(model: HookedTransformer, benchmark: Benchmark, split: Split) -> Example:
    """The first read of the largest lag, through the head that looks at supports the most."""
    batch = split.batch()
    with torch.no_grad():
        logits, attention = logits_and_attention(model, batch.tokens)
    head = _lookup_head(batch, attention)
    values, support = batch.slice_values(), batch.position(batch.task.support)
    read = 0 if values is None else int(values.argmax())
    row, position = int(batch.row[read]), int(batch.at[read])
    probabilities = logits[row, position].double().softmax(-1)
    predicted = int(probabilities.argmax())
    text = benchmark.vocabulary.tokens
    length = int(batch.lengths[row])
    return Example(
        sample_id=batch.sample_ids[row],
        tokens=[text[token] for token in batch.tokens[row, :length].tolist()],
        prediction_position=position,
        support_position=int(support[read]),
        slice=None if values is None else f"{batch.task.slice_name} {int(values[read])}",
        answer=text[int(batch.answer[read])],
        predicted=text[predicted],
        probability=float(probabilities[predicted]),
        head=f"L{head // model.cfg.n_heads}H{head % model.cfg.n_heads}",
        attention=attention[row, head, position, : position + 1].tolist(),
    )


def _lookup_head(batch: Examples, attention: torch.Tensor) -> int:
    """Index (layer by layer) of the head with the most attention on the supports."""
    support = batch.position(batch.task.support)
    on_support = attention[batch.row, :, batch.at, support]  # [read, head]
    return int(on_support.mean(0).argmax())
