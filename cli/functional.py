"""circuit mlp-input-functional-subspace-report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import complete, options
from .output import percent, print_report, progress_bar, stdout, table
from .training import load_train_config
from .value_code import GROUPS

PANEL = "Circuits"
ENDPOINTS = ("source", "target")
COLUMNS = ("g_in_delta_in", "g_out_delta_in", "g_out_delta_mlp", "g_out_delta_total")


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("mlp-input-functional-subspace-report", rich_help_panel=PANEL)(functional_subspace)


def functional_subspace(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    scalar_pair_rows: Annotated[
        Path,
        typer.Option(
            help="Pair rows of answer-scalar-residual-diagnosis: intervals and pairs.",
            autocompletion=complete.scalar_pair_rows,
        ),
    ],
    output_dir: options.OutputDir,
    source_component: Annotated[
        str,
        typer.Option(
            help="Component that writes, such as L1H1.", autocompletion=complete.component
        ),
    ],
    component: Annotated[
        str,
        typer.Option(help="MLP that reads it, such as L1MLP.", autocompletion=complete.mlp),
    ],
    overrides: options.Set = None,
    pair_type: options.PairTypes = None,
    position_role: Annotated[
        list[str] | None,
        typer.Option(help="Role; repeatable. prediction by default.", autocompletion=complete.role),
    ] = None,
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            help="Token by which pairs are summed; repeatable. answer_value by default.",
            autocompletion=complete.values(*GROUPS),
        ),
    ] = None,
    scalar: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer scalar; repeatable. fixed_source_competitor_margin by default.",
            autocompletion=complete.answer_scalar,
        ),
    ] = None,
    endpoint_role: Annotated[
        list[str] | None,
        typer.Option(
            help="End of each interval: source or target; repeatable. Both by default.",
            autocompletion=complete.values(*ENDPOINTS),
        ),
    ] = None,
    subspace_rank: Annotated[int, typer.Option(min=1, help="Rank of the PCA bases.")] = 4,
    record_side: options.RecordSide = "clean",
    start_step: Annotated[
        int | None, typer.Option(min=0, help="Only intervals that start at this step or later.")
    ] = None,
    end_step: Annotated[
        int | None, typer.Option(min=0, help="Only intervals that end at this step or earlier.")
    ] = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Whether the readout uses what a component writes to an MLP: past it, and through it."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.mlp_input_functional_subspace import (
        FunctionalSubspace,
        mlp_input_functional_subspace,
    )

    wanted = FunctionalSubspace(
        source=source_component,
        mlp=component,
        roles=tuple(position_role or ("prediction",)),
        scalars=tuple(scalar or ("fixed_source_competitor_margin",)),
        endpoints=tuple(endpoint_role or ENDPOINTS),
        group_by=tuple(group_by or ("answer_value",)),
        pair_types=tuple(pair_type or ("support_value",)),
        side=record_side,
        rank=subspace_rank,
        start_step=start_step,
        end_step=end_step,
    )
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=None, note="")
        result = mlp_input_functional_subspace(
            settings,
            probe_set,
            scalar_pair_rows,
            wanted,
            output_dir,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not as_json:
        means = result.summary["means"]
        first, last = min(row["step"] for row in means), max(row["step"] for row in means)
        made = table(
            f"{source_component} -> {component}, means over pairs at the first and the last step",
            ["role", "scalar", "step", "n", "g_in.δ_in", "skip", "MLP", "total", "MLP's share"],
        )
        for row in means:
            if row["step"] in (first, last):
                shown = [f"{row[f'mean_{column}']:.3f}" for column in COLUMNS]
                place = (row["position_role"], row["scalar"], str(row["step"]), str(row["pairs"]))
                made.add_row(*place, *shown, percent(row["through_mlp"]))
        stdout.print(made)
    print_report(result, as_json)
