"""circuit answer-scalar-residual-diagnosis."""

from __future__ import annotations

from typing import Annotated

import typer

from . import complete, options
from .output import print_report, progress_bar, stdout, table
from .training import load_train_config

PANEL = "Circuits"
SWITCH_BUCKETS = ("all", "same_competitor", "competitor_switch")


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("answer-scalar-residual-diagnosis", rich_help_panel=PANEL)(diagnose)


def diagnose(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    overrides: options.Set = None,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    pair_type: options.PairTypes = None,
    margin_side: Annotated[
        list[str] | None,
        typer.Option(
            help="Side whose logits are read; repeatable. Both by default.",
            autocompletion=complete.values(*complete.SIDES),
        ),
    ] = None,
    scalar: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer scalar; repeatable. All by default.",
            autocompletion=complete.answer_scalar,
        ),
    ] = None,
    switch_bucket: Annotated[
        list[str] | None,
        typer.Option(
            help="Bucket of the means; repeatable. All three by default.",
            autocompletion=complete.values(*SWITCH_BUCKETS),
        ),
    ] = None,
    split: options.Splits = None,
    max_pairs_per_type: options.MaxPairs = 64,
    min_pairs_per_type: options.MinPairs = 16,
    top_k_wrong: Annotated[
        int, typer.Option(min=1, help="Best wrong values in every pair row.")
    ] = 5,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Answer scalars between consecutive checkpoints: first order, curvature, switch."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.answer_changes import DiagnosisOptions
    from circuit.reports.answer_scalar_residual_diagnosis import answer_scalar_residual_diagnosis
    from circuit.reports.inputs import PairOptions

    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=None, note="")
        result = answer_scalar_residual_diagnosis(
            settings,
            probe_set,
            output_dir,
            DiagnosisOptions(
                PairOptions(
                    tuple(pair_type or ("support_value",)), max_pairs_per_type, min_pairs_per_type
                ),
                tuple(margin_side or complete.SIDES),
                tuple(scalar or complete.ANSWER_SCALARS),
                tuple(switch_bucket or SWITCH_BUCKETS),
                tuple(split) if split else None,
                top_k_wrong,
            ),
            checkpoints=checkpoint,
            checkpoint_dir=checkpoint_dir,
            overwrite=overwrite,
            progress=lambda at: bar.update(
                task,
                completed=at.done,
                total=at.total,
                note=f"{at.where}, node {at.node} of {at.nodes}" if at.where else "",
            ),
        )
    if not as_json:
        made = table(
            "mean change over all intervals, pairs and sides",
            ["scalar", "bucket", "n", "change", "first order", "curvature", "switch", "R²"],
        )
        for row in result.summary["over_all_intervals"]:
            cells = ("delta", "first_order", "curvature", "switch")
            values = [row[f"mean_{cell}"] for cell in cells] + [row["first_order_r2"]]
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            made.add_row(row["scalar"], row["switch_bucket"], str(row["pairs"]), *shown)
        stdout.print(made)
    print_report(result, as_json)
