"""The main job on a small task, in one call: make the data, train, trace, attribute, look.

The two configs ship with the package (`configs/benchmark/quickstart.json`,
`configs/train/quickstart.json`); docs/quickstart.md says how they were found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.artifacts import read_jsonl
from circuit.config import load_config
from circuit.lazy import torch
from circuit.page import formation_page
from circuit.reports.bilinear_qk_match_separation import MatchSeparation, SeparationOptions
from circuit.reports.bilinear_qk_rank_adam_state_attribution import (
    QKAttribution,
    QKAttributionOptions,
)
from circuit.reports.optimizer_update_trace import TraceReport, optimizer_update_trace
from circuit.reports.report import Progress as ReportProgress
from circuit.reports.report import ReportResult, run_report
from circuit.runs.checkpointed import open_folder
from circuit.tasks.base import TaskConfig
from circuit.tasks.benchmark import Benchmark, write_benchmark
from circuit.tasks.examples import Examples, Split
from circuit.tasks.probes import write_probe_set
from circuit.tasks.registry import load_benchmark_config
from circuit.trace.record import RecordOptions
from circuit.trace.step import TracedStep
from circuit.train_config import TrainConfig
from circuit.training.evaluate import Evaluation, evaluate, logits_and_attention
from circuit.training.loop import Progress, TrainResult, train

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

EXAMPLE_SPLIT = "validation_iid"
PROBES = 48
"""Records of the probe set."""
RANK = 8
"""Of the QK match that is attributed."""


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

    training: TrainResult
    trace: TraceReport
    separation: ReportResult
    attribution: ReportResult
    """Of the QK match of the head whose match grew most, over the steps in which it grew."""
    evaluations: list[Evaluation]
    example: Example
    benchmark_folder: Path
    page: Path
    """The formation page: the run's story as one HTML file."""


def quickstart_configs() -> tuple[TaskConfig, TrainConfig]:
    """The two configs that ship with the package."""
    shipped = Path(str(files("circuit.configs")))
    return (
        load_benchmark_config(shipped / "benchmark" / "quickstart.json"),
        load_config(shipped / "train" / "quickstart.json", TrainConfig),
    )


def quickstart(
    *,
    training_progress: Callable[[Progress], None] | None = None,
    trace_progress: Callable[[TracedStep], None] | None = None,
    attribution_progress: ReportProgress | None = None,
) -> QuickstartResult:
    """Generate, train, trace, attribute, evaluate, explain: under `data/` and `artifacts/` here.

    Files of an earlier quickstart are replaced, no others.

    Raises:
        CircuitError: the folders hold something else under the same names.
    """
    benchmark_config, config = quickstart_configs()
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
    example = explain_read(model, setup.benchmark, setup.split(EXAMPLE_SPLIT))
    separation, attribution = _attribute(config, trace, attribution_progress)
    return QuickstartResult(
        training,
        trace,
        separation,
        attribution,
        evaluations,
        example,
        Path(benchmark_config.output_dir),
        formation_page(training.folder, overwrite=True).path,
    )


def _attribute(
    config: TrainConfig,
    trace: TraceReport,
    progress: ReportProgress | None,
) -> tuple[ReportResult, ReportResult]:
    """Find the head whose QK match grew most, and attribute it while it grew."""
    analysis = Path(config.output_dir) / "analysis"
    probe_set = analysis / "probe_set.jsonl"
    write_probe_set(config.benchmark_dir, probe_set, [EXAMPLE_SPLIT], PROBES, overwrite=True)
    separation = run_report(
        MatchSeparation,
        config,
        SeparationOptions(
            probe_set=probe_set,
            checkpoint_dir=Path(config.output_dir) / "checkpoints",
            ranks=(RANK,),
        ),
        analysis / MatchSeparation.stem(),
        overwrite=True,
    )
    head = separation.summary["winner"]["head"]
    start, end = growth_window(separation.rows[0], head)
    attribution = run_report(
        QKAttribution,
        config,
        QKAttributionOptions(
            probe_set=probe_set,
            optimizer_trace_dir=trace.record.store.root,
            heads=(head,),
            ranks=(RANK,),
            bases=(f"step:{end}",),
            start_step=start,
            end_step=end,
        ),
        analysis / QKAttribution.stem(),
        overwrite=True,
        progress=progress,
    )
    return separation, attribution


def growth_window(rows: Path, head: str) -> tuple[int, int]:
    """The steps between which a head's separation went through the middle of its growth.

    From the last checkpoint below a fifth of the way from the smallest to the largest separation
    to the first one above four fifths after it.
    """
    found = [r for r in read_jsonl(rows) if r["head"] == head and r["lag"] == "all"]
    course = {r["step"]: r["separation"] for r in found if r["score"] == f"rank{RANK}"}
    low, high = min(course.values()), max(course.values())
    steps = sorted(course)
    peak = next(s for s in steps if course[s] >= low + 0.8 * (high - low))
    below = [s for s in steps if s < peak and course[s] <= low + 0.2 * (high - low)]
    return (below[-1] if below else steps[0]), peak


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
