"""Options of every report on the tiny run, for laws that hold for all of them.

A new report needs a line here only where it requires an option that no other has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_run import CLAIMS, RUN

from circuit.reports.report import Report, ReportResult, all_reports, report_name, run_report
from circuit.train_config import load_run_config

MADE = Path("made/seed_0011")
"""Where reports stand, each in a folder of its command's name."""
KINDS = {kind.command: kind for kind in all_reports() if kind.generated and not kind.task}
"""Those of one task alone have their laws in tests of their own."""


def made(command: str, file: str = "rows.jsonl") -> Path:
    """A file of another report, which is made first."""
    return MADE / command / f"{report_name(command)}_{file}"


DIAGNOSIS = "answer-scalar-residual-diagnosis"
GOOD: dict[str, Any] = {
    "basis_rank": 2,
    "claims": (CLAIMS,),
    "checkpoint": RUN / "checkpoints/step_000012.pt",
    "checkpoints": tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in (3, 12)),
    "component": "L1MLP",  # with the source, the winner of write-path-selection
    "end_step": 2,
    "fit_fraction": 0.5,
    "max_pairs_per_type": 4,
    "min_pairs_per_type": 2,
    "operation": "remove",
    "optimizer_trace_dir": Path("trace"),
    "pca_rank": 2,
    "probe_set": RUN / "analysis/probe_set.jsonl",
    "ranks": (2,),
    "reference_step": 2,
    "routes": ("label=all,stage=final_norm,subspace=full_residual,position_role=prediction",),
    "runs": (RUN,),
    "source_component": "L1H0",
    "source_stage": "layer_0_post_mlp",
    "stage": "layer_1_post_mlp",
    "stages": ("layer_1_post_mlp",),
    "subspace": "embedding_value_identity",
    "subspace_rank": 2,
    "target_stage": "layer_1_post_mlp",
}
"""A value of each option that is required, or that keeps the report small, by its name."""
ROWS_OF = {
    "route_closure_rows": ("route-to-margin-closure", "rows.jsonl"),
    "scalar_pair_rows": (DIAGNOSIS, "pair_rows.jsonl"),
    "separation_rows": ("bilinear-qk-match-separation", "rows.jsonl"),
}
"""Options that name a file of another report."""
OWN: dict[str, dict[str, Any]] = {
    "cross-seed-comparison": {
        "reports": tuple(
            made(command, "report.json")
            for command in (
                "head-selection",
                "write-path-selection",
                "bilinear-qk-rank-adam-state-attribution",
                "mlp-functional-write-adam-state-attribution",
            )
        )
    },
    "counterfactual-training": {
        "scalars": ("loss",),
        "edits": ("no decay,scale=weight_decay*0,steps=1:2",),
    },
    "data-attribution": {
        "scalars": ("loss",),
        "replays": Path("replays"),
        "windows": ("0:2",),
        "examples": 3,
        "subsets": 3,
        "shares": (0.3,),
        "random_vectors": 1,
    },
    "data-credit": {"scalars": ("loss",)},
    "data-influence": {"scalars": ("loss",), "check_trainings": 3, "check_share": 0.1},
    "head-selection": {"start_step": 3, "end_step": 12, "score": "rank2"},
    "mlp-input-functional-subspace-report": {"end_step": None},
    "scalar-attribution": {"scalars": ("loss",)},
    "series-scan": {"series": (RUN / "checkpoints",), "length": 8, "strings": 2},
}
"""What a report takes in place of these."""


def options_of(command: str) -> Any:
    """The options of a report on the tiny run."""
    kind = KINDS[command]
    names, fields = kind.Options.declared(), kind.Options.model_fields
    rows = {name: made(*ROWS_OF[name]) for name in ROWS_OF if name in names}
    good = GOOD | {n: p for n, p in rows.items() if fields[n].is_required()} | OWN.get(command, {})
    given = {name: good[name] for name in names if good.get(name) is not None}
    return kind.Options(**given)


def sources_of(options: Any) -> list[str]:
    """Commands of the reports that some options read."""
    paths = [path for value in dict(options).values() for path in _paths(value)]
    return [path.parent.name for path in paths if path.is_relative_to(MADE)]


def _paths(value: Any) -> list[Path]:
    values = value if isinstance(value, tuple) else (value,)
    return [one for one in values if isinstance(one, Path)]


def make(
    command: str, folder: Path | None = None, overrides: Sequence[str] = (), **switches: Any
) -> ReportResult:
    """Make a report, and first those that it reads; `overrides` are of the run's config."""
    options = options_of(command)
    for source in sources_of(options):
        if not (MADE / source).exists():
            make(source)
    kind: type[Report[Any]] = KINDS[command]
    run = load_run_config(RUN, list(overrides)) if kind.reads_run else None
    return run_report(kind, run, options, folder or MADE / command, **switches)
