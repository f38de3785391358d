"""circuit bilinear-qk-match-separation: finds the head whose route is worth attributing."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from . import options
from .output import print_report, progress_bar, stdout, table
from .training import load_train_config

PANEL = "Circuits"


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("bilinear-qk-match-separation", rich_help_panel=PANEL)(separation)


def separation(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    overrides: options.Set = None,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    head: options.Heads = None,
    rank: Annotated[
        list[int] | None,
        typer.Option("--rank", min=1, help="Rank beside the whole matrix; repeatable; 8."),
    ] = None,
    context_stage: options.ContextStage = None,
    layernorm_mode: options.LayernormMode = "head_ln1",
    score_query_role: options.ScoreQueryRole = "prediction",
    support_key_role: options.SupportKeyRole = "support_value",
    distractor_key_role: options.DistractorKeyRole = "value_distractors",
    split: options.Splits = None,
    max_records: options.MaxRecords = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Which head matches queries to the support, at every checkpoint: finds whom to attribute."""
    settings = load_train_config(config, overrides, device)
    from circuit.reports import bilinear_qk_match_separation as report

    wanted = report.SeparationOptions(
        heads=tuple(head or ()),
        ranks=tuple(rank or [8]),
        context_stage=context_stage,
        layernorm_mode=cast(Any, layernorm_mode),
        query_role=score_query_role,
        support_role=support_key_role,
        distractor_role=distractor_key_role,
        splits=tuple(split) if split else None,
        max_records=max_records,
    )
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=None, note="")
        result = report.bilinear_qk_match_separation(
            settings,
            probe_set,
            output_dir,
            wanted,
            checkpoints=checkpoint,
            checkpoint_dir=checkpoint_dir,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not as_json:
        winner = result.summary["winner"]
        made = table(None, ["head", "score", "first", "last", "growth", "support wins %"])
        rows = [h for h in result.summary["heads"] if h["score"] == winner["score"]]
        for h in sorted(rows, key=lambda h: -h[result.summary["ranked_by"]]):
            made.add_row(
                h["head"],
                h["score"],
                f"{h['separation_at_first']:.3f}",
                f"{h['separation_at_last']:.3f}",
                "-" if h["growth"] is None else f"{h['growth']:+.3f}",
                f"{100 * h['support_wins_at_last']:.1f}",
            )
        stdout.print(made)
    print_report(result, as_json)
