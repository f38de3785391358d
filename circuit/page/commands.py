"""Command lines: of a report that exists, from its parameters; of one that does not.

A test runs each line through the program's own parser.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

_OPTIONS = {
    "probe_set": "--probe-set",
    "optimizer_trace_dir": "--optimizer-trace-dir",
    "heads": "--head",
    "ranks": "--rank",
    "bases": "--basis",
    "by_lag": "--by-lag",
    "context_stage": "--context-stage",
    "layernorm_mode": "--layernorm-mode",
    "query_role": "--score-query-role",
    "score_query_role": "--score-query-role",
    "support_role": "--support-key-role",
    "support_key_role": "--support-key-role",
    "distractor_role": "--distractor-key-role",
    "distractor_key_role": "--distractor-key-role",
    "side": "--record-side",
    "record_side": "--record-side",
    "scored_type": "--route-pair-type",
    "path": "--path",
    "partitions": "--partition",
    "loss_scope": "--loss-scope",
    "start_step": "--start-step",
    "end_step": "--end-step",
    "max_singular_values": "--max-singular-values",
    "top_vector_ranks": "--top-vector-ranks",
    "stages": "--stage",
    "stage": "--stage",
    "position_roles": "--position-role",
    "position_role": "--position-role",
    "group_by": "--group-by",
    "pca_rank": "--pca-rank",
    "subspace": "--subspace",
    "operation": "--operation",
    "query_mode": "--query-mode",
    "head": "--head",
    "source_stage": "--source-stage",
    "target_stage": "--target-stage",
    "context_position_role": "--context-position-role",
    "source_position_role": "--source-position-role",
    "target_position_role": "--target-position-role",
    "context_rank": "--context-rank",
    "batch_size": "--batch-size",
    "basis_rank": "--basis-rank",
    "controls": "--control",
    "fit_fraction": "--fit-fraction",
    "ridge_lambda": "--ridge-lambda",
    "seed": "--seed",
    "splits": "--split",
    "max_records": "--max-records",
    "top_k_correlations": "--top-k-correlations",
}
"""Option of each parameter that a report writes down, where it has one."""

QK = "bilinear-qk-rank-adam-state-attribution"
SEPARATION = "bilinear-qk-match-separation"
PROGRESS = "ov-write-progress-report"
SVD = "weight-svd-trace"
CODE = "value-code-subspace-report"
INTERVENTION = "geometry-subspace-intervention"
RESCUE = "value-code-transfer-rescue"
TRACE = "optimizer-update-trace"
_TRACE_FOLDER = "analysis/optimizer_update_trace"


def command_of(
    command: str,
    parameters: Mapping[str, Any],
    home: str,
    output: str,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """The command line that makes a report again.

    Args:
        parameters: of the report.
        home: the run's folder.
        output: the report's folder.
        overrides: the report's record of them, which names the config file, too.
    """
    config = overrides["config"] if overrides else f"{home}/run_config.json"
    words = ["circuit", command, "--config", config]
    words += _given("--set", overrides["set"]) if overrides else []
    for name, option in _OPTIONS.items():
        if name in parameters:
            words += _given(option, parameters[name])
    words += _pairs(parameters.get("pairs"), "route-" if command == QK else "")
    for start, end in parameters.get("windows") or ():
        words += ["--window", f"{start}:{end}"]
    words += _checkpoints(parameters.get("checkpoints") or ())
    return shlex.join([*words, "--output-dir", output, "--overwrite"])


def _given(option: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, list):
        return [word for one in value for word in (option, str(one))]
    return [option, str(value)]


def _pairs(pairs: Mapping[str, Any] | None, prefix: str) -> list[str]:
    if pairs is None:
        return []
    kind = "--route-pair-source-type" if prefix else "--pair-type"
    return [
        *_given(kind, pairs["types"]),
        *_given(f"--max-{prefix}pairs-per-type", pairs["max_per_type"]),
        *_given(f"--min-{prefix}pairs-per-type", pairs["min_per_type"]),
    ]


def _checkpoints(paths: Sequence[str]) -> list[str]:
    return [word for path in paths for word in ("--checkpoint", str(PurePosixPath(path)))]


@dataclass(frozen=True)
class Home:
    """A run as command lines name it.

    Attributes:
        folder: of the run.
        layers: of the model.
        width: of the residual stream.
        head_width: of a head.
        end_step: the last step that it has been trained to.
    """

    folder: str
    layers: int
    width: int
    head_width: int
    end_step: int


def command_for(command: str, home: Home, *, head: str = "L1H0", trace: str | None = None) -> str:
    """A command line that makes a report that does not exist, with its usual settings.

    Args:
        head: that stands out, for the commands about one head.
        trace: folder of a trace, relative to the run's.
    """
    output = command.removesuffix("-report").replace("-", "_")
    last = f"layer_{home.layers - 1}_post_mlp"
    before = f"layer_{home.layers - 2}_post_mlp" if home.layers > 1 else "embedding"
    stages = [f"layer_{layer}_post_mlp" for layer in range(home.layers)] + ["final_norm"]
    probe = ["--probe-set", f"{home.folder}/analysis/probe_set.jsonl"]
    folder = ["--checkpoint-dir", f"{home.folder}/checkpoints"]
    rank, match_rank = str(min(16, home.width // 8)), str(min(8, home.head_width))
    own: dict[str, list[str]] = {
        SEPARATION: [*probe, *folder, "--rank", match_rank],
        PROGRESS: [*probe, *folder],
        SVD: [*folder],
        QK: [
            *(*probe, "--optimizer-trace-dir", f"{home.folder}/{trace or _TRACE_FOLDER}"),
            *("--head", head, "--rank", match_rank),
        ],
        CODE: [
            *(*probe, *folder, *_given("--stage", stages)),
            *("--position-role", "prediction", "--group-by", "answer_value"),
        ],
        INTERVENTION: [
            *(*probe, *folder, "--stage", last, "--subspace", "embedding_value_identity"),
            *("--operation", "remove", "--rank", rank),
        ],
        RESCUE: [
            *(*probe, *folder, "--source-stage", before, "--target-stage", last),
            *("--source-position-role", "support_value", "--target-position-role", "prediction"),
            *("--context-stage", before, "--context-position-role", "prediction"),
            *("--context-rank", rank, "--basis-rank", rank, "--group-by", "answer_value"),
        ],
        TRACE: ["--from-initialization", "--end-step", str(home.end_step)],
    }
    words = ["circuit", command, "--config", f"{home.folder}/run_config.json", *own[command]]
    return shlex.join([*words, "--output-dir", f"{home.folder}/analysis/{output}"])


def probe_set_command(home: str, benchmark: str, split: str, records: int) -> str:
    """The command line that draws the probe set that the others name."""
    words = ["circuit", "generate-probe-set", "--benchmark-dir", benchmark, "--split", split]
    words += ["--examples-per-split", str(records), "--output", f"{home}/analysis/probe_set.jsonl"]
    return shlex.join(words)
