"""Commands about weights alone."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .output import print_report, progress_bar, stdout, table
from .training import load_train_config

PANEL = "Circuits"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("weight-svd-trace", rich_help_panel=PANEL)(weight_svd_trace)


def weight_svd_trace(
    config: options.TrainConfigPath,
    output_dir: options.OutputDir,
    overrides: options.Set = None,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    max_singular_values: Annotated[
        int, typer.Option(min=1, help="Singular values written per matrix, at most.")
    ] = 16,
    top_vector_ranks: Annotated[
        int, typer.Option(min=1, help="Pairs of singular vectors written per matrix, at most.")
    ] = 4,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """SVD of W_QK and W_OV of every head, and of W_in and W_out, at each checkpoint."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.inputs import choose_checkpoints
    from circuit.reports.weight_svd_trace import SvdOptions
    from circuit.reports.weight_svd_trace import weight_svd_trace as report

    chosen = choose_checkpoints(checkpoint, checkpoint_dir)
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=len(chosen), note="")
        result = report(
            settings,
            chosen,
            output_dir,
            SvdOptions(max_singular_values, top_vector_ranks),
            overwrite=overwrite,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    if not as_json:
        made = table(
            "growth of the top singular value",
            ["matrix", "component", "first", "last", "half at step", "effective rank"],
        )
        for matrix, courses in result.summary["growth"].items():
            for course in courses[:3]:
                made.add_row(
                    matrix,
                    course["component"],
                    f"{course['first']:.3f}",
                    f"{course['last']:.3f}",
                    str(course["half_growth_step"] or "-"),
                    f"{course['effective_rank_last']:.1f}",
                )
        stdout.print(made)
    print_report(result, as_json)
