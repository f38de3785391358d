"""route-to-margin-closure: how much of a margin's change do changes of route scores explain?

At each checkpoint every route of every pair is scored (definitions.md section 5, Transfer). Over
each interval between consecutive checkpoints the change of a target scalar, on each side of each
pair, is fitted by the changes of the route scores of that pair; routes know no side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

from circuit.artifacts import dump_rows
from circuit.errors import CircuitError
from circuit.figures.closure import (
    actual_against_predicted,
    contributions,
    scores_over_checkpoints,
)
from circuit.reports.base import ReportResult, open_report
from circuit.reports.closure import (
    NOTE,
    check_sides,
    fit_deltas,
    fit_lines,
    markdown,
    number,
    warnings_of,
)
from circuit.reports.inputs import Inputs, PairOptions, open_inputs
from circuit.reports.route_rows import (
    TARGET_SCALARS,
    WHOLE,
    Scored,
    mean_scores,
    route_rows,
    score_checkpoint,
)
from circuit.scalars.answers import MOVING
from circuit.scalars.routes import Route, check_routes
from circuit.scalars.transfer import PairSides
from circuit.schemas import RouteRow
from circuit.tasks.pairs import SIDES, Pair
from circuit.train_config import TrainConfig

COMMAND = "route-to-margin-closure"


@dataclass(frozen=True)
class RouteClosure:
    """Parameters of the report.

    Attributes:
        routes: at least one, labels unique.
        pairs: types and numbers.
        margin_sides: sides on which the target scalar is read.
        target_scalar: one of `TARGET_SCALARS`.
        fit_intercept: whether the least squares have a constant.
        splits: of the probe records; None takes all.
    """

    routes: tuple[Route, ...]
    pairs: PairOptions = field(default_factory=PairOptions)
    margin_sides: tuple[str, ...] = SIDES
    target_scalar: str = MOVING
    fit_intercept: bool = False
    splits: tuple[str, ...] | None = None

    def to_row(self) -> dict[str, Any]:
        """Every parameter as JSON."""
        return asdict(self) | {"routes": [route.to_row() for route in self.routes]}


def route_to_margin_closure(
    config: TrainConfig,
    probe_set: str | Path,
    checkpoints: Sequence[Path],
    wanted: RouteClosure,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ReportResult:
    """Score the routes at each checkpoint, fit, and write the report.

    Args:
        checkpoints: at least two, ascending by step.
        progress: called with the step of each checkpoint when it is done.

    Raises:
        CircuitError: fewer than two checkpoints, a route, side or scalar that does not exist, too
            few pairs, a role with unequal counts on the sides of a pair, or a folder not free.
    """
    _check(checkpoints, wanted)
    with open_report(COMMAND, output_dir, overwrite=overwrite) as writer:
        inputs = open_inputs(config, probe_set, splits=wanted.splits, checkpoints=checkpoints)
        keys, values = inputs.vocabulary.key_ids, inputs.vocabulary.value_ids
        check_routes(wanted.routes, config.model, num_keys=len(keys), num_values=len(values))
        pairs = inputs.pairs(wanted.pairs)
        sides = PairSides.of(pairs, inputs.side(pairs, "clean"), inputs.side(pairs, "corrupted"))
        for route in wanted.routes:
            sides.places(route.position_role)  # refuses unequal counts before any model is loaded
        scored = _scored(inputs, checkpoints, sides, wanted.routes, progress)
        rows = route_rows(
            scored,
            pairs,
            sides,
            wanted.routes,
            values,
            margin_sides=wanted.margin_sides,
            target_scalar=wanted.target_scalar,
        )
        fits, predicted = _fits(rows, wanted)
        rows = [
            row.model_copy(update={"predicted_delta": p, "residual": row.delta - p})
            for row, p in zip(rows, predicted, strict=True)
        ]
        means = mean_scores(scored, pairs, wanted.routes)
        summary = _summary(scored, pairs, rows, fits)
        return writer.write(
            parameters={
                "config": config.name,
                "probe_set": str(probe_set),
                "checkpoints": [str(path) for path in checkpoints],
                **wanted.to_row(),
            },
            summary=summary,
            rows=[row.model_dump() for row in rows],
            page=_page(writer.name, summary, fits, means, wanted),
            figures={
                f"{writer.name}_scores": scores_over_checkpoints(means),
                f"{writer.name}_fit": actual_against_predicted(_points(rows)),
                f"{writer.name}_contributions": contributions(fits, "group"),
            },
            further={
                f"{writer.name}_fits.jsonl": dump_rows(fits),
                f"{writer.name}_mean_scores.jsonl": dump_rows(means),
            },
            provenance=inputs.provenance()
            | {"checkpoint_digests": {str(one.step): one.digest for one in scored}},
            law=_law(scored),
            device=config.device,
        )


def _scored(
    inputs: Inputs,
    checkpoints: Sequence[Path],
    sides: PairSides,
    routes: Sequence[Route],
    progress: Callable[[int], None] | None,
) -> list[Scored]:
    scored: list[Scored] = []
    for point in inputs.models(checkpoints):
        if scored and point.step <= scored[-1].step:
            raise CircuitError(
                f"holds step {point.step}, after one of step {scored[-1].step}",
                where=point.path,
                expected="checkpoints of ascending steps",
            )
        scored.append(score_checkpoint(point, sides, routes, inputs.vocabulary))
        if progress is not None:
            progress(point.step)
    return scored


def _check(checkpoints: Sequence[Path], wanted: RouteClosure) -> None:
    if len(checkpoints) < 2:
        raise CircuitError(f"{len(checkpoints)} checkpoints", expected="at least 2")
    if wanted.target_scalar not in TARGET_SCALARS:
        raise CircuitError(
            f"unknown target scalar '{wanted.target_scalar}'",
            expected=f"one of {', '.join(TARGET_SCALARS)}",
        )
    check_sides(wanted.margin_sides)


def _fits(
    rows: Sequence[RouteRow], wanted: RouteClosure
) -> tuple[list[dict[str, Any]], list[float]]:
    """Least squares of all rows, then of each side and pair type; predictions of the first."""
    groups = [("all", "all")]
    if len(wanted.margin_sides) > 1:
        groups += [("all", side) for side in wanted.margin_sides]
    if len(wanted.pairs.types) > 1:
        groups += [(kind, "all") for kind in wanted.pairs.types]
    fits, predictions = [], []
    for kind, side in groups:
        own = [r for r in rows if kind in ("all", r.pair_type) and side in ("all", r.margin_side)]
        fit, predicted = fit_deltas(
            [row.route_score_deltas for row in own],
            [row.delta for row in own],
            [row.pair_id for row in own],
            fit_intercept=wanted.fit_intercept,
        )
        name = "all rows" if kind == side == "all" else side if kind == "all" else kind
        fits.append({"group": name, "pair_type": kind, "margin_side": side, **fit})
        predictions.append(predicted)
    return fits, predictions[0]


def _points(rows: Sequence[RouteRow]) -> list[dict[str, Any]]:
    """What the figure of actual against predicted shows."""
    return [
        {
            "panel": row.target_scalar,
            "group": row.margin_side,
            "actual": row.delta,
            "predicted": row.predicted_delta,
        }
        for row in rows
    ]


def _summary(
    scored: Sequence[Scored],
    pairs: Sequence[Pair],
    rows: Sequence[RouteRow],
    fits: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "steps": [one.step for one in scored],
        "pairs": len(pairs),
        "rows": len(rows),
        "largest_incomplete_transfer": max(one.incompleteness for one in scored),
        "root_mean_square_residual": sqrt(fmean((row.residual or 0.0) ** 2 for row in rows)),
        "fits": {fit["group"]: {k: v for k, v in fit.items() if k != "group"} for fit in fits},
    }


def _law(scored: Sequence[Scored]) -> str:
    worst = max(one.incompleteness for one in scored)
    return (
        f"let in whole, at the embedding or at {WHOLE[1].stage}, the clean activations transfer"
        f" the contrast margin completely: at most {worst:.1e} logits off"
    )


def _page(
    name: str,
    summary: dict[str, Any],
    fits: Sequence[dict[str, Any]],
    means: Sequence[dict[str, Any]],
    wanted: RouteClosure,
) -> list[str]:
    steps = summary["steps"]
    lines = [
        f"Changes of `{wanted.target_scalar}` over {len(steps) - 1} intervals of steps"
        f" {steps[0]} to {steps[-1]}, {summary['pairs']} pairs,"
        f" {' and '.join(wanted.margin_sides)} side, by changes of {len(wanted.routes)} route"
        f" scores, {'with' if wanted.fit_intercept else 'without'} intercept; head subspaces are"
        " applied to the raw residual, the head's LayerNorm is not folded in.",
        "",
        *fit_lines(fits, {"group": "group"}),
        "",
        *warnings_of(fits, "group"),
        NOTE,
        "",
        f"![actual against predicted]({name}_fit.svg)",
        "",
        f"![contributions of the routes]({name}_contributions.svg)",
        "",
        "## Routes",
        "",
        *markdown(
            ["route", "stage", "role", "subspace", "rank", "head", "coefficient", "contribution"],
            [
                [
                    f"`{route.label}`",
                    route.stage,
                    route.position_role,
                    route.subspace,
                    route.rank or "-",
                    route.head or "-",
                    number(fits[0]["coefficients"][route.label]),
                    number(fits[0]["mean_contributions"][route.label]),
                ]
                for route in wanted.routes
            ],
        ),
    ]
    for kind in wanted.pairs.types:
        own = [row for row in means if row["pair_type"] == kind]
        gaps = {row["step"]: row["mean_gap"] for row in own}
        scores = {(row["route"], row["step"]): row["mean_score"] for row in own}
        lines += [
            "",
            f"## Mean scores of {own[0]['pairs']} `{kind}` pairs",
            "",
            *markdown(
                ["route", *map(str, steps)],
                [["all (clean minus corrupted)", *map(number, gaps.values())]]
                + [
                    [f"`{route.label}`", *(number(scores[route.label, step]) for step in steps)]
                    for route in wanted.routes
                ],
            ),
        ]
    return [*lines, "", f"![mean scores over checkpoints]({name}_scores.svg)"]
