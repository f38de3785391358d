"""Commands that attribute changes to optimizer terms, and join their shards."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from circuit import CircuitError

from . import complete, options
from .output import print_report, progress_bar, stdout, table
from .trace import group, parse_window
from .training import load_train_config

if TYPE_CHECKING:
    from circuit.reports.attribution_report import WindowOptions
    from circuit.reports.base import ReportResult

PANEL = "Attribution"


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("bilinear-qk-rank-adam-state-attribution", rich_help_panel=PANEL)(attribute_qk)
    app.command("mlp-functional-write-adam-state-attribution", rich_help_panel=PANEL)(
        attribute_write
    )
    group.command("qk")(attribute_qk)
    group.command("write")(attribute_write)
    group.command("merge")(merge)


StartStep = Annotated[int | None, typer.Option(min=0, help="First state; the trace's first.")]
EndStep = Annotated[int | None, typer.Option(min=1, help="Last state; the trace's last.")]
Window = Annotated[
    list[str] | None,
    typer.Option("--window", help="Window a:b to sum up besides the whole; repeatable."),
]
PathRule = Annotated[
    str,
    typer.Option(
        help="How gradients are averaged along a step: midpoint, simpson or gauss:N.",
        autocompletion=complete.values("midpoint", "simpson", "gauss:2", "gauss:3"),
    ),
]
Partitions = Annotated[
    list[str] | None,
    typer.Option(
        "--partition",
        help="Parameter groups in the rows: layer, component, circuit (default); repeatable.",
        autocompletion=complete.values("layer", "component", "circuit"),
    ),
]
LossScope = Annotated[
    str,
    typer.Option(
        help="full_lm, or answer: also what SGD on the answers' loss alone would have done.",
        autocompletion=complete.values("full_lm", "answer"),
    ),
]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes; best with a trace recorded with --threads 1.")
]


def attribute_qk(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    optimizer_trace_dir: options.TraceDir,
    output_dir: options.OutputDir,
    overrides: options.Set = None,
    head_layer: Annotated[
        int | None, typer.Option(min=0, help="Layer of the heads that --head numbers.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(
            "--head",
            help="Head, L2H1 or a number with --head-layer; repeatable.",
            autocompletion=complete.head,
        ),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="'all' scans the whole model.", autocompletion=complete.values("all")),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", min=1, help="Rank; repeatable. 8 by default.")
    ] = None,
    basis: Annotated[
        list[str] | None,
        typer.Option(
            "--basis",
            help="source (anew before each step; default), step:N, or full; repeatable.",
            autocompletion=complete.values("source", "full", "step:"),
        ),
    ] = None,
    by_lag: Annotated[
        bool, typer.Option("--by-lag", help="Also attribute the reads of each lag apart.")
    ] = False,
    context_stage: options.ContextStage = None,
    layernorm_mode: options.LayernormMode = "head_ln1",
    score_query_role: options.ScoreQueryRole = "prediction",
    support_key_role: options.SupportKeyRole = "support_value",
    distractor_key_role: options.DistractorKeyRole = "value_distractors",
    record_side: options.RecordSide = "clean",
    route_pair_type: Annotated[
        str | None,
        typer.Option(help="Pair type that is scored.", autocompletion=complete.pair_type),
    ] = None,
    route_pair_source_type: Annotated[
        list[str] | None,
        typer.Option(
            help="Pair type that is built; repeatable. support_value by default.",
            autocompletion=complete.pair_type,
        ),
    ] = None,
    max_route_pairs_per_type: Annotated[
        int, typer.Option(min=1, help="Pairs built of each type, at most.")
    ] = 64,
    min_route_pairs_per_type: Annotated[
        int, typer.Option(min=0, help="Fewer pairs of a type are an error.")
    ] = 16,
    loss_scope: LossScope = "full_lm",
    path: PathRule = "simpson",
    partition: Partitions = None,
    start_step: StartStep = None,
    end_step: EndStep = None,
    window: Window = None,
    workers: Workers = 1,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Which optimizer term moved a head's QK match: contributions that add up, step by step."""
    chosen = _heads(head, head_layer, heads)
    settings = load_train_config(config, overrides, device)
    from circuit.reports import bilinear_qk_rank_adam_state_attribution as report
    from circuit.reports.inputs import PairOptions

    built = route_pair_source_type or [route_pair_type or "support_value"]
    wanted = report.QKOptions(
        heads=chosen,
        ranks=tuple(rank or [8]),
        bases=tuple(basis or ["source"]),
        by_lag=by_lag,
        context_stage=context_stage,
        layernorm_mode=cast(Any, layernorm_mode),
        query_role=score_query_role,
        support_role=support_key_role,
        distractor_role=distractor_key_role,
        side=record_side,
        pairs=PairOptions(tuple(built), max_route_pairs_per_type, min_route_pairs_per_type),
        scored_type=route_pair_type,
    )
    with progress_bar(not as_json) as bar:
        result = report.bilinear_qk_rank_adam_state_attribution(
            settings,
            probe_set,
            optimizer_trace_dir,
            output_dir,
            wanted,
            window=_window_options(start_step, end_step, window, workers),
            path=path,
            partitions=_partitions(partition),
            loss_scope=cast(Any, loss_scope),
            overwrite=overwrite,
            progress=AttributionBar(bar),
        )
    _print_attribution(result, as_json)


def attribute_write(
    config: options.TrainConfigPath,
    probe_set: options.ProbeSet,
    optimizer_trace_dir: options.TraceDir,
    output_dir: options.OutputDir,
    source_component: Annotated[
        str,
        typer.Option(
            help="Component whose write is followed, such as L1H3.",
            autocompletion=complete.component,
        ),
    ],
    component: Annotated[
        str,
        typer.Option(help="MLP that reads it, such as L1MLP.", autocompletion=complete.mlp),
    ],
    reference_step: Annotated[
        int, typer.Option(min=0, help="Step at which the readout gradients are frozen.")
    ],
    overrides: options.Set = None,
    position_role: Annotated[
        str,
        typer.Option(help="Positions that are summed over.", autocompletion=complete.role),
    ] = "prediction",
    scalar: Annotated[
        list[str] | None,
        typer.Option(
            "--scalar",
            help="Answer scalar that is read out; repeatable. The fixed source margin by default.",
            autocompletion=complete.answer_scalar,
        ),
    ] = None,
    endpoint_role: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint-role",
            help="End of an interval of the scalar rows: source (default) or target; repeatable.",
            autocompletion=complete.values("source", "target"),
        ),
    ] = None,
    pair_type: options.PairTypes = None,
    max_pairs_per_type: options.MaxPairs = 64,
    min_pairs_per_type: options.MinPairs = 16,
    record_side: options.RecordSide = "clean",
    reference_vector: Annotated[
        str,
        typer.Option(
            help="post_mlp_gradient or input_gradient.",
            autocompletion=complete.values("post_mlp_gradient", "input_gradient"),
        ),
    ] = "post_mlp_gradient",
    target_vector: Annotated[
        str,
        typer.Option(
            help="post_mlp_total_delta, mlp_output_delta or input_delta.",
            autocompletion=complete.values(
                "post_mlp_total_delta", "mlp_output_delta", "input_delta"
            ),
        ),
    ] = "post_mlp_total_delta",
    scalar_pair_rows: Annotated[
        Path | None,
        typer.Option(
            help="Pair rows of answer-scalar-residual-diagnosis, for the competitors;"
            " else they are those of the reference step.",
            autocompletion=complete.scalar_pair_rows,
        ),
    ] = None,
    loss_scope: LossScope = "full_lm",
    path: PathRule = "simpson",
    partition: Partitions = None,
    start_step: StartStep = None,
    end_step: EndStep = None,
    window: Window = None,
    workers: Workers = 1,
    overwrite: options.Overwrite = False,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Which optimizer term moved what a component writes for the answer, through an MLP."""
    settings = load_train_config(config, overrides, device)
    from circuit.reports import mlp_functional_write_adam_state_attribution as report
    from circuit.reports.inputs import PairOptions

    wanted = report.WriteOptions(
        source=source_component,
        mlp=component,
        reference_step=reference_step,
        role=position_role,
        scalars=tuple(scalar or ["fixed_source_competitor_margin"]),
        endpoints=tuple(endpoint_role or ["source"]),
        reference_vector=cast(Any, reference_vector),
        target_vector=cast(Any, target_vector),
        side=record_side,
        pairs=PairOptions(
            tuple(pair_type or ["support_value"]), max_pairs_per_type, min_pairs_per_type
        ),
    )
    with progress_bar(not as_json) as bar:
        result = report.mlp_functional_write_adam_state_attribution(
            settings,
            probe_set,
            optimizer_trace_dir,
            output_dir,
            wanted,
            scalar_pair_rows=scalar_pair_rows,
            window=_window_options(start_step, end_step, window, workers),
            path=path,
            partitions=_partitions(partition),
            loss_scope=cast(Any, loss_scope),
            overwrite=overwrite,
            progress=AttributionBar(bar),
        )
    _print_attribution(result, as_json)


def merge(
    output_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the whole.")],
    parts: Annotated[
        list[Path],
        typer.Argument(
            metavar="PART...", help="Folders of shards.", autocompletion=complete.attribution
        ),
    ],
    window: Window = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Join the shards of one attribution; gaps, overlaps and other parameters are refused."""
    from circuit.reports.attribution_report import merge_attributions

    result = merge_attributions(output_dir, parts, windows=_windows(window), overwrite=overwrite)
    _print_attribution(result, as_json)


def _heads(head: list[str] | None, layer: int | None, heads: str | None) -> tuple[str, ...]:
    if heads is not None:
        if heads != "all" or head or layer is not None:
            raise CircuitError(
                f"--heads {heads}", expected="'all' alone, or --head for chosen ones"
            )
        return ()
    if not head:
        raise CircuitError("no head is named", fix="pass --head L2H1, or --heads all")
    if layer is None:
        return tuple(head)
    for number in head:
        if not number.isdecimal():
            raise CircuitError(
                f"--head {number} with --head-layer {layer}",
                expected="a number, or an address such as L2H1 without --head-layer",
            )
    return tuple(f"L{layer}H{number}" for number in head)


def _windows(window: list[str] | None) -> tuple[tuple[int, int], ...]:
    return tuple(parse_window(text, "--window") for text in window or ())


def _partitions(names: list[str] | None) -> Any:
    return tuple(names or ["circuit"])


def _window_options(
    start: int | None, end: int | None, window: list[str] | None, workers: int
) -> WindowOptions:
    from circuit.reports.attribution_report import WindowOptions

    return WindowOptions(start, end, _windows(window), workers)


def _print_attribution(result: ReportResult, as_json: bool) -> None:
    if not as_json:
        summaries = result.summary["windows"]
        terms = list(summaries[0]["path"])
        short = [TERM_NAMES.get(term, term) for term in terms]
        shared = _shared_prefix([s["scalar"] for s in summaries])
        columns = ["scalar", "steps", "actual", *short, "closure %", "1st order %"]
        made = table(shared, columns)
        for s in summaries:
            made.add_row(
                s["scalar"].removeprefix(shared) or "all",
                f"{s['start_step']}:{s['end_step']}",
                f"{s['actual']:+.4g}",
                *(f"{s['path'][t]:+.{1 if t == 'rounding' else 3}g}" for t in terms),
                *(_percent(s["closure"][kind]) for kind in ("path", "first_order")),
            )
        stdout.print(made)
    print_report(result, as_json)


TERM_NAMES = {
    "weight_decay": "decay",
    "adam_current_gradient": "gradient",
    "adam_historical_momentum": "momentum",
    "current_gradient": "gradient",
    "historical_momentum": "momentum",
}
"""The terms of an update in few words."""


def _shared_prefix(names: list[str]) -> str:
    """The dotted parts that all names begin with; the whole name if there is one only."""
    if len(set(names)) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = takewhile(lambda column: len(set(column)) == 1, parts)
    return ".".join(column[0] for column in same)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2g}"


class AttributionBar:
    """Shows the steps of an attribution on a bar."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task = bar.add_task("attributing", total=None, note="")

    def __call__(self, step: int, start: int, end: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, total=end - start, completed=step - start, note=f"step {step}")
