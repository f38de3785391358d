"""Commands that read a token's code from the residual stream, and put it back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import complete, options
from .output import print_report, progress_bar, share, stdout, table
from .training import load_train_config

if TYPE_CHECKING:
    from circuit.reports.base import ReportResult

PANEL = "Circuits"
GROUPS = ("answer_value", "support_value", "query_key", "support_key", "position_token")
CONTROLS = ("shuffled_answer_value", "wrong_support_value", "random_subspace", "key_identity")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("value-code-subspace-report", rich_help_panel=PANEL)(value_code_subspace_report)
    app.command("value-code-transfer-rescue", rich_help_panel=PANEL)(value_code_transfer_rescue)


def value_code_subspace_report(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    stage: Annotated[
        list[str],
        typer.Option(help="Stage; repeatable.", autocompletion=complete.stage),
    ],
    overrides: options.Set = None,
    position_role: Annotated[
        list[str] | None,
        typer.Option(help="Role; repeatable. prediction by default.", autocompletion=complete.role),
    ] = None,
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            help="Token by which reads are grouped; repeatable. answer_value by default.",
            autocompletion=complete.values(*GROUPS),
        ),
    ] = None,
    pca_rank: Annotated[int, typer.Option(min=1, help="Rank of both bases.")] = 4,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    split: options.Splits = None,
    max_records: options.MaxRecords = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """When, and at which stage, a position tells which token it holds."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.inputs import choose_checkpoints
    from circuit.reports.value_code_subspace import SubspaceOptions, value_code_subspace

    chosen = choose_checkpoints(checkpoint, checkpoint_dir)
    wanted = SubspaceOptions(
        stages=tuple(stage),
        position_roles=tuple(position_role or ("prediction",)),
        group_by=tuple(group_by or ("answer_value",)),
        splits=tuple(split) if split else None,
        max_records=max_records,
        pca_rank=pca_rank,
    )
    with progress_bar(not as_json) as bar:
        task = bar.add_task("checkpoints", total=len(chosen), note="")
        result = value_code_subspace(
            settings,
            probe_set,
            chosen,
            wanted,
            output_dir,
            overwrite=overwrite,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    if not as_json:
        _print_readout(result)
    print_report(result, as_json)


def _print_readout(result: ReportResult) -> None:
    steps, bar = result.summary["steps"], result.summary["readable_at_accuracy"]
    made = table(
        f"readable: accuracy at least {bar} from that step to {steps[-1]}"
        f" ({result.summary['reads']} reads)",
        [
            "role",
            "stage",
            "by",
            "centroid from",
            "lens from",
            "centroid %",
            "key removed %",
            "lens %",
        ],
    )
    for entry in result.summary["readout"]:
        made.add_row(
            entry["position_role"],
            entry["stage"],
            entry["group_by"],
            _step(entry["readable_from_step"]),
            _step(entry["lens_readable_from_step"]),
            share(entry["last_centroid_accuracy"]),
            share(entry["last_centroid_accuracy_key_removed"]),
            share(entry["last_lens_value_accuracy"]),
        )
    stdout.print(made)


def _step(step: int | None) -> str:
    return "-" if step is None else str(step)


def value_code_transfer_rescue(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    source_stage: Annotated[
        str, typer.Option(help="Stage of the source.", autocompletion=complete.stage)
    ],
    target_stage: Annotated[
        str,
        typer.Option(help="Stage at which the code is removed.", autocompletion=complete.stage),
    ],
    overrides: options.Set = None,
    source_position_role: Annotated[
        str, typer.Option(help="Role of the source.", autocompletion=complete.role)
    ] = "support_value",
    target_position_role: Annotated[
        str,
        typer.Option(
            help="Role at which the code is removed; one position.",
            autocompletion=complete.role,
        ),
    ] = "prediction",
    context_stage: Annotated[
        str | None,
        typer.Option(
            help="Stage of the context; the source's by default.",
            autocompletion=complete.stage,
        ),
    ] = None,
    context_position_role: Annotated[
        str, typer.Option(help="Role of the context.", autocompletion=complete.role)
    ] = "prediction",
    context_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the context's basis; --basis-rank by default."),
    ] = None,
    group_by: Annotated[
        str,
        typer.Option(
            help="Token by which identity bases are taken.",
            autocompletion=complete.values(*GROUPS),
        ),
    ] = "answer_value",
    basis_rank: Annotated[
        int, typer.Option(min=1, help="Rank of the source's and the target's basis.")
    ] = 16,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Control; repeatable. All by default.",
            autocompletion=complete.values(*CONTROLS),
        ),
    ] = None,
    fit_fraction: Annotated[
        float, typer.Option(help="Share of the reads that bases and maps are fitted on.")
    ] = 0.75,
    ridge_lambda: Annotated[float, typer.Option(help="Penalty of the maps.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Reads of one forward pass.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the random subspace and the intervals.")] = 17,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    split: options.Splits = None,
    max_records: options.MaxRecords = None,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Remove a value code, and put it back from its source, its context, or a control."""
    settings = load_train_config(config, overrides, device, threads)
    from circuit.reports.inputs import choose_checkpoints
    from circuit.reports.value_code_transfer_rescue import RescueOptions
    from circuit.reports.value_code_transfer_rescue import value_code_transfer_rescue as report

    chosen = choose_checkpoints(checkpoint, checkpoint_dir)
    wanted = RescueOptions(
        source_stage=source_stage,
        target_stage=target_stage,
        source_position_role=source_position_role,
        target_position_role=target_position_role,
        context_stage=context_stage or source_stage,
        context_position_role=context_position_role,
        context_rank=context_rank or basis_rank,
        group_by=group_by,
        splits=tuple(split) if split else None,
        max_records=max_records,
        batch_size=batch_size,
        basis_rank=basis_rank,
        controls=tuple(control or CONTROLS),
        fit_fraction=fit_fraction,
        ridge_lambda=ridge_lambda,
        seed=seed,
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
        _print_rescue(result)
    print_report(result, as_json)


def _print_rescue(result: ReportResult) -> None:
    summary = result.summary
    steps = [str(step) for step in summary["steps"]]
    made = table(
        f"rescue fraction of the negative answer loss by step"
        f" ({summary['evaluation_reads']} evaluation reads)",
        ["condition", *steps],
    )
    lost = summary["lost_by_removal"]["negative_answer_loss"]
    rescued = summary["rescue"]["negative_answer_loss"]
    for condition, values in {"(lost by removal)": lost, **rescued}.items():
        shown = ["-" if values[step] is None else f"{values[step]:.3f}" for step in steps]
        made.add_row(condition, *shown)
    stdout.print(made)
