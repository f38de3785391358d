"""optimizer-update-trace: record every step of a run, and say what the terms did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from circuit.artifacts import OutputFolder, dump_json
from circuit.figures.style import svg
from circuit.figures.trace import terms_over_steps
from circuit.strict_json import parse_json
from circuit.trace.record import RecordOptions, RecordResult, record_trace
from circuit.trace.step import TracedStep
from circuit.trace.store import COMMAND, MANIFEST, ROWS, TraceStore
from circuit.trace.while_training import TraceRecorder
from circuit.train_config import TrainConfig
from circuit.training.loop import TrainResult, train

NAME = "optimizer_update_trace"


@dataclass(frozen=True)
class TraceReport:
    """A recorded trace and its report."""

    record: RecordResult
    summary: dict[str, Any]
    law: str
    """What was checked, in one sentence."""
    paths: list[Path]


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
    report = {
        "schema_version": 1,
        "command": COMMAND,
        "parameters": _parameters(options) | {"config": config.model_dump(mode="json")},
        "law": law,
        "paths": [MANIFEST, ROWS, f"{NAME}.svg", f"{NAME}_report.md", f"{NAME}_report.json"],
        "summary": summary,
        "provenance": {
            "environment": store.manifest.environment,
            **config.provenance(store.manifest.benchmark_digest),
            **_origin([*earlier, *config.origin().values()]),
            "started_unix": began,
            "seconds": time.time() - began,
            "steps_of_this_call": record.steps,
        },
    }
    with OutputFolder(store.root, COMMAND, resume=True) as folder:
        paths = [
            folder.write_text(f"{NAME}.svg", svg(terms_over_steps(store.rows))),
            folder.write_text(f"{NAME}_report.md", _page(store, summary, law)),
            folder.write_text(f"{NAME}_report.json", dump_json(report)),
        ]
    return TraceReport(record, summary, law, paths)


def _recorded_overrides(trace: Path) -> list[dict[str, Any]]:
    """The records of overrides in the report of a trace; none where there is no such report."""
    try:
        report = (trace / f"{NAME}_report.json").read_text(encoding="utf-8")
        found = parse_json(report)["provenance"]
        first = [found["overrides"]] if "overrides" in found else []
        return [*first, *found.get("further_overrides", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
        "optimizer": manifest.config.optimizer.name,
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


def _parameters(options: RecordOptions) -> dict[str, Any]:
    payload = asdict(options)
    if options.resume_checkpoint is not None:
        payload["resume_checkpoint"] = str(options.resume_checkpoint)
    return payload


def _most_moved(rows: Sequence[Mapping[str, Any]], count: int = 10) -> dict[str, int]:
    """How often each tensor was among a step's top parameters; the most frequent ones."""
    times: dict[str, int] = {}
    for row in rows:
        for entry in row["top_parameters"][:1]:
            times[entry["name"]] = times.get(entry["name"], 0) + 1
    ranked = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return dict(ranked[:count])


def _page(store: TraceStore, summary: Mapping[str, Any], law: str) -> str:
    config = store.manifest.config
    lines = [
        f"# Optimizer update trace of {config.name}",
        "",
        f"Steps {summary['start_step']} to {summary['end_step']} of {config.optimizer.name},"
        f" {summary['anchors']} full states, {summary['bytes'] / 1e6:.1f} MB.",
        "",
        f"**{law[0].upper()}{law[1:]}.**",
        "",
        f"![loss and norms of the terms]({NAME}.svg)",
        "",
        "| term | mean norm over steps | share of the update's mean norm |",
        "|---|---:|---:|",
    ]
    total = summary["mean_update_norm"]
    for name, value in summary["mean_term_norms"].items():
        share = f"{value / total:.3g}" if total else "-"
        lines.append(f"| `{name}` | {value:.4g} | {share} |")
    lines += [
        "",
        "`raw_sgd` and `clipped_sgd` are not part of the update: they are what plain SGD would have"
        " done with the same gradient. Norms do not add up; the vectors do.",
        "",
        f"Mean clip factor {summary['mean_clip_factor']:.4f}; loss {summary['first_loss']:.4f} at"
        f" the first step, {summary['last_loss']:.4f} at the last.",
        "",
        "| tensor that moved most | in steps |",
        "|---|---:|",
    ]
    lines += [f"| `{name}` | {times} |" for name, times in summary["most_moved_tensors"].items()]
    return "\n".join(lines) + "\n"
