"""circuit ov-write-progress-report: when heads match and write."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options
from .output import print_report, progress_bar, stdout, table
from .training import load_train_config

PANEL = "Circuits"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("ov-write-progress-report", rich_help_panel=PANEL)(ov_write_progress_report)


def ov_write_progress_report(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    overrides: options.Set = None,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    head: options.Heads = None,
    score_query_role: options.ScoreQueryRole = "prediction",
    support_key_role: options.SupportKeyRole = "support_value",
    distractor_key_role: options.DistractorKeyRole = "value_distractors",
    record_side: options.RecordSide = "clean",
    pair_type: options.PairTypes = None,
    max_pairs_per_type: options.MaxPairs = 64,
    min_pairs_per_type: options.MinPairs = 16,
    split: options.Splits = None,
    top_k_correlations: Annotated[
        int, typer.Option(min=1, help="Correlations listed in the summary, by size.")
    ] = 32,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """How heads come to match, look and write over checkpoints, and what moves with it."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.inputs import PairOptions, choose_checkpoints
    from circuit.reports.ov_write_progress import ProgressOptions, ov_write_progress

    wanted = ProgressOptions(
        heads=tuple(head or ()),
        score_query_role=score_query_role,
        support_key_role=support_key_role,
        distractor_key_role=distractor_key_role,
        record_side=record_side,
        pairs=PairOptions(
            tuple(pair_type or ("support_value",)), max_pairs_per_type, min_pairs_per_type
        ),
        splits=tuple(split) if split else None,
        top_k_correlations=top_k_correlations,
    )
    checkpoints = choose_checkpoints(checkpoint, checkpoint_dir)
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=len(checkpoints), note="")
        result = ov_write_progress(
            settings,
            probe_set,
            checkpoints,
            output_dir,
            wanted,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not as_json:
        _print_summary(result.summary)
    print_report(result, as_json)


def _print_summary(summary: dict[str, Any]) -> None:
    columns = ["QK sep.", "att. support", "att. others", "OV map", "own margin", "logit DLA"]
    made = table(f"step {summary['steps'][-1]}", ["head", *columns, "margin DLA", "swapped"])
    for head, values in summary["last_step"].items():
        made.add_row(head, *("-" if v is None else f"{v:.3f}" for v in values.values()))
    stdout.print(made)
    stdout.print(_LEGEND, style="dim", soft_wrap=True)
    for what, name in (("matches", "match_winner"), ("writes", "write_winner")):
        winner = summary[name]
        if winner:
            stdout.print(
                f"{winner['head']} {what} best: {winner['column']} {winner['first_step']:.2f} ->"
                f" {winner['last_step']:.2f}, half way at step {winner['half_way_step']}"
            )
    for row in summary["top_correlations"][:3]:
        stdout.print(f"r = {row['pearson']:.3f}: {row['head']} {row['write']}, {row['output']}")


_LEGEND = (
    "own margin: what the head writes for the answer over the best wrong value of its own logits;"
    " margin DLA: what it writes\nonto the model's margin, whose competitor the model chooses;"
    " swapped: the same with another pair's support value"
)
