"""optimizer-update-trace: record every step of a run, and say what the terms did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from circuit.artifacts import OutputFolder, dump_json
from circuit.config import digest_of
from circuit.errors import CircuitError
from circuit.figures.attribution import thinned
from circuit.figures.charts import (
    CATEGORY,
    INK,
    TERM_NAMES,
    Chart,
    at_step,
    chart,
    colour,
    exact,
    named,
    steps,
)
from circuit.lazy import alt
from circuit.reading import read_json
from circuit.reports.report import SCHEMA, Report, Results, markdown
from circuit.reports.tables import Table
from circuit.trace.record import RecordOptions, RecordResult, record_trace
from circuit.trace.step import TracedStep
from circuit.trace.store import COMMAND, FILES, MANIFEST, ROWS, TraceStore
from circuit.trace.while_training import TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training.loop import TrainResult, train

NAME = "optimizer_update_trace"
STOPS = 300
"""Steps that are drawn."""


class OptimizerUpdateTrace(Report[RecordOptions]):
    """Record every optimizer step of a run: terms, digests, and full states at anchors.

    The recording writes its own folder (`optimizer_update_trace`, `train_traced`); here stands what
    is shown of it.
    """

    command = COMMAND
    Options = RecordOptions
    generated = False
    title = "Loss, and the size of the update's terms"
    question = "How large is each term of the optimizer's updates, step by step?"

    @classmethod
    def size(cls, results: Results[RecordOptions]) -> tuple[float, ...]:
        return (results.summary["steps"],)

    @classmethod
    def notes(cls, results: Results[RecordOptions]) -> list[str]:
        s = results.summary
        return [
            f"Steps {s['start_step']} to {s['end_step']} of {s['optimizer']}, {s['anchors']} full"
            f" states, {s['bytes'] / 1e6:.1f} MB on disk. Mean clip factor"
            f" {s['mean_clip_factor']:.4f}; loss {s['first_loss']:.4f} at the first step,"
            f" {s['last_loss']:.4f} at the last.",
            "`raw_sgd` and `clipped_sgd` are not part of the update: they are what plain SGD would"
            " have done with the same gradient. Norms do not add up; the vectors do.",
        ]

    @classmethod
    def tables(cls, results: Results[RecordOptions]) -> list[Table]:
        whole = results.summary["mean_update_norm"]
        norms = [
            {"term": name, "norm": norm, "share": norm / whole if whole else None}
            for name, norm in results.summary["mean_term_norms"].items()
        ]
        columns = {
            "term": "term",
            "norm": ("mean norm over steps", ".4g"),
            "share": ("share of the update's mean norm", ".3g"),
        }
        moved = [
            {"tensor": name, "steps": times}
            for name, times in results.summary["most_moved_tensors"].items()
        ]
        return [
            Table("Terms", columns, norms, console=len(norms)),
            Table("Tensors that moved most", {"tensor": "tensor", "steps": "in steps"}, moved),
        ]

    @classmethod
    def charts(cls, results: Results[RecordOptions]) -> list[Chart]:
        rows = list(results.rows())
        stops = set(thinned([row["step"] for row in rows], STOPS))
        drawn = [row for row in rows if row["step"] in stops]
        losses = [{"step": row["step"], "loss": row["loss"]} for row in drawn]
        names = ["update", *(name for name in rows[0]["term_norms"] if name in TERM_NAMES)]
        norms = [
            {"step": row["step"], "term": name, "norm": norm}
            for row in drawn
            for name, norm in {"update": row["update_norm"], **row["term_norms"]}.items()
            if name in names and norm  # a log scale has no zero
        ]
        shade = colour("term", names, labels=TERM_NAMES, palette=[INK, *CATEGORY])
        return [
            _course(f"{NAME}_loss", "Batch loss", {"trace_losses": losses}, "loss", "loss (nats)"),
            _course(
                NAME,
                "Norms of the update and its terms",
                {"trace_norms": norms},
                "norm",
                "Euclidean norm",
                shade,
            ),
        ]


def _course(
    name: str,
    title: str,
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    y: str,
    y_title: str,
    shade: alt.Color | None = None,
) -> Chart:
    ((key, rows),) = data.items()
    positive = all(row[y] > 0 for row in rows)  # a loss of somebody's own may be less than 0
    lines = (
        named(key)
        .mark_line(strokeWidth=1.3, color=INK)
        .encode(
            x=steps(),
            y=alt.Y(f"{y}:Q")
            .title(y_title)
            .scale(type="log" if positive else "linear", nice=False)
            .axis(tickCount=5),
            tooltip=exact("step", *(["term"] if shade else []), y),
        )
    )
    return chart(name, title, data, lines.encode(color=shade) if shade else lines, at_step())


@dataclass(frozen=True)
class TraceReport:
    """A recorded trace and its report."""

    record: RecordResult
    summary: dict[str, Any]
    law: str
    """What was checked, in one sentence."""
    paths: list[Path]
    tables: Sequence[Table]


def optimizer_update_trace(
    config: TrainConfig,
    output_dir: str | Path,
    options: RecordOptions,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[TracedStep], None] | None = None,
) -> TraceReport:
    """Record a trace (see `record_trace`) and write its report, page and figure beside it.

    A recording that is resumed keeps the overrides that the report before told.

    Raises:
        CircuitError: as `record_trace`.
    """
    began = time.time()
    earlier = _recorded_overrides(Path(output_dir)) if resume else []
    record = record_trace(
        config, output_dir, options, overwrite=overwrite, resume=resume, progress=progress
    )
    return _report(config, options, record, earlier, began)


def train_traced(
    config: TrainConfig,
    recorder: TraceRecorder,
    *,
    resume: bool = False,
    **switches: Any,
) -> tuple[TrainResult, TraceReport | None]:
    """Train a run and trace it in the same pass; the report is that of `optimizer_update_trace`.

    Args:
        switches: the further keywords of `train`.

    Returns:
        The run, and its trace's report: None until the run has reached the trace's last step.

    Raises:
        CircuitError: as `train`, and as `TraceRecorder`.
    """
    began = time.time()
    earlier = _recorded_overrides(recorder.folder_of(config)) if resume else []
    result = train(config, resume=resume, recorder=recorder, **switches)
    record = recorder.result()
    if record is None:
        return result, None
    return result, _report(config, recorder.planned, record, earlier, began)


def _report(
    config: TrainConfig,
    options: RecordOptions,
    record: RecordResult,
    earlier: list[dict[str, Any]],
    began: float,
) -> TraceReport:
    store = record.store
    summary = summarize(store, record.history)
    law = closing_law(summary)
    kind = OptimizerUpdateTrace
    results = Results(options, summary, lambda name, holding: store.rows)
    charts, tables = kind.charts(results), kind.tables(results)
    texts = {f"{one.name}.svg": one.svg() for one in charts}
    title = f"Optimizer update trace of {store.manifest.config.name}"
    texts[f"{NAME}_report.md"] = markdown(title, law, kind.notes(results), charts, tables)
    payload = {
        "schema_version": SCHEMA,
        "command": COMMAND,
        "parameters": options.to_json(),
        "law": law,
        "summary": summary,
        "paths": [MANIFEST, ROWS, *texts],
        "provenance": {
            "environment": store.manifest.environment,
            **config.provenance(store.manifest.benchmark_digest),
            **_origin([*earlier, *config.origin().values()]),
            "started_unix": began,
            "seconds": time.time() - began,
            "steps_of_this_call": record.steps,
        },
    }
    texts[f"{NAME}_report.json"] = dump_json({**payload, "digest": digest_of(payload)})
    with OutputFolder(store.root, COMMAND, writes=FILES, resume=True) as folder:
        paths = [folder.write_text(name, text) for name, text in texts.items()]
    return TraceReport(record, summary, law, paths, tables)


def _recorded_overrides(trace: Path) -> list[dict[str, Any]]:
    """The records of overrides in the report of a trace; none where there is no such report."""
    try:
        found = read_json(trace / f"{NAME}_report.json")["provenance"]
        first = [found["overrides"]] if "overrides" in found else []
        return [*first, *found.get("further_overrides", ())]
    except (CircuitError, KeyError, TypeError, AttributeError):
        return []  # ours, and about to be replaced


def _origin(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Distinct records of the calls that made a trace, the first and the others."""
    distinct = [one for at, one in enumerate(records) if one not in records[:at]]
    named = {"overrides": distinct[0]} if distinct else {}
    return named | ({"further_overrides": distinct[1:]} if distinct[1:] else {})


def summarize(store: TraceStore, history: Sequence[int]) -> dict[str, Any]:
    """Figures over all recorded steps."""
    rows, manifest = store.rows, store.manifest
    terms = list(rows[0]["term_norms"])
    return {
        "start_step": manifest.start_step,
        "end_step": manifest.end_step,
        "steps": len(rows),
        "anchors": len(manifest.anchors()),
        "optimizer": manifest.config.optimizer_words,
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "mean_clip_factor": fmean(row["clip_factor"] for row in rows),
        "mean_update_norm": fmean(row["update_norm"] for row in rows),
        "mean_term_norms": {t: fmean(row["term_norms"][t] for row in rows) for t in terms},
        "max_rounding_ulps": max(row["rounding_ulps"] for row in rows),
        "max_relative_rounding": max(
            (row["term_norms"]["rounding"] / row["update_norm"] if row["update_norm"] else 0.0)
            for row in rows
        ),
        "most_moved_tensors": _most_moved(rows),
        "historical_checkpoints_equal": list(history),
        "bytes": trace_bytes(store),
    }


def closing_law(summary: Mapping[str, Any]) -> str:
    """What the recording proved, in one sentence."""
    law = (
        f"recorded {summary['steps']} steps; the terms sum to every update with a residual of at"
        f" most {summary['max_rounding_ulps']:.1f} units in the last place"
    )
    equal = len(summary["historical_checkpoints_equal"])
    if equal:
        law += f"; {equal} of {equal} checkpoints that the run saved are equal, 0 bits differ"
    return law


def trace_bytes(store: TraceStore) -> int:
    """Size on disk of a trace: manifest, rows and anchors."""
    paths = [store.root / MANIFEST, store.root / ROWS]
    paths += [store.checkpoint_path(step) for step in store.manifest.anchors()]
    return sum(path.stat().st_size for path in paths if path.exists())


def _most_moved(rows: Sequence[Mapping[str, Any]], count: int = 10) -> dict[str, int]:
    """How often each tensor was among a step's top parameters; the most frequent ones."""
    times: dict[str, int] = {}
    for row in rows:
        for entry in row["top_parameters"][:1]:
            times[entry["name"]] = times.get(entry["name"], 0) + 1
    ranked = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:count])
