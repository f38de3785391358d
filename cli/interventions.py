"""Commands that change a state of the network and look at what follows."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from . import complete, options
from .output import print_report, progress_bar, share, stdout, table
from .training import load_train_config

PANEL = "Circuits"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("geometry-subspace-intervention", rich_help_panel=PANEL)(
        geometry_subspace_intervention
    )


def geometry_subspace_intervention(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    stage: Annotated[
        str, typer.Option(help="Stage that is changed.", autocompletion=complete.stage)
    ],
    subspace: Annotated[
        str,
        typer.Option(
            help="Subspace that is removed or kept.",
            autocompletion=complete.values(*complete.SUBSPACES),
        ),
    ],
    operation: Annotated[
        str,
        typer.Option(help="remove or keep.", autocompletion=complete.values("remove", "keep")),
    ],
    overrides: options.Set = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(help="Rank of the subspace; repeatable, each is one intervention."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Head whose subspace it is, such as L2H1.", autocompletion=complete.head),
    ] = None,
    position_role: Annotated[
        str,
        typer.Option(help="Role of the changed positions.", autocompletion=complete.role),
    ] = "prediction",
    query_mode: Annotated[
        str,
        typer.Option(
            help="single_query: each read by itself; batch_union: all reads of a record at once.",
            autocompletion=complete.values("single_query", "batch_union"),
        ),
    ] = "single_query",
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    split: options.Splits = None,
    max_records: options.MaxRecords = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Remove or keep a subspace at a stage and role: what margin and accuracy are left."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.geometry_subspace_intervention import InterventionOptions
    from circuit.reports.geometry_subspace_intervention import (
        geometry_subspace_intervention as report,
    )
    from circuit.reports.inputs import choose_checkpoints

    chosen = choose_checkpoints(checkpoint, checkpoint_dir)
    wanted = InterventionOptions(
        stage=stage,
        subspace=subspace,
        operation=cast(Any, operation),
        position_role=position_role,
        ranks=tuple(rank or ()),
        query_mode=cast(Any, query_mode),
        head=head,
        splits=tuple(split) if split else None,
        max_records=max_records,
    )
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=len(chosen), note="")
        result = report(
            settings,
            probe_set,
            chosen,
            wanted,
            output_dir,
            overwrite=overwrite,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    if not as_json:
        made = table(
            f"{operation} {subspace} at {stage} / {position_role}",
            ["step", "rank", "split", "reads", "margin", "after", "accuracy %", "after %"],
        )
        for mean in result.summary["means"]:
            made.add_row(
                str(mean["step"]),
                str(mean["rank"] or "-"),
                mean["split"],
                str(mean["reads"]),
                f"{mean['baseline_margin']:.3f}",
                f"{mean['intervened_margin']:.3f}",
                share(mean["baseline_answer_accuracy"]),
                share(mean["intervened_answer_accuracy"]),
            )
        stdout.print(made)
    print_report(result, as_json)
