"""circuit route-to-margin-closure and route-to-scalar-closure: what routes explain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import complete, options
from .output import print_report, progress_bar, stdout, table
from .training import load_train_config

PANEL = "Circuits"
BUCKETS = ("all", "same_competitor", "competitor_switch")
ROUTE_KEYS = ("label", "stage", "subspace", "rank", "head_layer", "head", "position_role")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("route-to-margin-closure", rich_help_panel=PANEL)(margin_closure)
    app.command("route-to-scalar-closure", rich_help_panel=PANEL)(scalar_closure)


def complete_route(ctx: typer.Context, incomplete: str) -> list[str]:
    """The next key of a route, or the values of the key that is being typed."""
    before, comma, last = incomplete.rpartition(",")
    key, equals, value = last.partition("=")
    head = before + comma
    if not equals:
        named = {part.partition("=")[0] for part in before.split(",")}
        return [f"{head}{k}=" for k in ROUTE_KEYS if k.startswith(key) and k not in named]
    values = {
        "stage": complete.stage(ctx, value),
        "position_role": complete.role(value),
        "subspace": [name for name in complete.SUBSPACES if name.startswith(value)],
    }
    return [f"{head}{key}={name}" for name in values.get(key, [])]


MarginSides = Annotated[
    list[str] | None,
    typer.Option(
        "--margin-side",
        help="Side of the pairs; repeatable. Both by default.",
        autocompletion=complete.values(*complete.SIDES),
    ),
]
FitIntercept = Annotated[
    bool, typer.Option("--fit-intercept", help="Fit a constant beside the routes.")
]


def margin_closure(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    output_dir: options.OutputDir,
    route: Annotated[
        list[str],
        typer.Option(
            help="label=...,stage=...,position_role=...[,subspace=...,rank=...[,head_layer=...,"
            "head=...]]; repeatable. The whole residual without a subspace.",
            autocompletion=complete_route,
        ),
    ],
    overrides: options.Set = None,
    checkpoint_dir: options.CheckpointDir = None,
    checkpoint: options.Checkpoints = None,
    pair_type: options.PairTypes = None,
    margin_side: MarginSides = None,
    target_scalar: Annotated[
        str,
        typer.Option(
            help="Scalar whose changes are fitted.",
            autocompletion=complete.values(*complete.ANSWER_SCALARS, "contrast_margin"),
        ),
    ] = "moving_answer_margin",
    fit_intercept: FitIntercept = False,
    split: options.Splits = None,
    max_pairs_per_type: options.MaxPairs = 64,
    min_pairs_per_type: options.MinPairs = 16,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """How much of a margin's change over training do changes of route scores explain?"""
    from circuit.reports import route_to_margin_closure as report
    from circuit.reports.inputs import PairOptions, choose_checkpoints
    from circuit.scalars.routes import parse_route

    settings = load_train_config(config, overrides, device, threads)
    checkpoints = choose_checkpoints(checkpoint, checkpoint_dir, least=2)
    wanted = report.RouteClosure(
        tuple(parse_route(spec) for spec in route),
        PairOptions(tuple(pair_type or ("support_value",)), max_pairs_per_type, min_pairs_per_type),
        tuple(margin_side or complete.SIDES),
        target_scalar,
        fit_intercept,
        tuple(split) if split else None,
    )
    with progress_bar(not as_json) as bar:
        task = bar.add_task("scoring routes", total=len(checkpoints), note="")
        result = report.route_to_margin_closure(
            settings,
            probe_set,
            checkpoints,
            wanted,
            output_dir,
            overwrite=overwrite,
            progress=lambda step: bar.update(task, advance=1, note=f"step {step}"),
        )
    if not as_json:
        fits = result.summary["fits"]
        _print_fits([{"fit": name, **fit} for name, fit in fits.items()])
        _print_contributions(next(iter(fits.values())))
    print_report(result, as_json)


def scalar_closure(
    route_closure_rows: Annotated[
        Path,
        typer.Option(
            help="Rows of route-to-margin-closure.",
            autocompletion=complete.artifact("route_to_margin_closure_rows.jsonl"),
        ),
    ],
    scalar_pair_rows: Annotated[
        Path,
        typer.Option(
            help="Pair rows of answer-scalar-residual-diagnosis.",
            autocompletion=complete.scalar_pair_rows,
        ),
    ],
    output_dir: options.OutputDir,
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
            help="Which rows enter, by whether the competitor switched; repeatable. Each by"
            " default.",
            autocompletion=complete.values(*BUCKETS),
        ),
    ] = None,
    route_label: Annotated[
        list[str] | None,
        typer.Option(help="Route, by its label; repeatable. All by default."),
    ] = None,
    pair_type: options.PairTypes = None,
    margin_side: MarginSides = None,
    fit_intercept: FitIntercept = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Which answer scalar do changes of route scores explain, and when?"""
    from circuit.reports import route_to_scalar_closure as report

    wanted = report.ScalarClosure(
        tuple(scalar) if scalar else None,
        tuple(switch_bucket or BUCKETS),
        tuple(route_label) if route_label else None,
        tuple(pair_type) if pair_type else None,
        tuple(margin_side) if margin_side else None,
        fit_intercept,
    )
    result = report.route_to_scalar_closure(
        route_closure_rows, scalar_pair_rows, wanted, output_dir, overwrite=overwrite
    )
    if not as_json:
        fits = result.summary["fits"]
        _print_fits([{"fit": f"{f['scalar']}, {f['switch_bucket']}", **f} for f in fits])
    print_report(result, as_json)


def _print_fits(fits: Sequence[Mapping[str, Any]]) -> None:
    made = table(None, ["fit", "rows", "mean change", "R²", "held out", "about zero", "rank"])
    names = ("mean_actual", "r_squared", "r_squared_held_out", "r_squared_about_zero")
    for fit in fits:
        rank = "-" if fit["rank"] is None else f"{fit['rank']} of {fit['columns']}"
        made.add_row(fit["fit"], str(fit["rows"]), *(_shown(fit[name]) for name in names), rank)
    stdout.print(made)
    for fit in fits:
        if fit["undetermined_routes"]:
            stdout.print(
                f"{fit['fit']}: coefficients not determined by the rows (least norm is shown):"
                f" {', '.join(fit['undetermined_routes'])}",
                soft_wrap=True,
            )


def _print_contributions(fit: Mapping[str, Any]) -> None:
    made = table(None, ["route", "coefficient", "contribution"])
    for label, value in fit["coefficients"].items():
        made.add_row(label, _shown(value), _shown(fit["mean_contributions"][label]))
    stdout.print(made)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
