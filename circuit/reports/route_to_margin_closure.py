"""route-to-margin-closure: how much of a margin's change do changes of route scores explain?

At each checkpoint every route of every pair is scored (definitions.md section 5, Transfer). Over
each interval between consecutive checkpoints the change of a target scalar, on each side of each
pair, is fitted by the changes of the route scores of that pair; routes know no side.

A basis that is refitted at each checkpoint turns with the weights, and the change of a route's
score holds that turn; with the basis of the interval's source at both ends it does not. The fit is
made both ways, and `basis` says which way the rows have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import fmean
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, PlainSerializer

from circuit import options
from circuit.artifacts import Row
from circuit.figures.charts import (
    CATEGORY,
    GREY,
    Chart,
    at_step,
    chart,
    colour,
    equals,
    legend,
    lines,
    thinned,
)
from circuit.lazy import alt
from circuit.options import Option
from circuit.reports.closure import NOTE, contributions, fit_deltas, fits_table, undetermined
from circuit.reports.closure_nulls import (
    Nulls,
    RouteChanges,
    nulls_chart,
    nulls_notes,
    nulls_table,
    told,
)
from circuit.reports.inputs import Checkpointed
from circuit.reports.intervals import ends_of, said_between
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.route_rows import (
    TARGET_SCALARS,
    WHOLE,
    Scored,
    interval_rows,
    mean_scores,
    score_checkpoint,
)
from circuit.reports.tables import Table, by_step, cell
from circuit.scalars.answers import MOVING
from circuit.scalars.routes import Route, check_labels, check_routes, read_route
from circuit.scalars.transfer import PairSides
from circuit.schemas import SIDES, RouteBasis
from circuit.tasks.pairs import record_of
from circuit.train_config import ModelConfig

FITS = "route_to_margin_closure_fits.jsonl"
MEANS = "route_to_margin_closure_mean_scores.jsonl"
EVERYTHING = "everything"
"""What a chart calls the whole gap between clean and corrupted."""


class MarginClosureOptions(options.ProbeOptions, options.CheckpointOptions, options.PairOptions):
    """Which routes explain which scalar."""

    routes: Annotated[
        tuple[Annotated[Route, BeforeValidator(read_route), PlainSerializer(Route.to_row)], ...],
        Option(
            "label=...,stage=...,position_role=...[,subspace=...,rank=...[,head_layer=...,"
            "head=...]]; the whole residual without a subspace.",
            flag="--route",
            kind="route",
        ),
    ]
    margin_sides: options.MarginSides = SIDES
    target_scalar: Annotated[
        str, Option("Scalar whose changes are fitted.", choices=TARGET_SCALARS)
    ] = MOVING
    basis: Annotated[
        RouteBasis,
        Option("Bases at the target of an interval, in the rows: refitted, or the source's."),
    ] = "refit"
    fit_intercept: options.FitIntercept = False
    nulls: Nulls = 0

    def check(self) -> None:
        """Labels are unique, and none is the name of the whole gap."""
        super().check()
        check_labels(self.routes, EVERYTHING)

    def check_model(self, shape: ModelConfig) -> None:
        """Also the routes' stages, heads and ranks."""
        super().check_model(shape)
        check_routes(self.routes, shape)


class MarginClosure(OfCheckpoints[MarginClosureOptions]):
    """How much of a margin's change over training do changes of route scores explain?"""

    command = "route-to-margin-closure"
    Options = MarginClosureOptions
    least = 2
    title = "Routes to the margin"
    question = "How much of the margin's change do changes of route scores explain?"

    def prepare(self) -> None:
        super().prepare()
        asked = self.options
        check_routes(asked.routes, self.config.model, self.inputs.task)
        self.pairs = self.inputs.pairs(asked)
        self.sides = PairSides.of(
            self.pairs, *(self.inputs.side(self.pairs, side) for side in SIDES)
        )
        for route in asked.routes:  # unequal counts are refused before any model is loaded
            self.sides.places(route.position_role)
        self.scored: list[Scored] = []
        turned = any(route.rank is not None for route in asked.routes)
        others = [basis for basis in get_args(RouteBasis) if turned and basis != asked.basis]
        self.rows: dict[RouteBasis, list[Row]] = {basis: [] for basis in (asked.basis, *others)}

    def measure(self, point: Checkpointed) -> list[Row]:
        """Makes the rows of the interval that ends here, with each basis."""
        asked, task = self.options, self.inputs.task
        before = self.scored[-1] if self.scored else None
        here = score_checkpoint(point, self.sides, asked.routes, task.token_sets, before)
        self.scored.append(here)
        for basis, rows in self.rows.items():
            if before is not None:
                rows += interval_rows(
                    before,
                    here,
                    self.pairs,
                    self.sides,
                    asked.routes,
                    task.choices,
                    margin_sides=asked.margin_sides,
                    target_scalar=asked.target_scalar,
                    basis=basis,
                )
        return []

    def conclude(self, rows: list[Row]) -> Findings:
        by_basis = {basis: self._fits(rows, basis) for basis, rows in self.rows.items()}
        fits, predicted = by_basis[self.options.basis]
        rows = [
            {**row, "predicted_delta": value, "residual": row["delta"] - value}
            for row, value in zip(self.rows[self.options.basis], predicted, strict=True)
        ]
        worst = max(one.incompleteness for one in self.scored)
        summary = {
            "steps": [one.step for one in self.scored],
            "pairs": len(self.pairs),
            "rows": len(rows),
            **told(self.options.nulls),
            "largest_incomplete_transfer": worst,
            "root_mean_square_residual": sqrt(fmean(row["residual"] ** 2 for row in rows)),
            "fits": {fit["group"]: {k: v for k, v in fit.items() if k != "group"} for fit in fits},
            "by_basis": {
                basis: {
                    **{name: of_basis[0][name] for name in _COMPARED},
                    "mean_score_changes": {
                        route.label: fmean(r["route_score_deltas"][route.label] for r in changes)
                        for route in self.options.routes
                    },
                }
                for (basis, changes), (of_basis, _) in zip(
                    self.rows.items(), by_basis.values(), strict=True
                )
            },
        }
        law = (
            f"let in whole, at the embedding or at {WHOLE[1].stage}, the clean activations transfer"
            f" the contrast margin completely: at most {worst:.1e} logits off"
        )
        means = mean_scores(self.scored, self.pairs, self.options.routes)
        every = [fit for of_basis, _ in by_basis.values() for fit in of_basis]
        return Findings(rows, summary, law, further={FITS: every, MEANS: means})

    def _fits(self, rows: Sequence[Row], basis: str) -> tuple[list[dict[str, Any]], list[float]]:
        """Least squares of all rows, then of each side and pair type; predictions of the first."""
        asked = self.options
        groups = [("all rows", "all", "all")]
        if len(asked.margin_sides) > 1:
            groups += [(side, "all", side) for side in asked.margin_sides]
        if len(asked.pair_types) > 1:
            groups += [(kind, kind, "all") for kind in asked.pair_types]
        labels = [route.label for route in asked.routes]
        changes = RouteChanges(*_columns(rows), labels) if asked.nulls else None
        fits, predictions = [], []
        for name, kind, side in groups:
            of_group = [
                row
                for row in rows
                if kind in ("all", row["pair_type"]) and side in ("all", row["margin_side"])
            ]
            fit, predicted = fit_deltas(
                [row["route_score_deltas"] for row in of_group],
                [row["delta"] for row in of_group],
                [record_of(row["pair_id"]) for row in of_group],
                fit_intercept=asked.fit_intercept,
            )
            if changes is not None:
                fit["nulls"] = changes.nulls(
                    _columns(of_group)[0],
                    [row["delta"] for row in of_group],
                    fit,
                    fit_intercept=asked.fit_intercept,
                    draws=asked.nulls,
                )
            place = {"group": name, "pair_type": kind, "margin_side": side, "basis": basis}
            fits.append({**place, **fit})
            predictions.append(predicted)
        return fits, predictions[0]

    @classmethod
    def size(cls, results: Results[MarginClosureOptions]) -> tuple[float, ...]:
        return len(results.summary["steps"]), len(results.options.routes), results.summary["pairs"]

    @classmethod
    def notes(cls, results: Results[MarginClosureOptions]) -> list[str]:
        asked, steps = results.options, results.summary["steps"]
        return [
            f"Changes of `{asked.target_scalar}` over {len(steps) - 1} intervals of steps"
            f" {steps[0]} to {steps[-1]}, {results.summary['pairs']} pairs,"
            f" {' and '.join(asked.margin_sides)} side, by changes of {len(asked.routes)} route"
            f" scores, {'with' if asked.fit_intercept else 'without'} intercept; head subspaces are"
            " applied to the raw residual, the head's LayerNorm is not folded in.",
            _bases(results),
            *undetermined(_fits_of(results), "group"),
            NOTE,
            *nulls_notes(_fits_of(results)),
        ]

    @classmethod
    def tables(cls, results: Results[MarginClosureOptions]) -> list[Table]:
        fits, steps = _every_fit(results), results.summary["steps"]
        by_basis = results.summary.get("by_basis", {})
        changes = {basis: of["mean_score_changes"] for basis, of in by_basis.items()}
        routes = [
            {
                **route.to_row(),
                "coefficient": fits[0]["coefficients"][route.label],
                "contribution": fits[0]["mean_contributions"][route.label],
                **{basis: of[route.label] for basis, of in changes.items()},
            }
            for route in results.options.routes
        ]
        places = {
            **{"label": "route", "stage": "stage", "position_role": "role"},
            **{"subspace": "subspace", "rank": "rank", "head": "head"},
        }
        numbers: dict[str, str | tuple[str, str]] = {
            "label": "route",
            **{basis: (f"change of score, {basis}", ".3f") for basis in changes},
            "coefficient": ("coefficient", ".3f"),
            "contribution": ("contribution", ".3f"),
        }
        courses: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
        for row in results.rows(MEANS):
            course = courses.setdefault((row["pair_type"], row["pairs"]), {EVERYTHING: {}})
            course[EVERYTHING][str(row["step"])] = row["mean_gap"]
            course.setdefault(row["route"], {})[str(row["step"])] = row["mean_score"]
        return [
            fits_table(
                "Fits",
                {"group": "group", "basis": "basis"},
                fits,
                console=len(results.summary["fits"]) + 1,  # and all rows with the other basis
            ),
            *nulls_table({"group": "group", "basis": "basis"}, fits),
            Table("Contributions to the mean change", numbers, routes, console=len(routes)),
            Table("Routes", places, routes),
            *(
                Table(
                    f"Mean scores of {pairs} {kind} pairs", **by_step(course, steps, ".3f", "route")
                )
                for (kind, pairs), course in courses.items()
            ),
        ]

    @classmethod
    def charts(cls, results: Results[MarginClosureOptions]) -> list[Chart]:
        rows = thinned([{name: row[name] for name in _SHOWN} for row in results.rows()])
        sides = results.options.margin_sides
        return [
            chart(
                f"{cls.stem()}_fit",
                f"Changes of {results.options.target_scalar}, actual and predicted",
                {"margin_fit": rows},
                *equals(
                    "margin_fit",
                    ("predicted_delta", "predicted change"),
                    ("delta", "actual change"),
                    colour("margin_side", sides),
                    rows,
                ),
                height=260,
            ),
            contributions(
                f"{cls.stem()}_contributions",
                "Coefficient × mean change of the score, by fit",
                _fits_of(results),
                "group",
            ),
            *nulls_chart(f"{cls.stem()}_nulls", _fits_of(results), ["group"]),
            *_scores(f"{cls.stem()}_scores", list(results.rows(MEANS))),
        ]


_R_SQUARED = ("r_squared", *ends_of("r_squared"), "r_squared_held_out", "r_squared_about_zero")
_COMPARED = (*_R_SQUARED, "rank")
_DASHES = ([1, 0], [5, 4], [2, 2])
_SHOWN = ("source_step", "target_step", "pair_id", "margin_side", "delta", "predicted_delta")


def _columns(rows: Sequence[Row]) -> tuple[list[Any], list[str], list[dict[str, float]]]:
    """Key, pair type and changes of the route scores of each row."""
    return (
        [(row["source_step"], row["target_step"], row["pair_id"]) for row in rows],
        [row["pair_type"] for row in rows],
        [row["route_score_deltas"] for row in rows],
    )


def _fits_of(results: Results[MarginClosureOptions]) -> list[Row]:
    """The fits with the basis that the rows have."""
    return [fit for fit in _every_fit(results) if fit["basis"] == results.options.basis]


def _every_fit(results: Results[MarginClosureOptions]) -> list[Row]:
    return [{"basis": "refit", **fit} for fit in results.rows(FITS)]  # schema 1 did not say


def _bases(results: Results[MarginClosureOptions]) -> str:
    """How well all rows are fitted with refitted bases, and with those of the source."""
    by_basis = results.summary.get("by_basis", {})
    if len(by_basis) < 2:
        return f"Bases: `{results.options.basis}`."
    values = {
        basis: cell(of["r_squared"], ".3f") + said_between(of, "r_squared", ".3f")
        for basis, of in by_basis.items()
    }
    return (
        f"R² of all rows: {values['refit']} with bases refitted at each checkpoint, whose changes"
        f" of score hold the turning of the basis, {values['source']} with those of the interval's"
        f" source at both ends. The rows have `{results.options.basis}`."
    )


def _scores(name: str, means: Sequence[Row]) -> Iterator[Chart]:
    """Mean score of each route over checkpoints, and of everything; a chart a pair type."""
    routes = [EVERYTHING, *dict.fromkeys(row["route"] for row in means)]
    palette = [GREY, *CATEGORY[:-1]]
    shade = colour("route", routes, palette=palette)
    # where colours come again, other dashes tell the routes apart
    dashes = [_DASHES[i // len(palette) % len(_DASHES)] for i in range(len(routes))]
    scale = alt.Scale(domain=routes, range=dashes)
    dashed = alt.StrokeDash("route:N").scale(scale).legend(legend(routes))
    shown = ("step", "route", "mean_score", "share")
    kinds = list(dict.fromkeys(row["pair_type"] for row in means))
    for kind in kinds:
        of_kind = [row for row in means if row["pair_type"] == kind]
        gaps = {row["step"]: row["mean_gap"] for row in of_kind}
        whole = [
            {"step": step, "route": EVERYTHING, "mean_score": gap, "share": 1.0}
            for step, gap in gaps.items()
        ]
        data = f"{name}_{kind}"
        course = lines(data, "mean_score", "mean score, logits", shade, shown, dashed=dashed)
        symlog = alt.Y("mean_score:Q").title("mean score, logits").scale(type="symlog")
        yield chart(
            data if len(kinds) > 1 else name,
            f"Mean score of each route, {kind} pairs",
            {data: whole + [{key: row[key] for key in shown} for row in of_kind]},
            course.encode(y=symlog),
            at_step(),
            height=260,
        )
