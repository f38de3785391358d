"""Commands that several parts of the study share, as jobs, and the paths of the reference run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from circuit.options import Options
from circuit.reports.ov_write_progress import ProgressOptions
from circuit.reports.report import Report
from circuit.studies.jobs import Job, Words, checkpoints, report_file, report_job
from circuit.studies.scales import Scale

DATA = "data/generated/symbolic_kv_stream_learnability"
BENCHMARK_FILE = f"{DATA}/metadata.json"
RUN = "artifacts/runs/symbolic_kv_reference_formation"
SPARSE = "artifacts/runs/symbolic_kv_heldout_generalization"
PROBE = f"{RUN}/analysis/probe_set.jsonl"
DONE = f"{RUN}/summary.json"
RUN_CONFIG = f"{RUN}/run_config.json"

READS: dict[str, Any] = {"probe_set": Path(PROBE)}
"""Of the options of every report that reads the study's probe set."""
TOP = "40"
"""Tensors that the contract lists for each step of a trace."""


def train_job(
    target: str,
    config: str,
    run: str,
    steps: int,
    name: str = "",
    made: str = "summary.json",
    trace: str = "",
    traced: int = 0,
    same_as: str = "",
    taken: int = 0,
) -> Job:
    """A run; `study train` goes on with one that was cut off.

    Args:
        trace: folder of the trace that is recorded in the same pass, if one is.
        traced: the last step of that trace.
        same_as: folder of a run of the same recipe, which it begins with, if there is one.
        taken: the last step that it takes over from it.
    """
    argv: Words = ("study", "train", "--config", config)
    if made != "summary.json":
        argv += ("--outcome", f"{run}/{made}")
    inputs: Words = (config, BENCHMARK_FILE)
    if same_as:
        argv += ("--same-as", same_as)
        inputs += (f"{same_as}/summary.json",)
    outputs: Words = (f"{run}/{made}",)
    if trace:
        argv += ("--trace", trace, "--trace-end-step", str(traced))
        argv += ("--trace-top-k-parameters", TOP)
        outputs += (report_file(trace, "optimizer-update-trace"),)
    name = name or run.split("/")[2]
    return Job(
        *(target, "train", name, argv, inputs, outputs), units=steps, traced=traced, taken=taken
    )


def evaluate_job(target: str, run: str, which: str, split: str = "", config: str = "") -> Job:
    """An evaluation of one checkpoint."""
    argv: Words = ("evaluate", "--config", config or f"{run}/run_config.json")
    argv += ("--checkpoint", f"{run}/checkpoints/{which}.pt")
    argv += ("--split", split) if split else ()
    name = "_".join(run.split("/")[2:])
    outputs = (f"{run}/evaluation/{which}.json",)
    return Job(target, "evaluate", name, argv, (f"{run}/summary.json",), outputs)


def trace_job(target: str, run: str, trace: str, end: int, scale: Scale) -> Job:
    """A trace that proves the run's past; `study trace` goes on with one that was cut off."""
    argv: Words = (
        *("study", "trace", "--config", f"{run}/run_config.json", "--from-initialization"),
        *("--output-dir", trace, "--end-step", str(end), "--train-split", "train"),
        *("--checkpoint-every", "1", "--checkpoint-start-step", "0"),
        *("--progress-every", str(max(1, 100 * scale.unit // 250)), "--top-k-parameters", TOP),
        "--require-historical-replay",
    )
    outputs = (report_file(trace, "optimizer-update-trace"),)
    inputs = (f"{run}/summary.json",)
    kind = "optimizer_update_trace"
    return Job(target, kind, run.split("/")[2], argv, inputs, outputs, units=end)


def progress_options(scale: Scale, folder: str) -> ProgressOptions:
    """The contract's QK/OV audit: all heads at its 16 checkpoints."""
    steps = (*range(750, 3001, 250), *range(3500, 6001, 500))
    return ProgressOptions(
        **READS,
        **checkpoints(folder, map(scale.step, steps)),
        heads=scale.heads,
        splits=("validation_iid",),
    )


def shard_edges(start: int, end: int, shards: int) -> list[int]:
    """Where a window of steps is cut."""
    return [start + (end - start) * i // shards for i in range(shards + 1)]


def shard_folder(whole: str, start: int, end: int) -> str:
    """Where a shard stands: beside `runs`, so that a search for reports finds the whole alone."""
    return f"{whole.replace('artifacts/runs', 'artifacts/shards', 1)}/{start:04}_{end:04}"


def sharded(
    target: str,
    name: str,
    kind: type[Report[Any]],
    options: Options,
    folder: str,
    *,
    run: str,
    inputs: Words,
    edges: list[int],
) -> list[Job]:
    """An attribution in parts, and their merging."""
    scalars = len(getattr(options, "heads", ())) or 1
    parts = [
        report_job(
            target,
            kind,
            options.model_copy(update={"start_step": start, "end_step": end}),
            shard_folder(folder, start, end),
            run=run,
            name=f"{name}_{start}_{end}",
            inputs=inputs,
            units=end - start,
            scalars=scalars,
        )
        for start, end in pairwise(edges)
    ]
    argv = ("trace", "merge", folder, *(part.folder for part in parts), "--overwrite")
    shards = tuple(path for part in parts for path in part.outputs)
    outputs = (report_file(folder, kind.command),)
    steps = edges[-1] - edges[0]
    whole = Job(target, "trace_merge", name, argv, shards, outputs, units=steps, scalars=scalars)
    return [*parts, whole]


def routes(scale: Scale) -> dict[str, Any]:
    """The routes of the paper's closure, from embedding to the last layer's output."""
    prediction, support = "position_role=prediction", "position_role=support_value"
    key, value = scale.key_rank(7), scale.value_rank(64)
    specs = [
        f"embed_key_support_value,stage=embedding,subspace=embedding_key_identity,rank={key},{support}",
        f"embed_support_value,stage=embedding,subspace=embedding_value_identity,rank={value},{support}",
        f"L0_out_support_value,stage=layer_0_post_mlp,subspace=full_residual,{support}",
    ]
    for head, part, stage, rank, role in (
        ((1, 1), "qk_query", "layer_0_post_mlp", 8, prediction),
        ((1, 3), "qk_query", "layer_0_post_mlp", 8, prediction),
        ((1, 1), "ov_input", "layer_0_post_mlp", 16, support),
        ((1, 1), "ov_output", "layer_1_post_attn", 16, prediction),
        ((2, 1), "qk_query", "layer_1_post_mlp", 8, prediction),
        ((2, 1), "qk_key", "layer_1_post_mlp", 8, support),
        ((2, 1), "ov_input", "layer_1_post_mlp", 16, support),
        ((2, 1), "ov_output", "layer_2_post_attn", 16, prediction),
    ):
        layer, number = head
        specs.append(
            f"L{layer}H{number}_{part},stage={stage},subspace=head_{part},rank={rank},"
            f"head_layer={layer},head={number},{role}"
        )
    specs += [
        f"L1_out_prediction,stage=layer_1_post_mlp,subspace=full_residual,{prediction}",
        f"L1_out_support_value,stage=layer_1_post_mlp,subspace=full_residual,{support}",
        f"L2_attn_prediction,stage=layer_2_post_attn,subspace=full_residual,{prediction}",
    ]
    return {"routes": [f"label={route}" for route in specs]}
